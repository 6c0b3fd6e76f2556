"""Why the PyTorch kernels do on a CPU what they do: each choice beside what was not chosen, at SmolLM2-135M's sizes.

    OMP_NUM_THREADS=2 python -m bench.cpu_kernels [--dtype bfloat16]

Alternatives take turns, so that a machine that slows down slows all of them; figures are medians in ms for all layers.
"""
from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import machine
from minivllm.kernels.layout import InputBatch, KVLayer
from minivllm.kernels.reference import attention as paged
from minivllm.kernels.reference import norm

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
            decodes(dtype)
            norms(dtype)


def show(what: str, variants: Variants, rounds: int = 15) -> None:
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds + 2):
        for name, f in variants.items():
            start = time.perf_counter()
            f()
            if i >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    print(f"{what:<54}" + "   ".join(f"{name} {statistics.median(t):.2f}" for name, t in times.items()), flush=True)


def linears(dtype: torch.dtype) -> None:
    """All products of one forward pass, in the model's order: weights come from memory, not from a cache."""
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
        part = slice(None) if rows < 1024 else slice(-1)  # a prompt's logits are not asked for
        variants: Variants = {"plain [N, K]": lambda x=x, part=part: [F.linear(x[w.shape[1]], w) for w in weights[part]]}
        for name, ws in packed.items():
            variants[name] = lambda x=x, ws=ws, part=part: [product(x[w.shape[1]], w, None, "none", [], "") for w in ws[part]]
        show(f"{dtype} products, {rows} rows", variants, 15 if rows < 1024 else 2)


def decodes(dtype: torch.dtype) -> None:
    """Attention of one decode step with batches of several sizes; "one" is a single padded batch."""
    for what, lens in (("32 x 160 keys", [160] * 32), ("16 of 60..300 keys", [300 - 16 * i for i in range(16)]), ("1 x 192 keys", [192])):
        batch, layers = case(lens, dtype)
        variants: Variants = {}
        for name, size in (("0.5 MiB", 1 << 19), ("1.25 MiB", 5 << 18), ("4 MiB", 1 << 22), ("one", 1 << 40)):
            paged.GATHER_BYTES["cpu"], paged.FREE_PADDING["cpu"] = size, 400 if name != "one" else 1 << 40
            meta = paged.prepare_attention(batch, 0, block_size=16, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM,
                                           window=None, dtype=dtype)
            q = torch.randn(len(lens), HEADS, HEAD_DIM).to(dtype)
            variants[name] = lambda meta=meta, q=q, layers=layers: [paged.attention(q, kv, meta, scale=0.125) for kv in layers]
        show(f"{dtype} decode attention, {what}", variants)


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
    for rows in (1, 32, 1024):
        x = torch.randn(rows, HIDDEN).to(dtype)
        ways = {
            "F.rms_norm": lambda x: F.rms_norm(x, (HIDDEN,), weight, 1e-5),
            "step by step": lambda x: norm._step_by_step(x, weight, 1e-5),
            "as layer norm": lambda x: norm._by_layer_norm(x, weight, 1e-5),
        }
        show(f"{dtype} RMSNorm, {rows} rows", {name: lambda f=f, x=x: [f(x) for _ in range(2 * LAYERS)] for name, f in ways.items()})


if __name__ == "__main__":
    main()
