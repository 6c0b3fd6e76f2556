"""How many GPUs, replicas and servers a load needs, as arithmetic.  Run: python -m bench.scaling [--gpus 1000] [--markdown]

Every input is a flag. The defaults are figures that this repository records (docs/performance.md, bench/routing.py), and one published rate
of failures. The result is an estimate for planning: it assumes full batches of 32 sequences, and a load that does not change.
`--markdown` prints the table of docs/scaling.md.
"""
from __future__ import annotations

import argparse
import math
import sys
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass, fields

from minivllm.engine.routing import Router

BLOCK = 16  # tokens


@dataclass(frozen=True)
class ScalingInputs:
    """What the arithmetic starts from. The defaults: a 7B model in bfloat16, one H200 per replica, and the chats of `bench.routing`."""

    gpus: int = 1000
    gpus_per_replica: int = 1
    prompt_tokens: float = 2652  # of one request
    output_tokens: float = 165
    hit_rate: float = 0.843  # share of the prompt tokens that the prefix cache has, with this router
    hit_rate_round_robin: float = 0.619
    prefill_per_second: float = 39500  # tokens: 8,000 in 202.5 ms
    step_ms: float = 4.73  # of 32 sequences
    batch: int = 32
    utilization: float = 0.6  # of the GPUs; the rest is for peaks, failures and restarts
    server_tokens_per_second: float = 59187  # that one server process streams
    server_utilization: float = 0.5
    gpu_hours_per_failure: float = 50677  # 419 failures in 54 days of 16,384 GPUs (Llama 3, arXiv 2407.21783)
    kv_tokens: int = 870000  # of one replica's KV cache


def router_bytes(replicas: int, kv_tokens: int) -> float:
    """Memory of a router that remembers full KV caches, measured on a part and scaled."""
    part = 2000
    tracemalloc.start()
    router = Router(1, BLOCK, part)
    for number in range(part // 50):
        router.choose("r", range(number * 10**6, number * 10**6 + 50 * BLOCK), [0])
        router.ended("r")
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return size / part * (kv_tokens / BLOCK) * replicas


def arithmetic(i: ScalingInputs) -> list[tuple[str, str, str]]:
    """(what, how, value) of every quantity."""
    replicas = i.gpus // i.gpus_per_replica

    def seconds(hit_rate: float) -> float:
        return i.prompt_tokens * (1 - hit_rate) / i.prefill_per_second + i.output_tokens * i.step_ms / 1000 / i.batch

    per_replica, per_replica_plain = (i.utilization / seconds(rate) for rate in (i.hit_rate, i.hit_rate_round_robin))
    requests = per_replica * replicas
    output = requests * i.output_tokens
    server = i.server_tokens_per_second * i.server_utilization
    servers = math.ceil(output / server)
    cell = math.ceil(replicas / servers)
    running = per_replica * (i.output_tokens * i.step_ms / 1000)
    failures = i.gpus * 24 / i.gpu_hours_per_failure
    memory = router_bytes(cell, i.kv_tokens) / 2**20
    return [
        ("GPU time of a request", f"{i.prompt_tokens:g} x (1 - {i.hit_rate:g}) / {i.prefill_per_second:g} + {i.output_tokens:g} x "
                                  f"{i.step_ms:g} ms / {i.batch}", f"{1000 * seconds(i.hit_rate):.1f} ms"),
        ("requests per second and replica", f"{i.utilization:g} / that", f"{per_replica:.1f}"),
        ("the same with round robin", f"{i.hit_rate_round_robin:g} in place of {i.hit_rate:g}", f"{per_replica_plain:.1f}"),
        ("requests per second", f"{replicas:,} replicas", f"{requests:,.0f}"),
        ("output tokens per second", f"x {i.output_tokens:g}", f"{output:,.0f}"),
        ("servers", f"that / ({i.server_tokens_per_second:,.0f} x {i.server_utilization:g})", f"{servers}"),
        ("replicas of one server", f"{replicas:,} / {servers}", f"{cell}"),
        ("memory of one router", f"{cell} x {i.kv_tokens / BLOCK:,.0f} block hashes, measured", f"{memory:.0f} MiB"),
        ("failures per day", f"{i.gpus:,} x 24 h / {i.gpu_hours_per_failure:,.0f} h", f"{failures:.2f}"),
        ("requests that run in one replica", f"{per_replica:.1f} / s x {i.output_tokens:g} x {i.step_ms:g} ms", f"{running:.0f}"),
        ("streams cut per day", "failures x those", f"{failures * running * i.gpus_per_replica:.0f} of {requests * 86400 / 1e9:.2f} "
                                                    "billion requests"),
    ]


def markdown(rows: Sequence[tuple[str, str, str]]) -> str:
    return "\n".join(["| what | arithmetic | value |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(ScalingInputs):
        parser.add_argument("--" + f.name.replace("_", "-"), type=type(f.default), default=f.default)  # type: ignore[arg-type]
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/scaling.md")
    args = vars(parser.parse_args(argv))
    as_markdown = args.pop("markdown")
    rows = arithmetic(ScalingInputs(**args))
    if as_markdown:
        print(markdown(rows))
        return 0
    for what, how, value in rows:
        print(f"{what:34}{value:>34}   {how}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
