"""A key's throughput alone, and beside 1,000 clients of another key.  Run: python -m bench.fair_storm [--clients 1000] [--model FOLDER]

The server runs in its own processes (see `bench.hostile`). The good key has a few clients, each with one completion at a time. The hostile
key's clients send completions with several children and long outputs, and send the next one at once. The scheduler gives each key half of
the rows, so the good key should keep about half of what it has alone. Exit status 1 if it keeps less than 40%.

The default settings have as many tokens in a step as rows, because on a CPU the time of a step grows with its tokens: what another key's
prompts cost is bounded by --max-num-batched-tokens. There are enough blocks for all rows. All processes share the machine's cores, so
the figure is meaningful on an otherwise idle machine only.
"""
from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.hostile import hostile_server
from bench.hostile_client import GOOD_KEY, HOSTILE_KEY, Target

FLAGS = ("--max-num-batched-tokens", "64", "--num-gpu-blocks-override", "4096")
LEAST = 0.4  # of the throughput alone


async def client(target: Target, key: str, body: dict[str, Any], end: float, tokens: list[int]) -> None:
    """Requests one after the other until `end`. Appends the number of tokens of each that was answered in time."""
    while time.monotonic() < end:
        try:
            status, answer = await asyncio.wait_for(target.post("/v1/completions", body, key=key), max(0.1, end - time.monotonic()))
        except (TimeoutError, OSError):
            continue
        if status == 200:
            tokens.append(json.loads(answer)["usage"]["completion_tokens"])
        else:
            await asyncio.sleep(0.2)


async def load(target: Target, key: str, clients: int, body: dict[str, Any], seconds: float) -> float:
    """Tokens per second of these clients."""
    tokens: list[int] = []
    end = time.monotonic() + seconds
    await asyncio.gather(*(client(target, key, body, end, tokens) for _ in range(clients)))
    return sum(tokens) / seconds


def attack(port: int, clients: int, seconds: float) -> None:
    """Main function of the hostile clients' process."""
    body = {"prompt": "y " * 100, "n": 4, "max_tokens": 400, "ignore_eos": True}
    asyncio.run(load(Target(port), HOSTILE_KEY, clients, body, seconds))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000, help="of the hostile key")
    parser.add_argument("--good-clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--model", metavar="FOLDER", help="with a tokenizer (default: a tiny random model on the CPU)")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of the server, such as --device cuda")
    args = parser.parse_args(argv)
    body = {"prompt": "once there was a cat", "max_tokens": 32, "ignore_eos": True}
    from bench.storm import write_model

    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            write_model(Path(folder))
        with hostile_server(args.model or folder, args.flags or FLAGS) as server:
            target = Target(server.port)
            asyncio.run(load(target, GOOD_KEY, args.good_clients, body, 5.0))  # the first steps compile kernels
            alone = asyncio.run(load(target, GOOD_KEY, args.good_clients, body, args.seconds))
            work = (server.port, args.clients, args.seconds + 10)
            hostile = multiprocessing.get_context("spawn").Process(target=attack, args=work, daemon=True)
            hostile.start()
            time.sleep(6)  # until all of its clients wait
            beside = asyncio.run(load(target, GOOD_KEY, args.good_clients, body, args.seconds))
            hostile.join(30)
    print(f"good key: {alone:.0f} tokens/s alone, {beside:.0f} tokens/s beside {args.clients} hostile clients = {beside / alone:.0%}")
    return int(beside < LEAST * alone)


if __name__ == "__main__":
    sys.exit(main())
