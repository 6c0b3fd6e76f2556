"""Compiles every Triton kernel and prints one JSON line per variant: shared memory, registers, bytes of spills. No GPU is needed.

    TRITON_INTERPRET=0 python -m tests.kernels.compile_kernels [89 | 90]      sm_89 is the RTX 4060, sm_90 the H200

test_triton_sm89.py runs it in its own process, because a process either interprets kernels or compiles them.
"""
from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minivllm.kernels import tuning
from minivllm.kernels.triton import activation, drafts, grouped, linear, lora, moe, norm, packed_weight, sampling
from minivllm.kernels.triton.attention_tile import Cache, Projection
from minivllm.kernels.triton.decode_attention import DecodeShape, Parts, _decode_attention, _shared_attention
from minivllm.kernels.triton.gathered_prompts import _gather_keys
from minivllm.kernels.triton.packed_row import packed_matvec
from minivllm.kernels.triton.prompt_attention import _position_and_store, _prompt_attention

ARCH = int(sys.argv[1]) if len(sys.argv) > 1 else 89
PDL = ARCH >= 90
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def measure(name: str, fn: Any, types: Mapping[str, Any], constants: Mapping[str, Any], *, source: type[ASTSource] = ASTSource,
            arch: int = ARCH, **options: int) -> dict[str, Any]:
    """types: argument -> its Triton type, or a named tuple of them. Pointers and strides are multiples of 16, as in real models."""
    signature = {arg: types.get(arg, "constexpr") for arg in fn.arg_names}
    aligned = []
    for i, (arg, kind) in enumerate(signature.items()):
        fields = [((i,), arg, kind)] if isinstance(kind, str) else [((i, j), *field) for j, field in enumerate(kind._asdict().items())]
        aligned += [path for path, field, kind in fields if kind.startswith("*") or "stride" in field]
    kernel = triton.compile(
        source(fn=fn, signature=signature, constexprs={(fn.arg_names.index(key),): value for key, value in constants.items()},
               attrs={path: [["tt.divisibility", 16]] for path in aligned}),
        target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([str(CUOBJDUMP), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]  # no kernel has local arrays: its stack holds spilled registers
    return {"kernel": name, "shared": kernel.metadata.shared, "registers": int(registers), "spills": int(stack)}


def attention_variants() -> Iterator[dict[str, Any]]:
    projection = Projection(qkv="*bf16", stride="i32", norm_weight="*bf16", eps="fp32", cos="*bf16", sin="*bf16", slopes="*fp32",
                            sinks="*fp32")
    numbers = dict(scale="fp32", softcap="fp32",
                   **dict.fromkeys(("num_seqs", "num_tokens", "num_parts", "table_stride", "splits", "shared_parts", "first"), "i32"))
    tensors = dict(out="*bf16", qk="*bf16", cache_k="*bf16", cache_v="*bf16", slots="*i64", seq_lens="*i32")
    dense = Cache(k="*bf16", v="*bf16", v_pairs="*bf16", scales="*bf16", scale_pairs="*bf16", block_table="*i32")
    codes = Cache(k="*i8", v="*i8", v_pairs="*i16", scales="*bf16", scale_pairs="*i32", block_table="*i32")
    types: dict[str, Any] = dict(parts=Parts(mean="*fp32", log_weight="*fp32", finished="*i32", shared_keys="*i32"),
                                 projection=projection, cache=dense, **numbers, **tensors)
    prompt = {**types, **dict.fromkeys(("q", "k", "v"), "*bf16"), "query_start": "*i32", "slopes": "*fp32", "sinks": "*fp32",
              **dict.fromkeys(
        ("first_seq", "num_tiles", "q_stride", "k_stride", "v_stride", "k_column", "v_column"), "i32")}
    shapes = ((2, ((1, 0), (2, 0))), (3, ((1, 0), (5, 1000))), (8, ((8, 0),)))  # heads per KV head, (query width, window)
    few = ((2, ((1, 0), (2, 0))),)
    yield from other_heads(types, prompt)
    for head_dim, kv, variants in ((64, "bf16", shapes), (128, "bf16", shapes), (128, "fp8", few), (64, "int8", few)):
        quantized, size = kv != "bf16", 2 if kv == "bf16" else 1
        types, prompt = ({**t, "cache": codes if quantized else dense} for t in (types, prompt))
        for group, widths in variants:
            name = f"attention, head_dim {head_dim}, {group} heads per KV head, {kv} KV cache"
            shape = DecodeShape(
                num_heads=group * 8, heads_per_kv=group, head_dim=head_dim, padded_dim=head_dim, block_size=16, query_width=1, block_q=1,
                block_m=16, block_n=16, split=True, min_keys=tuning.MIN_KEYS_PER_SPLIT, shared=True,
                shared_multiple=tuning.SHARED_KEYS_MULTIPLE, window=0, softcap=False, norm=True, rope=True,
                quantized=quantized, fp8=kv == "fp8", native=quantized)
            tile: tuning.AttentionTile | None
            for width, window in widths:
                tile = tuning.wide_decode_tile(width, head_dim, group, size, ARCH)
                if width == 1:
                    tile = tuning.decode_tile(8, 4096, head_dim, group, size, ARCH)
                assert tile is not None
                one = shape._replace(query_width=width, block_m=tile.block_m, block_n=tile.block_n, window=window, shared=window == 0)
                yield measure(f"decode {name}, query width {width}", _decode_attention, types, dict(SHAPE=one, PDL=PDL),
                              num_warps=tile.num_warps, num_stages=tile.num_stages)
            if group == 8:
                continue
            tile = tuning.shared_tile(head_dim, group, size, ARCH)
            one = shape._replace(block_q=tile.block_q, block_m=tile.block_m, block_n=tile.block_n)
            yield measure(f"decode shared {name}", _shared_attention, types, dict(SHAPE=one, PDL=PDL),
                          num_warps=tile.num_warps, num_stages=tile.num_stages)
            tile = tuning.prompt_tile(head_dim, group, 2, ARCH)
            yield measure(f"prefill {name}", _prompt_attention, prompt,
                          dict(NUM_HEADS=group * 8, HEADS_PER_KV=group, D=head_dim, PADDED_D=head_dim, BLOCK_SIZE=16, BLOCK_Q=tile.block_q,
                               BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, WINDOW=0, SOFTCAP=False, DESCRIPTORS=False,
                               QUANTIZED=quantized, FP8=kv == "fp8"),
                          num_warps=tile.num_warps, num_stages=tile.num_stages)
        yield measure(f"decode position and store, head_dim {head_dim}, {kv} KV cache", _position_and_store, types,
                      dict(NUM_HEADS=16, KV_HEADS=8, D=head_dim, PADDED_D=head_dim, HEADS=512 // head_dim, NORM=True, ROPE=True,
                           QUANTIZED=quantized, FP8=kv == "fp8"),
                      num_warps=1)


def hopper_variants() -> Iterator[dict[str, Any]]:
    """The prompt attention in Gluon, which only Hopper can run, and the copy before it."""
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16

    from minivllm.kernels.triton.hopper_attention import BLOCK_N, _hopper_attention

    layout = NVMMASharedLayout.get_default_for([BLOCK_N.value, 128], bfloat16)
    numbers = ("first_head", "first_seq", "end_seq", "num_tiles", "q_stride", "k_column", "v_column", "table_stride", "stride")
    types = {**dict.fromkeys(("out", "q", "keys", "values"), "*bf16"), **dict.fromkeys(numbers, "i32"), "scale": "fp32",
             **dict.fromkeys(("query_start", "seq_lens", "key_start", "start"), "*i32"),
             **dict.fromkeys(("k", "v"), f"tensordesc<bf16[{BLOCK_N.value}, 128],{layout!r}>")}
    yield measure("Hopper prefill attention, head_dim 128", _hopper_attention, types, dict(NUM_HEADS=16, HEADS_PER_KV=2, D=128),
                  source=GluonASTSource, arch=90, num_warps=4)
    for dtype, cache in (("*bf16", "*bf16"), ("*bf16", "*i8")):
        types["cache"] = Cache(k=cache, v=cache, v_pairs=dtype, scales=dtype, scale_pairs=dtype, block_table="*i32")  # type: ignore[assignment]
        yield measure(f"Hopper gather, {cache}", _gather_keys, types,
                      dict(KV_HEADS=8, D=128, BLOCK_SIZE=16, TILE=tuning.GATHER_TILE, QUANTIZED=cache == "*i8", FP8=cache == "*i8"),
                      arch=90, num_warps=tuning.GATHER_WARPS)


def other_heads(types: dict[str, Any], prompt: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Heads of Gemma 2 with soft caps, padded ones of Phi-2, ALiBi, and the sinks of gpt-oss."""
    for head_dim, group, softcap, alibi, sinks in (
            (256, 2, True, False, False), (80, 1, False, False, False), (64, 1, False, True, False), (64, 8, False, False, True)):
        padded = tuning.next_power_of_2(head_dim)
        name = f"attention, head_dim {head_dim}, soft cap {softcap}, ALiBi {alibi}, sinks {sinks}"
        shape = DecodeShape(
            num_heads=group * 8, heads_per_kv=group, head_dim=head_dim, padded_dim=padded, block_size=16, query_width=1, block_q=1,
            block_m=16, block_n=16, split=True, min_keys=tuning.MIN_KEYS_PER_SPLIT, shared=True,
            shared_multiple=tuning.SHARED_KEYS_MULTIPLE, window=0, softcap=softcap, norm=False, rope=not alibi, alibi=alibi, sinks=sinks)
        tile = tuning.decode_tile(8, 4096, head_dim, group, 2, ARCH)
        yield measure(f"decode {name}", _decode_attention, types,
                      dict(SHAPE=shape._replace(block_m=tile.block_m, block_n=tile.block_n), PDL=PDL),
                      num_warps=tile.num_warps, num_stages=tile.num_stages)
        tile = tuning.shared_tile(head_dim, group, 2, ARCH)
        yield measure(f"decode shared {name}", _shared_attention, types,
                      dict(SHAPE=shape._replace(block_q=tile.block_q, block_m=tile.block_m, block_n=tile.block_n), PDL=PDL),
                      num_warps=tile.num_warps, num_stages=tile.num_stages)
        tile = tuning.prompt_tile(head_dim, group, 2, ARCH)
        yield measure(f"prefill {name}", _prompt_attention, prompt,
                      dict(NUM_HEADS=group * 8, HEADS_PER_KV=group, D=head_dim, PADDED_D=padded, BLOCK_SIZE=16, BLOCK_Q=tile.block_q,
                           BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, WINDOW=0, SOFTCAP=softcap, DESCRIPTORS=False, QUANTIZED=False,
                           FP8=False, ALIBI=alibi, SINKS=sinks),
                      num_warps=tile.num_warps, num_stages=tile.num_stages)


def linear_variants() -> Iterator[dict[str, Any]]:
    types = {**dict.fromkeys(("out", "x", "weight", "norm_weight", "bias", "residual"), "*bf16"), "eps": "fp32"}
    shapes = {"0.6B": (1024, 2048, 4096, 3072), "135M": (576, 576, 960, 1536), "7B": (4096, 4096, 6144, 14336)}
    for model, (hidden, heads, qkv, inner) in shapes.items():
        for layer, n, k, gated in (("qkv", qkv, hidden, False), ("o", hidden, heads, False), ("gate_up", inner, hidden, True),
                                   ("down", hidden, inner, False)):
            before = layer in ("qkv", "gate_up")
            flags = dict(N=n, K=k, NORM=before, GATED=gated, BIAS=False, ADD=not before, PDL=PDL)
            for rows in (1, tuning.LINEAR_TILE_ROWS):
                if not tuning.fuses(rows, n * k * (1 + gated), gated, 2):
                    continue
                tile = tuning.linear_tile(rows, n, k, gated, ARCH)
                blocks = dict(BLOCK_N=tile.block_n, BLOCK_K=tile.block_k)
                name = f"decode {layer} of {model}, {rows} rows"
                if rows == 1:
                    yield measure(name, linear._matvec, types, {**flags, **blocks}, num_warps=tile.num_warps)
                else:
                    yield measure(name, linear._few_rows, {**types, "rows": "i32"},
                                  {**flags, **blocks, "BLOCK_M": rows, "PARTS": min(tile.num_warps, tile.block_k // 16)},
                                  num_warps=tile.num_warps)


def few_variants() -> Iterator[dict[str, Any]]:
    """The kernels in Gluon for few decodes and few rows, which only Hopper and later GPUs run."""
    from triton.experimental.gluon._runtime import GluonASTSource

    from minivllm.kernels.triton import hopper_decode, hopper_linear

    projection = Projection(qkv="*bf16", stride="i32", norm_weight="*bf16", eps="fp32", cos="*bf16", sin="*bf16", slopes="*fp32",
                            sinks="*fp32")
    types: dict[str, Any] = dict(
        out="*bf16", parts=Parts(mean="*fp32", log_weight="*fp32", finished="*i32", shared_keys="*i32"), projection=projection,
        cache=Cache(k="*bf16", v="*bf16", v_pairs="*bf16", scales="*bf16", scale_pairs="*bf16", block_table="*i32"), slots="*i64",
        seq_lens="*i32", scale="fp32", **dict.fromkeys(("num_seqs", "table_stride", "splits", "min_keys"), "i32"))
    for warps, head_dim, group in ((4, 128, 2), (8, 128, 8), (4, 64, 4)):
        constants = dict(NUM_HEADS=8 * group, BLOCK_SIZE=16, NORM=True, PDL=True, **hopper_decode.constants(warps, head_dim, group))
        yield measure(f"Hopper few decodes, head_dim {head_dim}, {group} heads per KV head, {warps} warps", hopper_decode._hopper_decode,
                      types, constants, source=GluonASTSource, arch=90, num_warps=warps)
    types = {**dict.fromkeys(("out", "x", "weight", "norm_weight", "bias", "residual"), "*bf16"), "eps": "fp32", "rows": "i32"}
    for layer, rows, n, k, gated in (("qkv", 8, 4096, 1024, False), ("o", 16, 1024, 2048, False), ("gate_up", 16, 3072, 1024, True),
                                     ("down", 8, 1024, 3072, False), ("qkv", 8, 6144, 4096, False), ("down", 8, 4096, 14336, False)):
        tile, before = tuning.hopper_linear_tile(rows, n, k, gated, 2, 90), layer in ("qkv", "gate_up")
        assert tile is not None
        yield measure(f"Hopper {layer} of {n} x {k}, {rows} rows", hopper_linear._hopper_rows, types,
                      dict(N=n, K=k, BLOCK_M=rows, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, P=tile.num_warps, NORM=before, GATED=gated,
                           BIAS=False, ADD=not before, PDL=True), source=GluonASTSource, arch=90, num_warps=tile.num_warps)


def packed_formats() -> dict[str, tuple[packed_weight.Format, str]]:
    """Name -> (format, type of its scales)."""
    base = packed_weight.Format(n=0, k=0, inputs=0, bits=4, per_word=4, fp8=False, group=128, rows=1, zero=-1, mins=False, super_group=0,
                                half_scales=True, row_scale=False)
    q4_k = base._replace(group=32, zero=0, mins=True, super_group=256)
    return {
        "awq": (base, "*i32"), "q4_k": (q4_k, "*i16"), "q5_k": (q4_k._replace(bits=5), "*i16"),
        "q6_k": (base._replace(bits=6, group=16, zero=32, super_group=256), "*i8"),
        "q8_0": (base._replace(bits=8, per_word=2, group=32, zero=128), "*fp16"),
        "fp8": (base._replace(bits=8, per_word=2, fp8=True, zero=0, row_scale=True), "*fp32"),
    }


def packed_variants() -> Iterator[dict[str, Any]]:
    """Products with packed weights of a 7B model."""
    types: dict[str, Any] = {"eps": "fp32"}
    more = {"num_rows": "i32", "partial": "*fp32", "finished": "*i32"}
    formats = packed_formats()
    # The layers with the largest tiles, those that take the most registers, and float16.
    cases = (("awq", "o", 8, "bf16"), ("awq", "gate_up", 32, "bf16"), ("awq", "narrow gate_up", 32, "bf16"), ("q4_k", "gate_up", 8, "bf16"),
             ("q6_k", "gate_up", 8, "bf16"), ("fp8", "gate_up", 32, "bf16"), ("awq", "o", 8, "fp16"), ("q6_k", "gate_up", 8, "fp16"),
             ("fp8", "o", 8, "fp16"), ("awq", "o", 1, "bf16"), ("awq", "gate_up", 1, "bf16"), ("q4_k", "gate_up", 1, "bf16"),
             ("q5_k", "gate_up", 1, "bf16"), ("q6_k", "down", 1, "bf16"), ("q8_0", "gate_up", 1, "bf16"), ("fp8", "gate_up", 1, "bf16"),
             ("fp8", "down", 1, "fp16"))
    for name, layer, rows, dtype in cases:
        form, scales = formats[name]
        gated, k = layer.endswith("gate_up"), 14336 if layer == "down" else 4096
        n = {"gate_up": 28672, "narrow gate_up": 3072}.get(layer, 4096)
        types |= dict.fromkeys(("out", "x", "norm_weight", "bias", "residual"), f"*{dtype}")
        constants = dict(F=form._replace(n=n, k=k, inputs=k, group=16384 if form.row_scale else form.group), GATED=gated, BIAS=False,
                         NORM=gated and rows <= tuning.PACKED_NORM_ROWS, ADD=not gated, PDL=PDL, ASM=True)
        supers = "*i16" if form.super_group and not form.mins else "*i32"
        planes = packed_weight.Planes(words="*i16", high="*u8", scales=scales, supers=supers)  # type: ignore[arg-type]
        title, types = f"decode {layer} in {name}, {rows} rows, {dtype}", {**types, "p": planes}
        if rows == 1:
            outputs, words = tuning.packed_row_tile(n // 2 if gated else n, k, form.bits, form.super_group > 0, gated)
            yield measure(title, packed_matvec, types, {**constants, "R": outputs, "W": words}, num_warps=words // 256, num_stages=1)
            continue
        tile = tuning.packed_tile(rows, n // 2 if gated else n, k, form.bits, gated, ARCH)
        constants |= dict(M=tile.block_m, BN=tile.block_n, W=tile.words, SPLIT=tile.splits)
        yield measure(title, grouped._few_rows, {**types, **more}, constants, num_warps=tile.num_warps, num_stages=tile.num_stages)


def lora_variants() -> Iterator[dict[str, Any]]:
    """Adapters of a 0.6B model, in slots of rank 16 and 64."""
    tensors = ("out", "y", "x", "normed", "a", "b", "weight", "norm_weight", "bias", "residual", "h")
    rows: dict[str, Any] = {**dict.fromkeys(tensors, "*bf16"), **dict.fromkeys(("stride", "rows", "num_tokens"), "i32"), "words": "*i32",
                            "slots": "*i32", "ranks": "*i32", "eps": "fp32"}
    layers = (("qkv", 4096, 1024, 3, False, (2048, 3072)), ("gate_up", 6144, 1024, 2, True, (3072, 6144)),
              ("o", 1024, 2048, 1, False, (1024, 1024)), ("down", 1024, 3072, 1, False, (1024, 1024)))
    for layer, n, k, parts, gated, (end0, end1) in layers:
        one, many = tuning.linear_tile(1, n // (1 + gated), k, gated, ARCH), tuning.LORA_TILE
        (block_k, block_r), ends = tuning.lora_shrink_tile(k), dict(END0=end0, END1=end1)
        flags = dict(NORM=parts > 1, ADD=parts == 1, PDL=PDL)
        for rank in (16, 64):
            common = dict(K=k, R=rank, WIDTH=rank * parts, **flags, **ends)
            yield measure(f"decode {layer} with an adapter of rank {rank}", lora._one_row, rows,
                          dict(N=n // (1 + gated), BLOCK_N=one.block_n, BLOCK_K=one.block_k, BLOCK_A=block_k, COPIES=tuning.LORA_COPIES,
                               COPY=rank * parts, GATED=gated, BIAS=False, **common), num_warps=one.num_warps)
            blocks = -(-n // tuning.LORA_EXPAND_COLUMNS)
            yield measure(f"decode before {layer}, adapters of rank {rank}", lora._few_rows, rows,
                          dict(N=n, BLOCKS=blocks, BLOCK_N=tuning.LORA_EXPAND_COLUMNS, BLOCK_R=block_r, BLOCK_K=block_k, **common),
                          num_warps=tuning.LORA_WARPS)
        tokens = dict(R=64, WIDTH=64 * parts, BLOCK_M=many.block_m)
        yield measure(f"prefill shrink before {layer}", lora._shrink_tiles, rows, dict(K=k, BLOCK_K=many.block_k, **tokens),
                      num_warps=4, num_stages=2)
        yield measure(f"prefill expand before {layer}", lora._expand_tiles, rows,
                      dict(N=n, BLOCK_N=many.block_n, ADD=parts == 1, **ends, **tokens), num_warps=4, num_stages=2)


def expert_variants() -> Iterator[dict[str, Any]]:
    """The experts of Qwen3-30B-A3B (128, of which 8 compute a token), and of gpt-oss, with biases."""
    types = {**dict.fromkeys(("out", "x", "weight", "bias"), "*bf16"), **dict.fromkeys(("order", "starts", "ids"), "*i32"), "pairs": "i32"}
    for model, hidden, inner, experts, top, clamp in (
            ("Qwen3-30B-A3B", 2048, 768, 128, 8, False), ("gpt-oss", 2880, 2880, 32, 4, True)):
        for tokens in (1, 4096, 32 if top == 8 else 256):
            tile = tuning.moe_tile(tokens * top, experts, 2, ARCH)
            for layer, n, k, gated in (("gate_up", inner, hidden, True), ("down", hidden, inner, False)):
                yield measure(f"{'decode' if tile.block_m == 16 else 'prefill'} {layer} of {model}'s experts, {tokens} tokens",
                              moe._expert_product, types,
                              dict(N=n, K=k, E=experts, PADDED_E=experts, TOP=top if gated else 1, GATED=gated, BIAS=clamp, CLAMP=clamp,
                                   ALPHA=1.702, LIMIT=7.0, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k),
                              num_warps=tile.num_warps, num_stages=tile.num_stages)
        yield measure(f"decode pairs of {model}", moe._group_pairs, types, dict(E=experts, BLOCK=tuning.MOE_PAIRS_AT_ONCE), num_warps=4)
        yield measure(f"decode sum of {model}'s experts", moe._combine,
                      {**dict.fromkeys(("out", "residual", "outputs"), "*bf16"), "weights": "*fp32", "size": "i32"},
                      dict(TOP=top, BLOCK=1024), num_warps=4)


def small_variants() -> Iterator[dict[str, Any]]:
    types = {"out": "*bf16", "x": "*bf16", "weight": "*bf16", "eps": "fp32"}
    for width in (576, 1024, 4096):
        constants = dict(N=width, PADDED=triton.next_power_of_2(width), PDL=PDL)
        yield measure(f"decode rms_norm of {width}", norm._rms_norm, types, constants, num_warps=tuning.norm_warps(width))
    for name, gelu in (("silu_and_mul", False), ("gelu_tanh_and_mul", True)):
        yield measure(f"decode {name}", activation._act_and_mul, {"out": "*bf16", "x": "*bf16", "size": "i32"},
                      dict(GELU=gelu, BLOCK=1024, PDL=PDL), num_warps=4)


def sampling_variants() -> Iterator[dict[str, Any]]:
    rows = {"row_stride": "i32", "size": "i32", "temperature": "*fp32", "threshold": "*fp32"}
    chunks = {"peaks": "*fp32", "costs": "*fp32", "tokens": "*i32", "temperature": "*fp32"}
    for dtype, kind in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        types = {**rows, "logits": kind, "top_k": "*i32", "top_p": "*fp32", "min_p": "*fp32"}
        for filters in ("TOP_K", "TOP_P", "MIN_P", "TOP_K TOP_P MIN_P"):
            constants = dict(TOP_K="TOP_K" in filters, TOP_P="TOP_P" in filters, MIN_P="MIN_P" in filters,
                             SHIFT=sampling.KEY_SHIFT[dtype], POSITIONS=tuning.THRESHOLD_POSITIONS)
            yield measure(f"decode sampling threshold {filters}, {kind}", sampling._thresholds, types, constants,
                          num_warps=tuning.THRESHOLD_WARPS)
        for filtered in (False, True):
            yield measure(f"decode sampling chunks, {kind}", sampling._sample_chunks, {**rows, **chunks, "logits": kind, "keys": "*i32"},
                          dict(FILTERED=filtered, CHUNK=tuning.SAMPLER_CHUNK), num_warps=tuning.SAMPLER_WARPS)
    yield measure("decode sampling combine", sampling._combine_chunks, {**chunks, "out": "*i64"}, dict(CHUNKS=75, PADDED=128), num_warps=1)


def draft_variants() -> Iterator[dict[str, Any]]:
    """Verification of 5 drafts, two KV groups."""
    sizes = dict.fromkeys(
        ("stride", "group_stride", "table_stride", "num_tokens", "num_seqs", "num_places", "null_index", "max_model_len", "total", "most"),
        "i32")
    tokens = dict.fromkeys(("text", "tables", "tokens", "seq_lens", "planned_lens", "keys", "before", "table"), "*i32")
    types: dict[str, Any] = {**sizes, **tokens, "is_token": "*u8", "has_draft": "*u8"}
    kernels: tuple[tuple[Any, dict[str, Any], int], ...] = (
        (drafts._exact_step, dict(GROUPS=2, BLOCK_SIZE=16, EVERY_TOKEN=True, BLOCK=drafts.BLOCK, **drafts.NOISE), 4),
        (drafts._accept_drafts, dict(WIDTH=6, PADDED=8), 1), (drafts._proposer_inputs, dict(BLOCK=drafts.BLOCK), 4),
        (drafts._single_tokens, dict(BLOCK_SIZE=16, BLOCK=drafts.BLOCK), 4), (drafts._write_drafts, dict(COUNT=5, PADDED=8), 1),
        (drafts._find_ngrams, dict(LOW=2, HIGH=4, COUNT=5, PADDED=8, CANDIDATES=drafts.CANDIDATES, BLOCK=tuning.NGRAM_BLOCK),
         tuning.NGRAM_WARPS))
    for kernel, constants, warps in kernels:
        positions = {name: "*i64" for name in kernel.arg_names if name.islower()}
        yield measure(f"decode drafts {kernel.__name__}", kernel, {**positions, **types}, constants, num_warps=warps)


if __name__ == "__main__":
    for row in (*attention_variants(), *hopper_variants(), *linear_variants(), *few_variants(), *packed_variants(), *lora_variants(),
                *expert_variants(), *small_variants(), *sampling_variants(), *draft_variants()):
        print(json.dumps(row), flush=True)
