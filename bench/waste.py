"""How much KV memory each allocator wastes, with request lengths like ShareGPT's.  Run: python bench/waste.py

This is bookkeeping without a model. The same 2,000 requests (log-normal lengths, means 161 and 338 tokens, sigma 0.9, seed 0, cut at
2,048) are served in a memory of 16,384 slots. About as much is left for KV blocks by a 13B model on a 40 GB card. Prints a table, then
one JSON line.

    reserved   fraction of the memory that is reserved             waste     fraction of the reserved slots that hold no token
    used       fraction of the memory that holds a token           external  fraction that is free, needed, and in too small pieces
    preempted  number of preemptions                               lost      tokens that preempted requests held
                                                                   moved     tokens copied when a request grew
"""
from __future__ import annotations

import argparse
import json
from typing import Any

from minivllm.planning.allocator_replay import AllocatorRun, replay, sharegpt_like, with_system_prompt
from minivllm.planning.allocators import (
    Allocator,
    BuddyAllocator,
    ContiguousAllocator,
    PagedAllocator,
    RequestLengths,
)

CAPACITY = 16_384
LIMIT = 2_048
SYSTEM_PROMPT = 300  # tokens before every prompt, in the last two rows
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def rows(num_requests: int, seed: int) -> list[tuple[str, AllocatorRun]]:
    requests = sharegpt_like(num_requests, limit=LIMIT, seed=seed)
    with_system = with_system_prompt(requests, SYSTEM_PROMPT, LIMIT)
    runs: list[tuple[str, Allocator, list[RequestLengths]]] = [
        (f"contiguous, reserve {LIMIT}", ContiguousAllocator(CAPACITY, LIMIT), requests),
        ("contiguous, final length known", ContiguousAllocator(CAPACITY, LIMIT, oracle=True), requests),
        ("buddy, doubling", BuddyAllocator(CAPACITY), requests),
        *[(f"paged, block {size}", PagedAllocator(CAPACITY, size), requests) for size in BLOCK_SIZES],
        (f"{SYSTEM_PROMPT}-token system prompt, block 16", PagedAllocator(CAPACITY, 16), with_system),
        ("   the same, blocks shared", PagedAllocator(CAPACITY, 16, sharing=True), with_system),
    ]
    return [(name, replay(allocator, workload)) for name, allocator, workload in runs]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    print(f"{'allocator':36s} {'reserved':>8s} {'used':>7s} {'waste':>7s} {'external':>8s} {'running':>7s} {'steps':>6s} "
          f"{'preempted':>9s} {'lost':>9s} {'moved':>8s}")
    figures: dict[str, Any] = {}
    for name, run in rows(args.num_requests, args.seed):
        reserved, used = run.mean("reserved") / CAPACITY, run.mean("used") / CAPACITY
        print(f"{name:36s} {reserved:8.1%} {used:7.1%} {run.waste:7.1%} {run.external:8.1%} {run.mean('running'):7.1f} "
              f"{len(run.steps):6d} {run.preemptions:9d} {run.lost:9d} {run.moved:8d}")
        figures[name.strip()] = {"waste": round(run.waste, 4), "external": round(run.external, 4), "steps": len(run.steps)}
    print(json.dumps({"bench": "waste", "requests": args.num_requests, "seed": args.seed, "capacity": CAPACITY, "rows": figures}))


if __name__ == "__main__":
    main()
