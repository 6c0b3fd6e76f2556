"""Kernels: pure functions on tensors, chosen once for a device and passed to every layer as one `Ops` value.

A function may exist several times with the same name and signature: in PyTorch, Triton and Numba. The PyTorch function in `reference`
is the specification. Layers call `build.ops.rms_norm(...)`, so that they do not depend on the device.
"""
from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minivllm.kernels.grouped import GroupedWeight
from minivllm.kernels.reference import activation, drafts, grouped, kv_cache, linear, lora, moe, norm, rope, sampling
from minivllm.kernels.reference import attention as attn

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ops:
    """All kernels of a model. Signatures and shapes are those of the functions with the same names in `kernels/reference`."""

    prepare_attention: Callable[..., Any]  # once per step and KV group
    self_attention: Callable[..., Tensor]
    store_kv: Callable[..., Tensor]  # the first half of self_attention: writes keys and values, returns the rotated queries
    copy_blocks: Callable[..., None]
    pack_weight: Callable[[Tensor, torch.dtype], Any]
    fused_linear: Callable[..., Tensor]
    pack_groups: Callable[[GroupedWeight], Any]  # a quantized weight in the layout of the next two
    grouped_linear: Callable[..., Tensor]  # as fused_linear
    grouped_rows: Callable[[Any, Tensor, torch.dtype], Tensor]
    prepare_lora: Callable[[Tensor, Tensor], Any]  # once per step that has LoRA adapters
    lora_delta: Callable[..., tuple[Tensor, Tensor]]
    lora_linear: Callable[..., Tensor | None]  # lora_delta and fused_linear in one; None: not for these shapes
    route: Callable[..., tuple[Tensor, Tensor]]
    fused_experts: Callable[..., Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    layer_norm: Callable[[Tensor, Tensor | None, Tensor | None, float], Tensor]
    rope_angles: Callable[[Tensor, Tensor, float | Tensor, torch.dtype], tuple[Tensor, Tensor]]
    silu_and_mul: Callable[[Tensor], Tensor]
    gelu_tanh_and_mul: Callable[[Tensor], Tensor]
    silu: Callable[[Tensor], Tensor]
    relu: Callable[[Tensor], Tensor]
    gelu: Callable[[Tensor], Tensor]
    gelu_tanh: Callable[[Tensor], Tensor]
    sample: Callable[..., Tensor]
    exact_step: Callable[..., drafts.ExactStep]
    accept_drafts: Callable[..., tuple[Tensor, Tensor]]
    proposer_inputs: Callable[..., tuple[Tensor, Tensor, Tensor]]
    single_tokens: Callable[..., tuple[Tensor, Tensor, Tensor]]
    write_drafts: Callable[..., None]
    find_ngrams: Callable[..., Tensor]
    # (num_heads, num_kv_heads, head_dim, dtype, cache_dtype=None): compile a model's kernels ahead
    warm_up: Callable[..., None]
    compiling: Callable[[], AbstractContextManager[None]] | None  # kernels launched inside it are compiled in parallel and do not run
    before_replays: Callable[[torch.device], None]  # call it before a replay of a captured graph that follows other kernels


REFERENCE = Ops(
    prepare_attention=attn.prepare_attention,
    self_attention=attn.self_attention,
    store_kv=attn.store_kv,
    copy_blocks=kv_cache.copy_blocks,
    pack_weight=linear.pack_weight,
    fused_linear=linear.fused_linear,
    pack_groups=grouped.pack_groups,
    grouped_linear=grouped.grouped_linear,
    grouped_rows=grouped.grouped_rows,
    prepare_lora=lora.prepare_lora,
    lora_delta=lora.lora_delta,
    lora_linear=lora.lora_linear,
    route=moe.route,
    fused_experts=moe.fused_experts,
    rms_norm=norm.rms_norm,
    layer_norm=norm.layer_norm,
    rope_angles=rope.rope_angles,
    silu_and_mul=activation.silu_and_mul,
    gelu_tanh_and_mul=activation.gelu_tanh_and_mul,
    silu=activation.silu,
    relu=activation.relu,
    gelu=activation.gelu,
    gelu_tanh=activation.gelu_tanh,
    sample=sampling.sample,
    exact_step=drafts.exact_step,
    accept_drafts=drafts.accept_drafts,
    proposer_inputs=drafts.proposer_inputs,
    single_tokens=drafts.single_tokens,
    write_drafts=drafts.write_drafts,
    find_ngrams=drafts.find_ngrams,
    warm_up=lambda *shape, **options: None,
    compiling=None,
    before_replays=lambda device: None,
)


def select(device: torch.device) -> Ops:
    """The fastest kernels for a device: Triton's on a CUDA GPU, Numba's on a CPU, and PyTorch's if the compiler is not installed."""
    if device.type == "cpu":
        return _for_cpu()
    if device.type != "cuda":
        return REFERENCE
    try:
        from minivllm.kernels import triton
    except ImportError as error:
        logger.warning("Triton cannot be imported (%s): using the slower PyTorch kernels. On Linux, pip install triton.", error)
        return REFERENCE
    return dataclasses.replace(
        REFERENCE,
        prepare_attention=triton.attention.prepare_attention,
        self_attention=triton.attention.self_attention,
        store_kv=triton.attention.store_kv,
        fused_linear=triton.linear.fused_linear,
        pack_groups=triton.packed_weight.pack_groups,
        grouped_linear=triton.grouped.grouped_linear,
        grouped_rows=triton.grouped.grouped_rows,
        prepare_lora=triton.lora.prepare_lora,
        lora_delta=triton.lora.lora_delta,
        lora_linear=triton.lora.lora_linear,
        fused_experts=triton.moe.fused_experts,
        silu_and_mul=triton.activation.silu_and_mul,
        gelu_tanh_and_mul=triton.activation.gelu_tanh_and_mul,
        rms_norm=triton.norm.rms_norm,
        rope_angles=triton.rope.rope_angles,
        sample=triton.sampling.sample,
        exact_step=triton.drafts.exact_step,
        accept_drafts=triton.drafts.accept_drafts,
        proposer_inputs=triton.drafts.proposer_inputs,
        single_tokens=triton.drafts.single_tokens,
        write_drafts=triton.drafts.write_drafts,
        find_ngrams=triton.drafts.find_ngrams,
        compiling=triton.device.compiling_in_parallel,
        before_replays=triton.device.before_replays,
    )


def _for_cpu() -> Ops:
    try:
        from minivllm.kernels import numba
    except (ImportError, OSError, RuntimeError) as error:  # besides: LLVM's library does not load; the system forbids generated code
        logger.info("Numba cannot be imported (%s): using the slower PyTorch kernels. pip install numba", error)
        return REFERENCE
    return dataclasses.replace(
        REFERENCE,
        prepare_attention=numba.attention.prepare_attention,
        self_attention=numba.attention.self_attention,
        fused_linear=numba.rows.fused_linear,
        pack_groups=numba.grouped.pack_groups,
        grouped_linear=numba.grouped.grouped_linear,
        grouped_rows=numba.grouped.grouped_rows,
        rms_norm=numba.rows.rms_norm,
        warm_up=numba.warm_up,
    )
