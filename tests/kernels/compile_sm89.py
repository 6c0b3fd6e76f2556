"""Compiles every Triton kernel for sm_89 (RTX 4060) and prints one JSON line per variant: shared memory, registers, spills.

No GPU is needed. Run by test_triton_sm89.py in its own process, because a process either interprets kernels or compiles them.
"""
from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minivllm.kernels.layout import SHARED_RUN
from minivllm.kernels.triton import activation, attention, linear, norm, sampling
from minivllm.kernels.triton.decode_attention import _decode_attention, _shared_attention
from minivllm.kernels.triton.prompt_attention import _position_and_store, _prompt_attention

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def measure(name: str, fn: Any, types: Mapping[str, str], constants: Mapping[str, Any], **options: int) -> dict[str, Any]:
    """`types`: argument -> Triton type. Pointers and strides are multiples of 16, as tensors of real models are."""
    order = fn.arg_names
    attrs = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(order) if types.get(arg, "").startswith("*") or "stride" in arg}
    source = ASTSource(fn=fn, signature={arg: types.get(arg, "constexpr") for arg in order},
                       constexprs={(order.index(key),): value for key, value in constants.items()}, attrs=attrs)
    kernel = triton.compile(source, target=GPUTarget("cuda", 89, 32), options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        command = [str(PTXAS), "-v", "--gpu-name=sm_89", file.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    registers = int(re.findall(r"Used (\d+) registers", log)[0])
    return {"kernel": name, "shared": kernel.metadata.shared, "registers": registers, "spills": spills}


def attention_variants() -> Iterator[dict[str, Any]]:
    cache = {"cache_k": "*bf16", "cache_v": "*bf16", "seq_lens": "*i32", "block_table": "*i32", "scale": "fp32", "softcap": "fp32",
             "table_stride": "i32"}
    source = {"qkv": "*bf16", "norm_weight": "*bf16", "eps": "fp32", "cos": "*bf16", "sin": "*bf16", "slots": "*i64", "qkv_stride": "i32"}
    parts = {"partial": "*fp32", "log_weight": "*fp32", "tickets": "*i32", "num_seqs": "i32", "splits": "i32",
             "shared": "*i32", "shared_parts": "i32", "parts": "i32"}
    decode = {**cache, **source, **parts, "out": "*bf16"}
    store = {**source, "qk": "*bf16", "cache_k": "*bf16", "cache_v": "*bf16", "first": "i32"}
    sizes = dict.fromkeys(("first_seq", "num_seqs", "num_tiles", "q_stride", "k_stride", "v_stride", "k_column", "v_column"), "i32")
    prompt = {**cache, **sizes, **dict.fromkeys(("out", "q", "k", "v"), "*bf16"), "query_start": "*i32"}
    for head_dim in (64, 128):
        for group in (2, 3, 8):
            name = f"attention, head_dim {head_dim}, {group} heads per KV head"
            shape = dict(NUM_HEADS=group * 8, D=head_dim, PADDED_D=head_dim)
            for width, window in ((1, 0), (2, 0), (5, 1000), (8, 0)):
                tile = attention.decode_tile(8, 4096, head_dim, group, 2, 89)
                if width > 1:
                    wide = attention.wide_decode_tile(width, head_dim, group, 2, 89)
                    assert wide is not None
                    tile = wide
                one = dict(HEADS_PER_KV=group, BLOCK_SIZE=16, BLOCK_N=tile.block_n, BLOCK_M=tile.block_m, SOFTCAP=False, **shape)
                yield measure(f"decode {name}, query width {width}", _decode_attention, decode,
                              dict(QUERY_WIDTH=width, SPLIT=True, SHARED=window == 0, MIN_KEYS=attention.MIN_KEYS, RUN=SHARED_RUN,
                                   WINDOW=window, NORM=True, ROPE=True, PDL=False, **one),
                              num_warps=tile.num_warps, num_stages=tile.num_stages)
            tile = attention.shared_tile(head_dim, group, 2, 89)
            yield measure(f"decode shared {name}", _shared_attention, decode,
                          dict(RUN=SHARED_RUN, NORM=True, ROPE=True, PDL=False, HEADS_PER_KV=group, BLOCK_SIZE=16, BLOCK_Q=tile.block_q,
                               BLOCK_N=tile.block_n, BLOCK_M=tile.block_m, SOFTCAP=False, **shape),
                          num_warps=tile.num_warps, num_stages=tile.num_stages)
            tile = attention.prompt_tile(head_dim, group, 2, 89)
            one |= dict(BLOCK_N=tile.block_n, BLOCK_M=tile.block_m, BLOCK_Q=tile.block_q, WINDOW=0)
            yield measure(f"prefill {name}", _prompt_attention, prompt, dict(DESCRIPTORS=False, **one),
                          num_warps=tile.num_warps, num_stages=tile.num_stages)
        yield measure(f"decode position and store, head_dim {head_dim}", _position_and_store, store,
                      dict(KV_HEADS=8, HEADS=512 // head_dim, NORM=True, ROPE=True, **shape), num_warps=1)


def linear_variants() -> Iterator[dict[str, Any]]:
    types = {**dict.fromkeys(("out", "x", "weight", "norm_weight", "bias", "residual"), "*bf16"), "eps": "fp32"}
    shapes = {"0.6B": (1024, 2048, 4096, 3072), "135M": (576, 576, 960, 1536), "7B": (4096, 4096, 6144, 14336)}
    for model, (hidden, heads, qkv, inner) in shapes.items():
        for layer, n, k, gated in (("qkv", qkv, hidden, False), ("o", hidden, heads, False), ("gate_up", inner, hidden, True),
                                   ("down", hidden, inner, False)):
            before = layer in ("qkv", "gate_up")
            flags = dict(N=n, K=k, NORM=before, GATED=gated, BIAS=False, ADD=not before, PDL=False)
            for rows in (1, 16):
                if rows > 1 and n * k * (1 + gated) > linear.MAX_WEIGHT:
                    continue
                shape = linear.shape_for(rows, n, k, gated, 89)
                blocks = dict(BLOCK_N=shape.block_n, BLOCK_K=shape.block_k)
                name = f"decode {layer} of {model}, {rows} rows"
                if rows == 1:
                    yield measure(name, linear._matvec, types, {**flags, **blocks}, num_warps=shape.num_warps)
                else:
                    yield measure(name, linear._few_rows, {**types, "rows": "i32"},
                                  {**flags, **blocks, "BLOCK_M": 16, "PARTS": min(shape.num_warps, shape.block_k // 16)},
                                  num_warps=shape.num_warps)


def small_variants() -> Iterator[dict[str, Any]]:
    types = {"out": "*bf16", "x": "*bf16", "weight": "*bf16", "eps": "fp32"}
    for width in (576, 1024, 4096):
        constants = dict(N=width, PADDED=triton.next_power_of_2(width), PDL=False)
        yield measure(f"decode rms_norm of {width}", norm._rms_norm, types, constants, num_warps=norm.warps_for(width))
    yield measure("decode silu_and_mul", activation._silu_and_mul, {"out": "*bf16", "x": "*bf16", "size": "i32"},
                  dict(BLOCK=1024, PDL=False), num_warps=4)


def sampling_variants() -> Iterator[dict[str, Any]]:
    rows = {"row_stride": "i32", "size": "i32", "temperature": "*fp32", "threshold": "*fp32"}
    chunks = {"peaks": "*fp32", "costs": "*fp32", "winners": "*i32", "temperature": "*fp32"}
    for dtype, kind in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        types = {**rows, "logits": kind, "top_k": "*i32", "top_p": "*fp32", "min_p": "*fp32"}
        for filters in ("TOP_K", "TOP_P", "MIN_P", "TOP_K TOP_P MIN_P"):
            constants = dict(TOP_K="TOP_K" in filters, TOP_P="TOP_P" in filters, MIN_P="MIN_P" in filters,
                             SHIFT=sampling.KEY_SHIFT[dtype], POSITIONS=sampling.POSITIONS)
            yield measure(f"decode sampling threshold {filters}, {kind}", sampling._thresholds, types, constants,
                          num_warps=sampling.THRESHOLD_WARPS)
        for filtered in (False, True):
            yield measure(f"decode sampling draw, {kind}", sampling._draw, {**rows, **chunks, "logits": kind, "keys": "*i32"},
                          dict(FILTERED=filtered, CHUNK=sampling.CHUNK), num_warps=sampling.DRAW_WARPS)
    yield measure("decode sampling combine", sampling._combine, {**chunks, "out": "*i64"}, dict(CHUNKS=75, PADDED=128), num_warps=1)


if __name__ == "__main__":
    for row in (*attention_variants(), *linear_variants(), *small_variants(), *sampling_variants()):
        print(json.dumps(row), flush=True)
