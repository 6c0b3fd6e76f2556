"""The bytes that a method declares for a weight are those of its tensors, as the reference keeps them and as a GPU's kernels read them."""
from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minivllm.kernels import REFERENCE
from minivllm.quantization.awq import AWQMethod
from minivllm.quantization.base import LinearMethod, ParamSpec
from minivllm.quantization.bitsandbytes import LLMInt8Method
from minivllm.quantization.compressed_tensors import IntMethod
from minivllm.quantization.dense import DENSE
from minivllm.quantization.fp8 import FP8Method
from minivllm.quantization.gguf import BLOCKS, GGUFMethod
from minivllm.quantization.gptq import GPTQMethod
from minivllm.quantization.online import OnlineMethod
from minivllm.quantization.packing import pack_bits
from minivllm.quantization.parts import PartsMethod
from tests.planning.test_plan_bytes import held_bytes

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pack_groups = pytest.importorskip("minivllm.kernels.triton.packed_weight").pack_groups
FOR_GPU = dataclasses.replace(REFERENCE, pack_groups=pack_groups)

groups = st.sampled_from((-1, 24, 32, 64, 96, 128, 512))
in_words = st.one_of(
    st.builds(AWQMethod, groups),
    st.builds(GPTQMethod, st.sampled_from((2, 3, 4, 8)), groups, sym=st.booleans(), desc_act=st.booleans(), v1=st.just(False)),
    st.builds(IntMethod, st.sampled_from((4, 8)), groups, st.booleans(), packed=st.just(True), ordered=st.booleans()),
    st.builds(IntMethod, st.just(8), groups, st.booleans(), packed=st.just(False)),
    st.just(LLMInt8Method(8, -1, True, False, scale_bytes=4)),
    st.builds(OnlineMethod, st.sampled_from(("fp8", "int8"))),
    st.builds(FP8Method, st.sampled_from((None, (128, 128), (32, 64))), st.booleans(), st.booleans()))
of_files = st.builds(GGUFMethod, st.sampled_from(sorted(BLOCKS)))


def loaded(name: str, param: ParamSpec, method: LinearMethod) -> Tensor:
    """Random content of one parameter."""
    if name.endswith("g_idx"):
        cols = param.parts[0][0]
        group = getattr(method, "group", -1)
        shuffled = getattr(method, "desc_act", False) or getattr(method, "ordered", False)
        order = torch.randperm(cols) if shuffled else torch.arange(cols)
        return (order // (cols if group == -1 else group)).int().repeat(len(param.parts))
    if name.endswith("zeros") and getattr(method, "sym", False):  # every zero is in the middle
        bits = method.bits  # type: ignore[attr-defined]
        return pack_bits(torch.full((param.shape[0], param.shape[1] * 32 // bits), 1 << bits - 1, dtype=torch.uint8), bits, 1)
    dtype = torch.bfloat16 if param.dtype is None else getattr(torch, param.dtype)
    if dtype.is_floating_point:
        return torch.rand(param.shape).mul(4).to(torch.bfloat16).to(dtype)
    out = torch.empty(param.shape, dtype=dtype)
    out.view(torch.uint8).random_(0, 28 if isinstance(param.dummy, (int, tuple)) else 256)
    return out


def check(method: LinearMethod, rows: tuple[int, ...], cols: int) -> None:
    torch.manual_seed(0)
    for ops, on_gpu in ((REFERENCE, False), (FOR_GPU, True)):
        matmul = method.build({name: loaded(name, param, method) for name, param in method.parameters(rows, cols).items()}, rows, ops)
        held = held_bytes(matmul)
        assert held == method.resident_bytes(rows, cols, 2, on_gpu), (method, on_gpu)


@settings(max_examples=60)
@given(in_words, st.sampled_from(((32,), (32, 64), (64, 32, 32))), st.sampled_from((64, 96, 128, 160, 192, 288, 512, 576, 2048)))
def test_bytes_of_formats_with_words(method: LinearMethod, rows: tuple[int, ...], cols: int) -> None:
    check(method, rows, cols)


@settings(max_examples=30)
@given(st.lists(st.one_of(of_files, st.just(DENSE)), min_size=1, max_size=3), st.sampled_from((256, 768, 1024)))
def test_bytes_of_gguf_parts(parts: list[LinearMethod], cols: int) -> None:
    check(PartsMethod.of(tuple(parts)), (16, 48, 32)[: len(parts)], cols)


def test_what_a_gpu_stores_beside_the_checkpoint() -> None:
    """Mistral-7B's down projection in AWQ: a zero takes two bytes beside its scale, and split counters a byte per output."""
    n, k = 4096, 14336
    assert AWQMethod(128).resident_bytes((n,), k, 2, on_gpu=True) == n * (k // 2 + k // 128 * 4) + n
    assert AWQMethod(128).resident_bytes((n,), k, 2) == n * (k // 2 + k // 128 * 3)
