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

from minivllm.kernels.triton import activation, attention, kv_cache, norm, rope, sampling

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
    types = {"out": "*bf16", "partial": "*fp32", "log_weight": "*fp32", "q": "*bf16", "k": "*bf16", "v": "*bf16", "query_start": "*i32",
             "seq_lens": "*i32", "block_table": "*i32", "scale": "fp32", "softcap": "fp32"}
    sizes = ("first_seq", "num_seqs", "num_tokens", "q_stride_t", "q_stride_h", "kv_stride_block", "kv_stride_slot", "kv_stride_head",
             "table_stride")
    for head_dim in (64, 128):
        for heads_per_kv in (2, 3):
            for decode in (True, False):
                tile = attention.tile_for(head_dim, heads_per_kv, decode)
                constants = dict(NUM_HEADS=heads_per_kv * 8, HEADS_PER_KV=heads_per_kv, HEAD_DIM=head_dim, PADDED_DIM=head_dim,
                                 BLOCK_SIZE=16, BLOCK_Q=tile.block_q, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
                                 SPLITS=8 if decode else 1, WINDOW=0, SOFTCAP=False, DECODE=decode)
                name = f"{'decode' if decode else 'prefill'} attention, head_dim {head_dim}, {heads_per_kv} heads per KV head"
                yield measure(name, attention._attention, {**types, **dict.fromkeys(sizes, "i32")}, constants,
                              num_warps=tile.num_warps, num_stages=tile.num_stages)
        merge = {"out": "*bf16", "partial": "*fp32", "log_weight": "*fp32", "num_rows": "i32"}
        yield measure(f"decode split merge, head_dim {head_dim}", attention._merge_splits, merge,
                      dict(HEAD_DIM=head_dim, PADDED_DIM=head_dim, SPLITS=8, PADDED_SPLITS=8), num_warps=4)


def small_variants() -> Iterator[dict[str, Any]]:
    types = {"out": "*bf16", "x": "*bf16", "residual": "*bf16", "weight": "*bf16", "eps": "fp32", "x_stride_row": "i32",
             "x_stride_head": "i32", "heads": "i32"}
    for width, heads in ((576, False), (4096, False), (128, True)):
        constants = dict(N=width, PADDED=triton.next_power_of_2(width), ADD=not heads, PER_HEAD=heads)
        yield measure(f"decode rms_norm of {width}", norm._rms_norm, types, constants, num_warps=norm.warps_for(width))
    types_of_silu = {"out": "*bf16", "x": "*bf16", "size": "i32"}
    yield measure("decode silu_and_mul", activation._silu_and_mul, types_of_silu, dict(BLOCK=1024), num_warps=4)
    types = {"out": "*bf16", "x": "*bf16", "cos": "*bf16", "sin": "*bf16", "x_stride_row": "i32", "x_stride_head": "i32", "heads": "i32"}
    yield measure("decode apply_rope", rope._apply_rope, types, dict(D=128, PADDED=128), num_warps=1)
    types = {"cache_k": "*bf16", "cache_v": "*bf16", "k": "*bf16", "v": "*bf16", "slots": "*i64", "k_stride": "i32", "v_stride": "i32"}
    yield measure("decode write_kv", kv_cache._write_kv, types, dict(SIZE=1024, PADDED=1024), num_warps=4)


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
    for row in (*attention_variants(), *small_variants(), *sampling_variants()):
        print(json.dumps(row), flush=True)
