"""Lesson 9: the attention kernel of a decode, in Triton, in four steps: to read each key once, in large pieces, by enough programs.

Without a GPU, Triton's interpreter runs the kernels as Python: slowly, but with the same results. On a GPU the lesson also measures the
share of the memory's bandwidth that each step reaches.
"""
import math
import os
from dataclasses import dataclass

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def attend(q, k, v, tables, lengths, mean, log_weight, max_blocks, scale, num_heads, kv_heads,
           HEADS_PER_KV: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """One program: ROWS query heads of one sequence, which share one key head, and one part of its keys.

    q [sequences, num_heads, DIM]; k, v [blocks, BLOCK, kv_heads, DIM]; tables [sequences, max_blocks]
    -> mean [parts, sequences, num_heads, DIM] and log_weight [parts, sequences, num_heads]: the part's result, and the log of its weight
    """
    sequence, part = tl.program_id(0), tl.program_id(2)
    heads = tl.program_id(1) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    kv_head = tl.program_id(1) * ROWS // HEADS_PER_KV
    dims = tl.arange(0, DIM)
    row = sequence * num_heads + heads
    query = tl.load(q + row[:, None] * DIM + dims[None, :])  # [ROWS, DIM]

    length = tl.load(lengths + sequence)
    share = tl.cdiv(tl.cdiv(length, TILE), tl.num_programs(2)) * TILE  # keys of each part: whole tiles
    best = tl.full([ROWS], -math.inf, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(part * share, min(part * share + share, length), TILE):
        positions = start + tl.arange(0, TILE)
        # TASK 1: keys and values [TILE, DIM] of these positions, through the block table. 0.0 for positions that are not below `length`
        live = positions < length
        block = tl.load(tables + sequence * max_blocks + positions // BLOCK, mask=live, other=0)
        slot = (block * BLOCK + positions % BLOCK).to(tl.int64)  # a cache may have more than 2^31 numbers
        address = (slot * kv_heads + kv_head)[:, None] * DIM + dims[None, :]
        keys = tl.load(k + address, mask=live[:, None], other=0.0)
        values = tl.load(v + address, mask=live[:, None], other=0.0)
        # END
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale  # [ROWS, TILE]
        # TASK 2: the online softmax of lesson 3. Positions that are not below `length` have no weight
        scores = tl.where((positions < length)[None, :], scores, -math.inf)
        new_best = tl.maximum(best, tl.max(scores, 1))
        shrink = tl.exp(best - new_best)
        weights = tl.exp(scores - new_best[:, None])  # [ROWS, TILE]
        total = total * shrink + tl.sum(weights, 1)
        weighted = weighted * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        best = new_best
        # END
    row += part * tl.num_programs(0) * num_heads
    used = total > 0.0  # a part without keys has no mean
    tl.store(mean + row[:, None] * DIM + dims[None, :], weighted / tl.where(used, total, 1.0)[:, None])
    tl.store(log_weight + row, tl.where(used, best + tl.log(tl.where(used, total, 1.0)), -math.inf))


@triton.jit
def merge(mean, log_weight, out, num_rows, DIM: tl.constexpr, PARTS: tl.constexpr):
    """One program: the parts of one head of one sequence -> out [sequences, num_heads, DIM]."""
    row, parts, dims = tl.program_id(0), tl.arange(0, PARTS), tl.arange(0, DIM)
    # TASK 3: the mean of the parts' means, weighted with exp(log_weight)
    logs = tl.load(log_weight + parts * num_rows + row)  # [PARTS]
    weights = tl.exp(logs - tl.max(logs, 0))
    means = tl.load(mean + (parts * num_rows + row)[:, None] * DIM + dims[None, :])  # [PARTS, DIM]
    result = tl.sum(means * weights[:, None], 0) / tl.sum(weights, 0)
    # END
    tl.store(out + row * DIM + dims, result)


@dataclass(frozen=True)
class Launch:
    """How the work is divided. All three are powers of two."""

    rows: int  # query heads of a program
    tile: int  # keys that a program loads at a time
    parts: int  # programs that share the keys of a sequence


def paged_attention(q: Tensor, k: Tensor, v: Tensor, tables: Tensor, lengths: Tensor, launch: Launch) -> Tensor:
    """q [sequences, heads, dim] with keys and values in blocks [blocks, block size, kv heads, dim] -> the shape of q."""
    (sequences, heads, dim), (_, block_size, kv_heads, _) = q.shape, k.shape
    mean = torch.empty(launch.parts, sequences, heads, dim, device=q.device)
    log_weight, out = torch.empty(launch.parts, sequences, heads, device=q.device), torch.empty_like(q)
    attend[(sequences, heads // launch.rows, launch.parts)](
        q, k, v, tables, lengths, mean, log_weight, tables.shape[1], dim**-0.5, heads, kv_heads,
        HEADS_PER_KV=heads // kv_heads, ROWS=launch.rows, DIM=dim, BLOCK=block_size, TILE=launch.tile)
    merge[(sequences * heads,)](mean, log_weight, out, sequences * heads, DIM=dim, PARTS=launch.parts)
    return out


def choose(sequences: int, heads: int, kv_heads: int, longest: int, processors: int) -> Launch:
    """Enough programs for every processor, but parts of at least 256 keys."""
    parts = 1
    while sequences * kv_heads * parts < 2 * processors and longest / (2 * parts) >= 256:
        parts *= 2
    return Launch(rows=heads // kv_heads, tile=64, parts=parts)


def estimate_us(launch: Launch, sequences: int, heads: int, dim: int, length: int, processors: int = 132) -> float:
    """A rough model of an H200 with 2-byte numbers: 4,800 GB/s, 0.8 us until a tile arrives, 4 programs at a time on each processor, and
    0.5 us for each further part that must be merged. Keys that several programs read count several times."""
    programs = sequences * (heads // launch.rows) * launch.parts
    keys = math.ceil(length / launch.parts)  # of a program
    reading = programs * keys * dim * 2 * 2 / 4.8e6
    waiting = math.ceil(programs / (4 * processors)) * math.ceil(keys / launch.tile) * 0.8
    return max(reading, waiting) + 0.5 * (launch.parts - 1)


def example(sequences: int, heads: int, kv_heads: int, dim: int, longest: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v, tables, lengths: scattered blocks of 16, and lengths between half of `longest` and all of it."""
    dice, blocks = torch.Generator().manual_seed(0), math.ceil(longest / 16)
    q = torch.randn(sequences, heads, dim, generator=dice)
    tables = torch.randperm(sequences * blocks, generator=dice).view(sequences, blocks).int()
    lengths = torch.randint(longest // 2, longest + 1, (sequences,), generator=dice).int()
    k, v = (torch.randn(sequences * blocks, 16, kv_heads, dim, device=device, dtype=dtype) for _ in range(2))
    return q.to(device, dtype), k, v, tables.to(device), lengths.to(device)


def plain(q: Tensor, k: Tensor, v: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
    """PyTorch: gather each sequence's keys and values, then the textbook."""
    out = []
    for query, table, length in zip(q, tables, lengths.tolist(), strict=True):
        keys, values = (x[table.long()].flatten(0, 1)[:length].repeat_interleave(q.shape[1] // k.shape[2], 1) for x in (k, v))
        weights = (torch.einsum("hd,nhd->hn", query, keys) * q.shape[2] ** -0.5).softmax(-1)  # h heads, d dim, n keys
        out.append(torch.einsum("hn,nhd->hd", weights, values))
    return torch.stack(out)


def main() -> None:
    torch.set_num_threads(1)
    gpu = torch.cuda.is_available()
    heads, kv_heads, dim = 8, 2, 64
    steps = (("1: a program per query head", Launch(1, 16, 1)), ("2: heads that share keys together", Launch(4, 16, 1)),
             ("3: tiles of 64 keys", Launch(4, 64, 1)), ("4: 8 programs per sequence", Launch(4, 64, 8)))
    q, k, v, tables, lengths = example(2, heads, kv_heads, dim, 200, "cuda" if gpu else "cpu", torch.float32)
    expected, tokens = plain(q, k, v, tables, lengths), int(lengths.sum())
    print(f"2 sequences of {lengths.tolist()} tokens, {heads} query heads, {kv_heads} key heads of {dim} numbers, blocks of 16")
    print("                                      programs   keys and values read   tiles one after another   estimate, 8 x 16,384 keys")
    for name, launch in steps:
        assert torch.allclose(paged_attention(q, k, v, tables, lengths, launch), expected, atol=1e-4), name
        read = tokens * kv_heads * dim * 2 * 2 * (4 // launch.rows) / 2**10
        print(f"  {name:35s}  {2 * heads // launch.rows * launch.parts:8d}  {read:17,.0f} KiB"
              f"  {math.ceil(max(lengths.tolist()) / launch.parts / launch.tile):24d}"
              f"  {estimate_us(launch, 8, 32, 128, 16384):22.0f} us")
    print("all four give the numbers of PyTorch")
    if not gpu:
        print("without a GPU there is nothing to measure: the estimate is a model of an H200")
        return
    q, k, v, tables, lengths = example(8, 32, 8, 128, 16384, "cuda", torch.bfloat16)
    num_bytes, target = int(lengths.sum()) * 8 * 128 * 2 * 2, torch.empty_like(k)
    copy = 2 * k.nbytes / triton.testing.do_bench(lambda: target.copy_(k)) / 1e6  # GB/s
    for name, launch in steps:
        ms = triton.testing.do_bench(lambda launch=launch: paged_attention(q, k, v, tables, lengths, launch))
        rate = num_bytes / ms / 1e6
        print(f"  {name:35s}  {ms * 1e3:8.0f} us  {rate:6.0f} GB/s  {rate / copy:6.1%} of a copy's bandwidth")


if __name__ == "__main__":
    main()
