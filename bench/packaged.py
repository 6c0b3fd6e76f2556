"""The packaged models on a CPU: how fast one sequence is, and how much memory a process takes.

    OMP_NUM_THREADS=2 python -m bench.packaged [MODEL ..]

Each model runs in a separate process. It generates 64 tokens after a prompt of 64 tokens, several times. The row has the rate of the
fastest round and of the median one, and the resident memory afterwards, with libraries, tokenizer and the touched part of the KV cache.
A model that is not in the cache is downloaded.
"""
from __future__ import annotations

import argparse
import os
import subprocess
import sys

from bench import machine
from minivllm.models.packaged import PACKAGED

ROUNDS, TOKENS = 7, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(PACKAGED)} (default: all)")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.models[0])
        return
    if unknown := set(args.models) - PACKAGED.keys():
        parser.error(f"unknown models {sorted(unknown)}: choose from {', '.join(PACKAGED)}")
    print(f"> {machine.one_line(machine.describe('cpu', int(os.environ.get('OMP_NUM_THREADS', os.cpu_count() or 1))))}\n")
    print("| model | weights, MiB | resident, MiB | one sequence, tokens/s: fastest, median |\n|---|---|---|---|", flush=True)
    for name in args.models or PACKAGED:
        subprocess.run([sys.executable, "-m", "bench.packaged", "--measure", name], check=False)


def measure(name: str) -> None:
    """Print one model's row."""
    import psutil

    from minivllm.benchmarks.offline import generate
    from minivllm.benchmarks.workloads import uniform
    from minivllm.engine.llm import LLM

    with LLM(name, device="cpu") as llm:
        generate(llm, uniform(1, TOKENS, 8, seed=0))
        rates = sorted(TOKENS / (generate(llm, uniform(1, TOKENS, TOKENS + 1, seed=i)) - generate(llm, uniform(1, TOKENS, 1, seed=i + 100)))
                       for i in range(1, ROUNDS + 1))
        resident = psutil.Process().memory_info().rss >> 20
    print(f"| `{name}` | {PACKAGED[name].size / 2**20:.0f} | {resident:,} | {rates[-1]:.1f}, {rates[ROUNDS // 2]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
