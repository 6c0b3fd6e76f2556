"""Attacks on a server, with a well-behaved stream beside each of them.  Run: python -m bench.hostile [--only NAME ...] [--pairs]

Every attack gets a fresh server: a tiny random model on the CPU, its engine in a separate process, bound to 127.0.0.1. Two API keys are
valid. One belongs to a client that streams completions all the time, the other one to the attacker, which runs in another process and is
bounded in time and bytes. Measured are the time between two tokens of the stream (99th percentile and longest) and the memory of
the server's processes: before, during and after the attack.

The limits hold if the stream never fails, if its tokens keep arriving, and if the memory stays bounded and comes back. Exit status 1 if
not. `--markdown` prints the table of docs/security.md.
"""
from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from bench.attacks import ATTACKS as HTTP_ATTACKS
from bench.attacks_text import ATTACKS as TEXT_ATTACKS
from bench.hostile_client import ADMIN_KEY, GOOD_KEY, HOSTILE_KEY, Attack, Target

SETTINGS = ("--dtype", "float32", "--device", "cpu", "--max-model-len", "1024", "--num-gpu-blocks-override", "1024", "--max-num-seqs", "64",
            "--max-num-batched-tokens", "256", "--log-level", "warning", "--no-access-log", "--max-queue", "64")
QUIET = 3.0  # seconds of measurement before and after an attack
MAX_GAP = 2.0  # longest time between two tokens of the stream during an attack, in seconds
MAX_GROWTH = 600.0  # MiB of memory that an attack may use
MAX_LEFT = 300.0  # MiB that may remain afterwards: allocators keep some of what they were given

ATTACKS = (*HTTP_ATTACKS, *TEXT_ATTACKS)


@dataclass(frozen=True)
class HostileServer:
    """A running server."""

    process: subprocess.Popen[str]
    port: int

    def memory(self) -> float:
        """MiB of the server's process and all its children."""
        import psutil

        total = 0
        try:
            this = psutil.Process(self.process.pid)
            for process in (this, *this.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
        except psutil.NoSuchProcess:
            return 0.0
        return total / 2**20


@contextmanager
def hostile_server(model: str, flags: Sequence[str] = ()) -> Iterator[HostileServer]:
    """`minivllm serve` with two keys."""
    keys = ("--api-key", GOOD_KEY, "--api-key", HOSTILE_KEY, "--admin-key", ADMIN_KEY)
    command = [sys.executable, "-m", "minivllm", "serve", model, "--port", "0", *SETTINGS, *keys, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"ready after .* at http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            raise RuntimeError("the server did not start:\n" + "".join(lines))
        threading.Thread(target=process.stdout.read, daemon=True).start()  # an unread pipe would block the server
        yield HostileServer(process, int(found[1]))
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


class GoodStream:
    """Streams one completion after the other, in a thread, and records when each event arrives."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._stopped = False
        self.arrivals: list[tuple[float, float]] = []  # (when, seconds since the event before)
        self.failures: list[str] = []
        self._last: float | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        import httpx

        body = {"prompt": "once there was a cat", "max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream": True}
        headers = {"authorization": f"Bearer {GOOD_KEY}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{self._port}", headers=headers, timeout=60) as http:
            while not self._stopped:
                try:
                    self._stream(http, body)
                except Exception as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                    time.sleep(0.1)

    def _stream(self, http: Any, body: dict[str, Any]) -> None:
        self._last = time.monotonic()
        with http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise RuntimeError(f"status {answer.status_code}: {answer.read()[:200]!r}")
            for line in answer.iter_lines():
                if not line.startswith("data: {") or self._stopped:
                    continue
                if json.loads(line.removeprefix("data: ")).get("error"):
                    raise RuntimeError(line[:200])
                now = time.monotonic()
                self.arrivals.append((now, now - self._last))
                self._last = now

    def gaps(self, begin: float, end: float) -> list[float]:
        """Seconds between two events, for the events in this time, and the time since the last one."""
        gaps = [gap for when, gap in self.arrivals if begin <= when <= end]
        last = max((when for when, _ in self.arrivals if when <= end), default=begin)
        return [*gaps, end - max(last, begin)]

    def stop(self) -> None:
        self._stopped = True
        self._thread.join(30)


@dataclass
class HostileResult:
    """One row of the table."""

    name: str
    limit: str
    seen: str = ""  # what the attacker got
    p99: tuple[float, float, float] = (0.0, 0.0, 0.0)  # before, during, after, in seconds
    longest: float = 0.0  # during
    memory: tuple[float, float, float] = (0.0, 0.0, 0.0)  # before, highest during, after, in MiB
    problems: list[str] = field(default_factory=list)


def percentile(values: Sequence[float], fraction: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


def _attack(attack: Attack, port: int, pipe: Any) -> None:
    """Main function of the attacker's process."""
    try:
        pipe.send(asyncio.run(asyncio.wait_for(attack.run(Target(port)), attack.seconds)))
    except TimeoutError:
        pipe.send(f"still busy after {attack.seconds:g} s")
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def run_attacks(model: str, attacks: Sequence[Attack]) -> HostileResult:
    """These attacks at the same time, on a fresh server."""
    result = HostileResult(" + ".join(a.name for a in attacks), "; ".join(dict.fromkeys(a.limit for a in attacks)))
    flags = [flag for attack in attacks for flag in attack.flags]
    with hostile_server(model, flags) as server:
        stream = GoodStream(server.port)
        while len(stream.arrivals) < 50 and not stream.failures:  # the first steps compile kernels
            time.sleep(0.05)
        begin = time.monotonic()
        time.sleep(QUIET)
        quiet_end, before = time.monotonic(), server.memory()
        context, workers = multiprocessing.get_context("spawn"), []
        for attack in attacks:
            mine, theirs = context.Pipe()
            worker = context.Process(target=_attack, args=(attack, server.port, theirs), daemon=True)
            worker.start()
            theirs.close()
            workers.append((worker, mine))
        highest, seen = before, []
        for worker, mine in workers:
            while worker.is_alive() and not mine.poll(0.05):
                highest = max(highest, server.memory())
            seen.append(str(mine.recv()) if mine.poll() else "the attacker ended without a report")
        for worker, _ in workers:
            worker.join(10)
        attack_end = time.monotonic()
        time.sleep(QUIET)
        end, after = time.monotonic(), server.memory()
        stream.stop()
        alive = server.process.poll() is None
    phases = [stream.gaps(begin, quiet_end), stream.gaps(quiet_end, attack_end), stream.gaps(attack_end, end)]
    result.p99 = (percentile(phases[0], 0.99), percentile(phases[1], 0.99), percentile(phases[2], 0.99))
    result.longest, result.seen = max(phases[1]), "; ".join(seen)
    result.memory = (before, highest, after)
    result.problems = stream.failures[:3]
    result.problems += [f"{a.name}: not {a.expected}" for a, got in zip(attacks, seen, strict=True) if not re.search(a.expected, got)]
    if not alive:
        result.problems.append("the server ended")
    if result.longest > MAX_GAP:
        result.problems.append(f"no token for {result.longest:.1f} s")
    if highest - before > MAX_GROWTH or after - before > MAX_LEFT:
        result.problems.append(f"memory grew by {highest - before:.0f} MiB, {after - before:.0f} MiB remained")
    return result


def markdown(results: Sequence[HostileResult]) -> str:
    """The table of docs/security.md."""
    lines = ["| attack | limit | what the attacker got | p99 between tokens, ms: before / during / after | longest, ms "
             "| memory, MiB: before / highest / after | held |", "|---|---|---|---|---|---|---|"]
    for r in results:
        p99 = " / ".join(f"{1000 * value:.0f}" for value in r.p99)
        memory = " / ".join(f"{value:.0f}" for value in r.memory)
        held = "yes" if not r.problems else "no: " + "; ".join(r.problems)
        lines.append(f"| {r.name} | {r.limit} | {r.seen} | {p99} | {1000 * r.longest:.0f} | {memory} | {held} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="attacks whose name contains one of these words")
    parser.add_argument("--pairs", action="store_true", help="every two of the chosen attacks at the same time, too")
    parser.add_argument("--markdown", action="store_true", help="print a table in Markdown")
    parser.add_argument("--list", action="store_true", help="list the attacks")
    args = parser.parse_args(argv)
    chosen = [a for a in ATTACKS if not args.only or any(word in a.name for word in args.only)]
    if args.list or not chosen:
        print("\n".join(f"{a.name}: {a.limit}" for a in ATTACKS))
        return 0 if args.list else 2
    groups: list[tuple[Attack, ...]] = [(attack,) for attack in chosen]
    groups += combinations(chosen, 2) if args.pairs else []
    results = []
    from bench.storm import write_model

    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        for group in groups:
            results.append(run_attacks(folder, group))
            if not args.markdown:
                print(markdown(results[-1:]).splitlines()[-1], flush=True)
    if args.markdown:
        print(markdown(results))
    return int(any(result.problems for result in results))


if __name__ == "__main__":
    sys.exit(main())
