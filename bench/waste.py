"""How much KV memory each allocator wastes, on lengths like ShareGPT's.  Run: python bench/waste.py

Pure bookkeeping, no model: the same 2,000 requests (log-normal lengths, means 161 and 338 tokens, sigma 0.9, seed 0, cut at
2,048) go through a memory of 16,384 slots, which is about what a 13B model leaves on a 40 GB card. Prints a table, then one
JSON line.

    reserved   share of the memory that nobody else can have       waste     share of the reserved slots that hold no token
    used       share of the memory that holds a token              external  share that is free, wanted, and in too small pieces
    preempted  times a request gave up its place to an older one   lost      tokens it held then; moved: tokens copied to grow
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
SYSTEM_PROMPT = 300  # tokens in front of every prompt, in the last rows
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def rows(num_jobs: int, seed: int) -> list[tuple[str, AllocatorRun]]:
    jobs = sharegpt_like(num_jobs, limit=LIMIT, seed=seed)
    behind = with_system_prompt(jobs, SYSTEM_PROMPT, LIMIT)
    work: list[tuple[str, Allocator, list[RequestLengths]]] = [
        (f"contiguous, reserve {LIMIT}", ContiguousAllocator(CAPACITY, LIMIT), jobs),
        ("contiguous, length foretold", ContiguousAllocator(CAPACITY, LIMIT, oracle=True), jobs),
        ("buddy, doubling", BuddyAllocator(CAPACITY), jobs),
        *[(f"paged, block {size}", PagedAllocator(CAPACITY, size), jobs) for size in BLOCK_SIZES],
        (f"{SYSTEM_PROMPT}-token system prompt, block 16", PagedAllocator(CAPACITY, 16), behind),
        ("   the same, blocks shared", PagedAllocator(CAPACITY, 16, sharing=True), behind),
    ]
    return [(name, replay(allocator, some)) for name, allocator, some in work]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-jobs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    print(f"{'allocator':36s} {'reserved':>8s} {'used':>7s} {'waste':>7s} {'external':>8s} {'running':>7s} {'steps':>6s} "
          f"{'preempted':>9s} {'lost':>9s} {'moved':>8s}")
    figures: dict[str, Any] = {}
    for name, run in rows(args.num_jobs, args.seed):
        reserved, used = run.mean("reserved") / CAPACITY, run.mean("used") / CAPACITY
        print(f"{name:36s} {reserved:8.1%} {used:7.1%} {run.waste:7.1%} {run.external:8.1%} {run.mean('running'):7.1f} "
              f"{len(run.steps):6d} {run.preemptions:9d} {run.lost:9d} {run.moved:8d}")
        figures[name.strip()] = {"waste": round(run.waste, 4), "external": round(run.external, 4), "steps": len(run.steps)}
    print(json.dumps({"bench": "waste", "jobs": args.num_jobs, "seed": args.seed, "capacity": CAPACITY, "rows": figures}))


if __name__ == "__main__":
    main()
