"""The kernels of a CPU beside alternatives that were not chosen, at SmolLM2-135M's sizes.

"numba" are the compiled kernels that minivllm uses. The others are PyTorch's: "as is" is the reference, the rest are alternatives.

    OMP_NUM_THREADS=2 python -m bench.cpu_kernels [--dtype bfloat16]

Alternatives run in turns, so that a change of the machine's speed affects all of them. Figures are medians in ms, for all layers.
"""
from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import machine
from minivllm.kernels import tuning
from minivllm.kernels.grouped import GroupedWeight
from minivllm.kernels.layout import InputBatch, KVLayer
from minivllm.kernels.reference import activation, linear, norm, rope
from minivllm.kernels.reference import attention as paged

try:
    from minivllm.kernels import numba
except ImportError:
    numba = None

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 30, 576, 9, 3, 64, 49152
SHAPES = [(960, HIDDEN), (HIDDEN, HIDDEN), (3072, HIDDEN), (HIDDEN, 1536)]  # of one layer: qkv, o, gate_up, down
Variants = dict[str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append")
    args = parser.parse_args()
    threads = int(os.environ.get("OMP_NUM_THREADS", "2"))
    torch.set_num_threads(threads)
    print(machine.one_line(machine.describe("cpu", threads)))
    with torch.inference_mode():
        for name in args.dtype or ("float32", "bfloat16"):
            dtype = getattr(torch, name)
            linears(dtype)
            packed_linears(dtype)
            decodes(dtype)
            gathers(dtype)
            norms(dtype)
            gates(dtype)


def show(what: str, variants: Variants, rounds: int = 15, sizes: Mapping[str, float] = MappingProxyType({})) -> None:
    """sizes: bytes that a variant reads, for GB/s."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds + 2):
        for name, f in variants.items():
            start = time.perf_counter()
            f()
            if i >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    middle = {name: statistics.median(t) for name, t in times.items()}
    speeds = {name: f" ({sizes[name] / ms / 1e6:.1f} GB/s)" if name in sizes else "" for name, ms in middle.items()}
    print(f"{what:<54}" + "   ".join(f"{name} {ms:.2f}{speeds[name]}" for name, ms in middle.items()), flush=True)


def linears(dtype: torch.dtype) -> None:
    """All products of one forward pass, in the model's order, so that weights come from memory and not from a cache."""
    weights = [torch.randn(n, k).to(dtype) for _ in range(LAYERS) for n, k in SHAPES] + [torch.randn(VOCAB, HIDDEN).to(dtype)]
    product = torch.ops.mkldnn._linear_pointwise
    packed: dict[str, list[Tensor]] = {}
    for rows in (1, 32):
        try:
            packed[f"packed for {rows}"] = [torch.ops.mkldnn._reorder_linear_weight(w, rows) for w in weights]
        except RuntimeError as error:
            print(f"{dtype}: weights cannot be packed here ({str(error).splitlines()[0]})")
    for rows in (1, 8, 32, 1024):
        x = {k: torch.randn(rows, k).to(dtype) for k in (HIDDEN, 1536)}
        part = slice(None) if rows < 1024 else slice(-1)  # a prompt needs logits of its last token only
        variants: Variants = {"plain [N, K]": lambda x=x, part=part: [F.linear(x[w.shape[1]], w) for w in weights[part]]}
        for name, ws in packed.items():
            variants[name] = lambda x=x, ws=ws, part=part: [product(x[w.shape[1]], w, None, "none", [], "") for w in ws[part]]
        show(f"{dtype} products, {rows} rows", variants, 15 if rows < 1024 else 2)


def packed_linears(dtype: torch.dtype) -> None:
    """The same products with 4-bit weights (GGUF's Q4_1, the head in Q8_0). "direct": from the codes; "parts": dequantized part by part."""
    if numba is None:
        return
    generator = torch.Generator().manual_seed(0)
    shapes = SHAPES * LAYERS
    packed = [numba.grouped.pack_groups(quantized(n, k, 4, generator)) for n, k in shapes]
    packed.append(numba.grouped.pack_groups(quantized(VOCAB, HIDDEN, 8, generator)))
    dense = [linear.pack_weight(torch.randn(n, k), dtype) for n, k in [*shapes, (VOCAB, HIDDEN)]]
    sizes = {name: sum(n * k for n, k in shapes) * bits / 8 + VOCAB * HIDDEN * head_bits / 8
             for name, bits, head_bits in (("direct", 5, 8.5), ("parts", 5, 8.5), ("dense", 8 * dtype.itemsize, 8 * dtype.itemsize))}
    direct, parts = numba.grouped._product, numba.grouped._dense_product
    for rows in (1, 4, 8, 16, 32, 64, 128, 256, 1024):
        x = {k: torch.randn(rows, k).to(dtype) for k in (HIDDEN, 1536)}
        part = slice(None) if rows < 1024 else slice(-1)
        show(f"{dtype} products with packed weights, {rows} rows", {
            **({"direct": lambda x=x: [direct(x[p.shape[1]], p, None, None, None) for p in packed]} if rows < 1024 else {}),
            "parts": lambda x=x, part=part: [parts(x[p.shape[1]], p, None) for p in packed[part]],
            "dense": lambda x=x, part=part: [linear.linear(x[w.shape[1]], w) for w in dense[part]],
        }, 15 if rows < 1024 else 2, sizes if rows < 1024 else {})


def quantized(n: int, k: int, bits: int, generator: torch.Generator) -> GroupedWeight:
    """A weight of random codes in groups of 32: 4 bits with mins, or 8 bits."""
    return GroupedWeight(
        codes=torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=generator), bits=bits, zeros=0 if bits == 4 else 128,
        scales=torch.rand(n, k // 32, generator=generator).half(), mins=torch.rand(n, k // 32).half() if bits == 4 else None)


def decodes(dtype: torch.dtype) -> None:
    """Self-attention of one decode step: PyTorch's with batches of several sizes ("one": a single padded batch), and Numba's.

    `prepare_attention` is timed as "meta"."""
    lengths = {"1 x 192 keys": [192], "32 x 160 keys": [160] * 32}
    for n in (4, 18, 32):
        lengths[f"{n} of 60..350 keys"] = [350 - 290 * i // (n - 1) for i in range(n)]
    for what, lens in lengths.items():
        batch, layers = case(lens, dtype)
        slots = batch.block_tables[0][torch.arange(len(lens)), batch.positions // 16].long() * 16 + batch.positions % 16
        qkv = torch.randn(len(lens), (HEADS + 2 * KV_HEADS) * HEAD_DIM).to(dtype)
        angles = rope.rope_angles(batch.positions, torch.rand(HEAD_DIM // 2), 1.0, dtype)
        variants: Variants = {}
        usual = tuning.GATHER_BYTES["cpu"], tuning.FREE_PADDING["cpu"]
        for name, limits in {"as is": usual, "1 MiB": (1 << 20, usual[1]), "4 MiB": (1 << 22, usual[1]), "pad 128": (usual[0], 128),
                             "pad 512": (usual[0], 512), "one": (1 << 40, 1 << 40)}.items():
            tuning.GATHER_BYTES["cpu"], tuning.FREE_PADDING["cpu"] = limits
            meta = prepared(batch, dtype)
            variants[name] = lambda meta=meta, qkv=qkv, slots=slots, angles=angles, layers=layers: [
                paged.self_attention(qkv, kv, slots, meta, scale=0.125, rope=angles) for kv in layers]
        tuning.GATHER_BYTES["cpu"], tuning.FREE_PADDING["cpu"] = usual
        variants["meta"] = lambda batch=batch: prepared(batch, dtype)
        if numba is not None:
            compiled = prepared(batch, dtype, numba.attention)
            variants["numba"] = lambda meta=compiled, qkv=qkv, slots=slots, angles=angles, layers=layers: [
                numba.attention.self_attention(qkv, kv, slots, meta, scale=0.125, rope=angles) for kv in layers]
            variants["numba's meta"] = lambda batch=batch: prepared(batch, dtype, numba.attention)
        show(f"{dtype} self-attention, {what}", variants)


def prepared(batch: InputBatch, dtype: torch.dtype, backend: Any = paged) -> Any:
    return backend.prepare_attention(batch, 0, block_size=16, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, window=None,
                                  dtype=dtype)


def gathers(dtype: torch.dtype) -> None:
    """Gather the keys of 8 sequences: slot by slot, or page by page with zeros for the ends of the last pages."""
    n, keys, width = 8, 208, KV_HEADS * HEAD_DIM
    _, layers = case([keys] * n, dtype)
    pages = torch.randperm(n * keys // 16) + 1
    slots = (pages[:, None] * 16 + torch.arange(16)).flatten()
    ends = (torch.arange(n)[:, None] * keys + torch.arange(keys - 8, keys)).flatten()
    rows = torch.empty(n * keys, width, dtype=dtype)
    in_pages, wide = rows.view(len(pages), -1), paged._widest(rows)

    def by_page() -> None:
        for kv in layers:
            torch.index_select(kv.k.view(-1, 16 * width), 0, pages, out=in_pages)
            wide.index_fill_(0, ends, 0)

    show(f"{dtype} gather {n} x {keys} keys", {
        "slots": lambda: [torch.index_select(kv.k.view(-1, width), 0, slots, out=rows) for kv in layers], "pages": by_page})


def case(lens: list[int], dtype: torch.dtype) -> tuple[InputBatch, list[KVLayer]]:
    """Decodes of these lengths over scattered blocks of 16."""
    counts = [-(-n // 16) for n in lens]
    blocks = (torch.randperm(sum(counts)) + 1).int()
    table = torch.zeros(len(lens), max(counts), dtype=torch.int32)
    for row, some in zip(table, blocks.split(counts), strict=True):
        row[: len(some)] = some
    ends, none = torch.tensor(lens), torch.zeros(0, dtype=torch.int64)
    batch = InputBatch(
        tokens=ends.int(), positions=ends - 1, query_start=torch.arange(len(lens) + 1).int(), seq_lens=ends.int(), slots=(none,),
        block_tables=(table,), logit_rows=none, num_decodes=len(lens), query_lens_host=(1,) * len(lens), seq_lens_host=tuple(lens),
    )
    shape = (sum(counts) + 1, 16, KV_HEADS, HEAD_DIM)
    return batch, [KVLayer(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for _ in range(LAYERS)]


def norms(dtype: torch.dtype) -> None:
    weight = torch.randn(HIDDEN).to(dtype)
    for rows in (1, 4, 18, 32, 1024):
        x = torch.randn(rows, HIDDEN).to(dtype)
        ways = {
            "F.rms_norm": lambda x: F.rms_norm(x, (HIDDEN,), weight, 1e-5),
            "as is": lambda x: norm.rms_norm(x, weight, 1e-5),
            # [x, -x] has mean 0 and variance mean(x^2): one fused kernel, but twice the data
            "as layer norm": lambda x: F.layer_norm(torch.cat((x, -x), -1), (2 * HIDDEN,), None, None, 1e-5)[..., :HIDDEN] * weight,
        }
        if numba is not None:
            ways["numba"] = lambda x: numba.rows.rms_norm(x, weight, 1e-5)
        show(f"{dtype} RMSNorm, {rows} rows", {name: lambda f=f, x=x: [f(x) for _ in range(2 * LAYERS)] for name, f in ways.items()})


def gates(dtype: torch.dtype) -> None:
    for rows in (1, 4, 18, 32, 256):
        x = torch.randn(rows, 3072).to(dtype)
        ways = {"as is": activation.silu_and_mul}
        if numba is not None:
            ways["numba"] = numba.rows.silu_and_mul
        show(f"{dtype} middle of a gated MLP, {rows} rows",
             {name: lambda f=f, x=x: [f(x) for _ in range(LAYERS)] for name, f in ways.items()})


if __name__ == "__main__":
    main()
