"""A key's throughput alone, and beside 1,000 clients of another key.  Run: python -m bench.fair_storm [--clients 1000] [--model FOLDER]

The server runs in its own processes (see `bench.hostile`). The good key has a few clients, each with one completion at a time. The hostile
key's clients send completions with several children and long outputs, and send the next one at once. The scheduler gives each key half of
the rows, and bounds the tokens of the other key's prompts in each step, so the good key should keep about half of what it has alone.

There are enough blocks for all rows. All processes share the machine's cores, so the first figure is meaningful on an otherwise idle
machine only. The second one is the tokens for each second of the engine's processor time (on a GPU use the first). Exit status 1 if the
good key keeps less than 40% of it.
"""
from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.hostile import HostileServer, hostile_server
from bench.hostile_client import GOOD_KEY, HOSTILE_KEY, Target

FLAGS = ("--num-gpu-blocks-override", "4096")
LEAST = 0.4  # of the throughput alone


async def client(target: Target, key: str, body: dict[str, Any], seen: Counter[str]) -> None:
    """Streams one after the other, for ever. Counts tokens as they arrive, and refusals."""
    raw = json.dumps({**body, "stream": True}).encode()
    while True:
        try:
            reader, writer = await target.connect()
            writer.write(target.head("/v1/completions", f"content-length: {len(raw)}", "connection: close", key=key) + raw)
            async for line in reader:
                seen["tokens"] += line.startswith(b"data: {")
                seen["refusals"] += line.startswith(b"HTTP/1.1 4")
            writer.close()
        except OSError:
            await asyncio.sleep(0.1)


async def load(target: Target, key: str, clients: int, body: dict[str, Any], seconds: float) -> Counter[str]:
    """What these clients get in this time."""
    seen: Counter[str] = Counter()
    tasks = [asyncio.create_task(client(target, key, body, seen)) for _ in range(clients)]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return seen


def measure(server: HostileServer, clients: int, seconds: float) -> tuple[float, float]:
    """Tokens of the good key per second, and per second of the engine's processor time."""
    import psutil

    body = {"prompt": "once there was a cat", "max_tokens": 32, "ignore_eos": True}
    engine = max(psutil.Process(server.process.pid).children(), key=lambda process: process.memory_info().rss)
    begin = engine.cpu_times()
    seen = asyncio.run(load(Target(server.port), GOOD_KEY, clients, body, seconds))
    end = engine.cpu_times()
    return seen["tokens"] / seconds, seen["tokens"] / max(0.1, end.user + end.system - begin.user - begin.system)


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
    from bench.storm import write_model

    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            write_model(Path(folder))
        with hostile_server(args.model or folder, args.flags or FLAGS) as server:
            measure(server, args.good_clients, 5.0)  # the first steps compile kernels
            alone = measure(server, args.good_clients, args.seconds)
            work = (server.port, args.clients, args.seconds + 10)
            hostile = multiprocessing.get_context("spawn").Process(target=attack, args=work, daemon=True)
            hostile.start()
            time.sleep(6)  # until all of its clients wait
            beside = measure(server, args.good_clients, args.seconds)
            hostile.join(30)
    for unit, first, second in zip(("tokens/s", "tokens per second of the engine's processor time"), alone, beside, strict=True):
        print(f"good key: {first:.0f} {unit} alone, {second:.0f} beside {args.clients} hostile clients = {second / first:.0%}")
    return int(beside[1] < LEAST * alone[1])


if __name__ == "__main__":
    sys.exit(main())
