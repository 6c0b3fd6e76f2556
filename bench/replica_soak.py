"""Two replicas under traffic, one of which is killed again and again.  Run: python -m bench.replica_soak [--minutes 20]

`minivllm serve --data-parallel-size 2` serves a tiny random model on the CPU. Clients send streamed and complete requests without a pause,
with greedy decoding, whose text is known from an undisturbed request. Meanwhile a replica's process is killed (SIGKILL) at random
moments, and sometimes all of them at once.

    complete       the whole text, and the right one
    cut            a stream that had begun, and ended with the error `replica_lost`, after a correct beginning
    turned away    503 with Retry-After while no replica lived; the client comes again
    lost           anything else: a request without output that failed, a wrong text, an error of another kind

The soak is right if nothing is lost, if the server's memory has not grown, and if no request, file or process is left. Else the exit status
is 1.
"""
from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.storm import write_model

SETTINGS = ("--dtype", "float32", "--device", "cpu", "--max-model-len", "512", "--num-gpu-blocks-override", "512", "--max-num-seqs", "24",
            "--max-num-batched-tokens", "256", "--log-level", "error", "--no-access-log", "--restart-engine", "1000000",
            "--served-model-name", "soak")
CLIENTS = 12
PROMPTS = 24
MAX_TOKENS = 96
KILL_EVERY = (2.0, 12.0)  # seconds between two kills, once all replicas live
ALL_AT_ONCE = 0.1  # share of the kills that end all replicas
GROWTH = {"threads": 0, "open files": 0, "replicas": 0, "server MiB": 24.0}  # of the server's process, at most
START_SECONDS = 300.0


@dataclass
class SoakReport:
    """What the clients saw, and what was done to the replicas."""

    ends: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    all_killed: int = 0
    problems: list[str] = field(default_factory=list)

    def lost(self, what: str) -> None:
        self.ends["lost"] += 1
        self.problems.append(what)


@contextmanager
def soaked_server(model: str, replicas: int) -> Iterator[tuple[psutil.Process, str]]:
    """A running `minivllm serve`: its process and its address."""
    command = [sys.executable, "-m", "minivllm", "serve", model, "--port", "0", "--data-parallel-size", str(replicas), *SETTINGS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    too_late = threading.Timer(START_SECONDS, process.kill)
    too_late.start()
    try:
        assert process.stdout is not None
        lines, found = [], None
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"ready after .* at (http://127\.0\.0\.1:\d+)", line):
                break
        too_late.cancel()
        if found is None:
            raise RuntimeError("the server did not start:\n" + "".join(lines))
        threading.Thread(target=process.stdout.read, daemon=True).start()  # an unread pipe would block the server
        yield psutil.Process(process.pid), found[1]
    finally:
        too_late.cancel()
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def replica_processes(server: psutil.Process) -> list[psutil.Process]:
    """The processes of the replicas that run now."""
    found = []
    for child in server.children():
        try:
            if child.status() != psutil.STATUS_ZOMBIE and "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


class SoakClients:
    """Clients on one event loop. The seed fixes what each of them sends; when a replica ends is the machine's business."""

    def __init__(self, url: str, seed: int, report: SoakReport) -> None:
        self.http = httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None))
        self.seed, self.report = seed, report
        dice = random.Random(seed)
        words = ("cat", "hat", "the", "sat", "mat", "and", "then", "on")
        openings = ["once there was ", "far away in a land of hats " * 4]  # shared, so that routing by prefix has something to do
        self.prompts = [dice.choice(openings) + " ".join(dice.choice(words) for _ in range(dice.randint(1, 20))) for _ in range(PROMPTS)]
        self.texts: list[str] = []
        self.ended = False

    async def learn_texts(self) -> None:
        """The right answers, one request at a time."""
        for prompt in self.prompts:
            answer = await self.http.post("/v1/completions", json=self._body(prompt))
            self.texts.append(answer.json()["choices"][0]["text"])

    async def client(self, number: int) -> None:
        dice = random.Random(self.seed * 1000 + number)
        while not self.ended:
            which = dice.randrange(PROMPTS)
            try:
                await (self._stream if dice.random() < 0.6 else self._whole)(which)
            except Exception as error:
                self.report.lost(f"{type(error).__name__}: {error}")

    def _body(self, prompt: str, **more: Any) -> dict[str, Any]:
        return {"model": "soak", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, **more}

    async def _refused(self, status: int, body: bytes, headers: Any) -> None:
        """A status other than 200, before any output."""
        if status == 503 and b'"engine_restarting"' in body:
            self.report.ends["turned away"] += 1
            await asyncio.sleep(min(float(headers["retry-after"]), 1.0))
        else:
            self.report.lost(f"status {status} before any output: {body.decode()[:200]}")

    async def _whole(self, which: int) -> None:
        answer = await self.http.post("/v1/completions", json=self._body(self.prompts[which]))
        if answer.status_code != 200:
            await self._refused(answer.status_code, answer.content, answer.headers)
        elif answer.json()["choices"][0]["text"] != self.texts[which]:
            self.report.lost(f"a wrong text: {answer.text[:200]}")
        else:
            self.report.ends["complete"] += 1

    async def _stream(self, which: int) -> None:
        text, end = "", ""
        async with self.http.stream("POST", "/v1/completions", json=self._body(self.prompts[which], stream=True)) as answer:
            if answer.status_code != 200:
                await self._refused(answer.status_code, await answer.aread(), answer.headers)
                return
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    end = end or "complete"
                elif line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    if error := event.get("error"):
                        end = str(error["code"])
                    for choice in event.get("choices", ()):
                        text += choice["text"]
        right = self.texts[which]
        if end == "complete" and text == right:
            self.report.ends["complete"] += 1
        elif end == "replica_lost" and right.startswith(text):
            self.report.ends["cut"] += 1
        else:
            self.report.lost(f"a stream ended with {end or 'no end'} after {text!r}, expected {right!r}")


async def kill_replicas(server: psutil.Process, clients: SoakClients, replicas: int, seconds: float) -> None:
    """Until the time is over: wait until all replicas live, and for a random time, and kill one or all."""
    dice, deadline = random.Random(clients.seed + 1), time.monotonic() + seconds
    while True:
        await asyncio.sleep(dice.uniform(*KILL_EVERY))
        while (await clients.http.get("/health")).json().get("live") != replicas:
            await asyncio.sleep(0.1)
        if time.monotonic() > deadline:
            return
        every = replica_processes(server)
        chosen = every if dice.random() < ALL_AT_ONCE else [dice.choice(every)]
        for process in chosen:
            process.kill()
        clients.report.kills += len(chosen)
        clients.report.all_killed += len(chosen) == replicas


async def state_at_rest(server: psutil.Process, clients: SoakClients, replicas: int) -> dict[str, float]:
    """What the server holds when no request runs and all replicas live."""
    for _ in range(1200):
        health, load = [(await clients.http.get(path)).json() for path in ("/health", "/load")]
        if health.get("live") == replicas and not (load["server_load"] or load["num_running"] or load["num_waiting"]):
            break
        await asyncio.sleep(0.1)
    return {
        "server MiB": round(server.memory_info().rss / 2**20, 1),
        "replicas MiB": round(sum(process.memory_info().rss for process in replica_processes(server)) / 2**20, 1),
        "requests in the server": load["server_load"], "requests in the replicas": load["num_running"] + load["num_waiting"],
        "KV cache use": load["kv_cache_usage"], "replicas": len(replica_processes(server)), "threads": server.num_threads(),
        "open files": server.num_fds() - len(server.net_connections()),
    }


async def soak(server: psutil.Process, url: str, *, replicas: int, minutes: float, seed: int) -> tuple[SoakReport, list[dict[str, float]]]:
    """Returns the report, and the states before and after."""
    report = SoakReport()
    clients = SoakClients(url, seed, report)
    async with clients.http:
        await clients.learn_texts()

        async def traffic(seconds: float) -> None:
            clients.ended = False
            work = [asyncio.create_task(clients.client(number)) for number in range(CLIENTS)]
            await kill_replicas(server, clients, replicas, seconds)
            clients.ended = True
            await asyncio.gather(*work)

        await traffic(0.1 * 60 * minutes)  # warm-up, with kills: imports and buffers of the first failures stay
        before = await state_at_rest(server, clients, replicas)
        await traffic(60 * minutes)
        return report, [before, await state_at_rest(server, clients, replicas)]


def problems_of(report: SoakReport, before: dict[str, float], after: dict[str, float], left: Sequence[psutil.Process]) -> list[str]:
    """What was wrong. left: processes that did not end with the server."""
    zero = ("requests in the server", "requests in the replicas", "KV cache use")
    return [
        *report.problems, *(f"{name}: {after[name]} after" for name in zero if after[name]),
        *(f"{name}: {before[name]} before, {after[name]} after" for name, more in GROWTH.items() if after[name] > before[name] + more),
        *(f"process {process.pid} is left" for process in left if process.status() != psutil.STATUS_ZOMBIE),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    from bench.machine import describe, one_line

    print(one_line(describe("cpu", os.cpu_count() or 1)))
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        with soaked_server(folder, args.replicas) as (server, url):
            report, (before, after) = asyncio.run(soak(server, url, replicas=args.replicas, minutes=args.minutes, seed=args.seed))
            children = server.children(recursive=True)
        _, left = psutil.wait_procs(children, timeout=10)
    ends = {name: report.ends[name] for name in ("complete", "cut", "turned away", "lost")}
    problems = problems_of(report, before, after, left)
    print(f"{args.minutes:g} minutes, {args.replicas} replicas, {CLIENTS} clients: {report.kills} replicas killed, "
          f"{report.all_killed} times all at once")
    print(", ".join(f"{count} {name}" for name, count in ends.items()))
    print(f"{'':26}{'before':>10}{'after':>10}")
    for name, value in before.items():
        print(f"{name:26}{value:>10}{after[name]:>10}")
    for problem in problems[:20]:
        print("PROBLEM " + problem)
    print("no request without output was lost, and nothing is left" if not problems else f"{len(problems)} problems")
    print(json.dumps({"bench": "replica_soak", "minutes": args.minutes, "replicas": args.replicas, "seed": args.seed, "kills": report.kills,
                      "all_killed": report.all_killed, **ends, "before": before, "after": after, "problems": len(problems)}))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
