"""Attacks on a server, with a well-behaved stream beside each of them.  Run: python -m bench.hostile [--pairs [all]] [--markdown]

Every attack gets a fresh server: a tiny random model on the CPU, its engine in a separate process, bound to 127.0.0.1. Two API keys are
valid. One belongs to a client that streams completions all the time, the other one to the attacker, which runs in another process and is
bounded in time and bytes. Measured are the time between two tokens of the stream (99th percentile and longest) and the memory of
the server's processes: before, during and after the attack.

The limits hold if the stream never fails, if its tokens keep arriving, and if the memory stays bounded and comes back. Exit status 1 if
not. `--markdown` prints the tables of docs/security.md.

Attacks with other work on the machine say little: the first one, "busy processors", sends no request and only computes on all cores, so
its row shows what the load of an attacker's own process does to the stream. Everything takes at most about `--minutes`. Pairs share
one server and are shorter. `--pairs` runs as many of them as it takes for each attack to take part three times; `--pairs all` runs all.
"""
from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.attacks import ATTACKS as HTTP_ATTACKS
from bench.attacks import REFERENCE
from bench.attacks_text import ATTACKS as TEXT_ATTACKS
from bench.hostile_client import ADMIN_KEY, GOOD_KEY, HOSTILE_KEY, Attack, Target

SETTINGS = ("--dtype", "float32", "--device", "cpu", "--max-model-len", "1024", "--num-gpu-blocks-override", "1024", "--max-num-seqs", "64",
            "--max-num-batched-tokens", "256", "--log-level", "warning", "--no-access-log", "--max-queue", "64")
ROUNDS = 3  # of pairs, unless all are wanted; each attack takes part once in a round
START_SECONDS = 60.0  # for a server or an attacker's process to start
STILL_BUSY = "still busy"  # beginning of the report of an attacker whose time is over
MAX_GAP = 2.0  # longest time between two tokens of the stream during an attack, in seconds
MAX_GROWTH = 600.0  # MiB of memory that an attack may use
MAX_LEFT = 300.0  # MiB that may remain afterwards: allocators keep some of what they were given
SETTLE_SECONDS = 5.0  # within which memory must come back; a process that checks schemas of tools may run for 3 s

ATTACKS = (*HTTP_ATTACKS, *TEXT_ATTACKS)


@dataclass(frozen=True)
class Times:
    """Seconds of one measurement."""

    quiet: float  # before and after the attack
    hold: float  # how long an attacker keeps its connections
    attack: float  # at most
    longest: float  # about, with the start of a server
    may_be_cut: bool = False  # the attacker need not be done


SINGLE = Times(2.0, 6.0, 30.0, 30.0)
PAIR = Times(1.0, 4.0, 6.0, 15.0, True)


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
    too_late = threading.Timer(START_SECONDS, process.kill)
    too_late.start()
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"ready after .* at http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            raise RuntimeError("the server did not start:\n" + "".join(lines))
        too_late.cancel()
        threading.Thread(target=process.stdout.read, daemon=True).start()  # an unread pipe would block the server
        yield HostileServer(process, int(found[1]))
    finally:
        too_late.cancel()
        process.send_signal(signal.SIGINT)  # without waiting for running requests
        try:
            process.wait(5)
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
        self._thread.join(5)


@contextmanager
def good_stream(port: int) -> Iterator[GoodStream]:
    """A stream that has begun: the first steps compile kernels."""
    stream, late = GoodStream(port), time.monotonic() + START_SECONDS
    try:
        while len(stream.arrivals) < 50:
            if stream.failures or time.monotonic() > late:
                raise RuntimeError(f"the stream did not begin: {stream.failures[:1]}")
            time.sleep(0.05)
        yield stream
    finally:
        stream.stop()


@dataclass
class HostileResult:
    """One row of the table."""

    name: str
    seen: str = ""  # what the attacker got
    p99: tuple[float, float, float] = (0.0, 0.0, 0.0)  # before, during, after, in seconds
    longest: float = 0.0  # during
    memory: tuple[float, float, float] = (0.0, 0.0, 0.0)  # before, highest during, after, in MiB
    problems: list[str] = field(default_factory=list)


def percentile(values: Sequence[float], fraction: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


def _attack(attack: Attack, target: Target, seconds: float, pipe: Any) -> None:
    """Main function of the attacker's process."""
    try:
        pipe.send(asyncio.run(asyncio.wait_for(attack.run(target), seconds)))
    except TimeoutError:
        pipe.send(f"{STILL_BUSY} after {seconds:g} s")
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def run_alone(model: str, attack: Attack) -> HostileResult:
    """One attack on a fresh server."""
    with hostile_server(model, attack.flags) as server, good_stream(server.port) as stream:
        return measure(server, stream, (attack,), SINGLE)


def measure(server: HostileServer, stream: GoodStream, attacks: Sequence[Attack], times: Times) -> HostileResult:
    """These attacks at the same time."""
    result = HostileResult(" + ".join(a.name for a in attacks))
    failures_before, begin = len(stream.failures), time.monotonic()
    time.sleep(times.quiet)
    quiet_end, before = time.monotonic(), server.memory()
    highest, seen = attack_now(server, attacks, times)
    attack_end = time.monotonic()
    time.sleep(times.quiet)
    end, after = time.monotonic(), server.memory()
    while after - before > MAX_LEFT and time.monotonic() < end + SETTLE_SECONDS:  # a check in another process may still run
        time.sleep(0.2)
        after = server.memory()
    phases = [stream.gaps(begin, quiet_end), stream.gaps(quiet_end, attack_end), stream.gaps(attack_end, end)]
    result.p99 = (percentile(phases[0], 0.99), percentile(phases[1], 0.99), percentile(phases[2], 0.99))
    result.longest, result.seen = max(phases[1]), "; ".join(seen)
    result.memory = (before, max(before, highest), after)
    result.problems = stream.failures[failures_before:][:3]
    result.problems += [f"{a.name}: not {a.expected}" for a, got in zip(attacks, seen, strict=True)
                        if not re.search(a.expected, got) and not (times.may_be_cut and got.startswith(STILL_BUSY))]
    if server.process.poll() is not None:
        result.problems.append("the server ended")
    if result.longest > MAX_GAP:
        result.problems.append(f"no token for {result.longest:.1f} s")
    if highest - before > MAX_GROWTH or after - before > MAX_LEFT:
        result.problems.append(f"memory grew by {highest - before:.0f} MiB, {after - before:.0f} MiB remained")
    return result


def attack_now(server: HostileServer, attacks: Sequence[Attack], times: Times) -> tuple[float, list[str]]:
    """Run the attackers' processes. Returns the highest memory of the server in MiB, and what each attacker got."""
    context, workers = multiprocessing.get_context("spawn"), []
    for attack in attacks:
        mine, theirs = context.Pipe()
        limit = min(attack.seconds, times.attack)
        worker = context.Process(target=_attack, args=(attack, Target(server.port, times.hold), limit, theirs), daemon=True)
        worker.start()
        theirs.close()
        workers.append((worker, mine))
    highest, seen, deadline = server.memory(), [], time.monotonic() + times.attack + START_SECONDS
    for worker, mine in workers:
        while worker.is_alive() and not mine.poll(0.05) and time.monotonic() < deadline:
            highest = max(highest, server.memory())
        try:
            seen.append(str(mine.recv()) if mine.poll() else "the attacker ended without a report")
        except EOFError:
            seen.append("the attacker ended without a report")
    for worker, _ in workers:
        worker.join(2)
        if worker.is_alive():
            worker.kill()
    return highest, seen


def balanced_pairs(attacks: Sequence[Attack], rounds: int | None = None) -> list[tuple[Attack, Attack]]:
    """Pairs in rounds in which each attack takes part once (the circle method; with an odd number all but one). None: all pairs."""
    circle: list[Attack | None] = [*attacks, *([None] if len(attacks) % 2 else [])]
    pairs = []
    for _ in range(len(circle) - 1 if rounds is None else min(rounds, len(circle) - 1)):
        for first, second in zip(circle[:len(circle) // 2], reversed(circle), strict=False):
            if first is not None and second is not None:
                pairs.append((first, second))
        circle[1:] = [circle[-1], *circle[1:-1]]
    return pairs


def run_pairs(model: str, pairs: Sequence[tuple[Attack, Attack]], end: float) -> Iterator[HostileResult]:
    """As many pairs as there is time for, one after the other on the same server. After a problem the next pair gets a fresh one."""
    flags = [flag for pair in pairs for attack in pair for flag in attack.flags]
    left = list(pairs)
    while left and time.monotonic() < end - PAIR.longest:
        try:
            with hostile_server(model, flags) as server, good_stream(server.port) as stream:
                while left and time.monotonic() < end - PAIR.longest:
                    result = measure(server, stream, left.pop(0), PAIR)
                    yield result
                    if result.problems:
                        break
        except RuntimeError as error:
            yield HostileResult("pairs", problems=[str(error)])
            return


def markdown(results: Sequence[HostileResult], pairs: Sequence[HostileResult]) -> str:
    """The tables of docs/security.md."""
    lines = [HEADER, "|---|---|---|---|---|---|"] + [row(result) for result in results]
    if pairs:
        lines += ["", PAIR_HEADER, "|---|---|---|---|---|"] + [pair_row(result) for result in pairs]
    return "\n".join(lines)


HEADER = ("| attack | what the attacker got | p99 between tokens, ms: before / during / after | longest, ms "
          "| memory, MiB: before / highest / after | held |")
PAIR_HEADER = ("| two attacks at once | p99 between tokens, ms: before / during / after | longest, ms "
               "| memory, MiB: before / highest / after | held |")


def row(r: HostileResult) -> str:
    return f"| {r.name} | {r.seen} | {_figures(r)} |"


def pair_row(r: HostileResult) -> str:
    return f"| {r.name} | {_figures(r)} |"


def _figures(r: HostileResult) -> str:
    p99 = " / ".join(f"{1000 * value:.0f}" for value in r.p99)
    memory = " / ".join(f"{value:.0f}" for value in r.memory)
    return f"{p99} | {1000 * r.longest:.0f} | {memory} | " + ("yes" if not r.problems else "no: " + "; ".join(r.problems))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="attacks whose name contains one of these words")
    parser.add_argument("--pairs", nargs="?", const="some", choices=("some", "all"),
                        help=f"afterwards two attacks at the same time: {ROUNDS} pairs with each attack, or all pairs")
    parser.add_argument("--minutes", type=float, default=20.0, help="for everything; what does not fit is not run, and is counted")
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown at the end; the rows go to stderr as they come")
    parser.add_argument("--list", action="store_true", help="list the attacks")
    args = parser.parse_args(argv)
    chosen = [a for a in ATTACKS if not args.only or any(word in a.name for word in args.only)]
    if args.list or not chosen:
        print("\n".join(f"{a.name}: {a.limit}" for a in ATTACKS))
        return 0 if args.list else 2
    from bench.machine import describe, one_line
    from bench.storm import write_model

    end, results, pairs = time.monotonic() + 60 * args.minutes, [], []
    hostile = [attack for attack in chosen if attack is not REFERENCE]
    wanted = [] if args.pairs is None else balanced_pairs(hostile, None if args.pairs == "all" else ROUNDS)
    show = sys.stderr if args.markdown else sys.stdout
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        for attack in chosen:
            if time.monotonic() > end - SINGLE.longest:
                break
            try:
                results.append(run_alone(folder, attack))
            except RuntimeError as error:
                results.append(HostileResult(attack.name, problems=[str(error)]))
            print(row(results[-1]), file=show, flush=True)
        for result in run_pairs(folder, wanted, end):
            pairs.append(result)
            print(pair_row(result), file=show, flush=True)
    if args.markdown:
        print(one_line(describe("cpu", 1)) + "\n\n" + markdown(results, pairs))
    print(f"{len(results)} of {len(chosen)} attacks, {len(pairs)} of {len(wanted)} pairs; "
          f"not held: {sum(bool(result.problems) for result in (*results, *pairs))}", file=show)
    return int(len(results) < len(chosen) or any(result.problems for result in (*results, *pairs)))


if __name__ == "__main__":
    sys.exit(main())
