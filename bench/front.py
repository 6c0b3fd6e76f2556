"""How fast the server's own part is: events per second through the real application and real sockets, from an engine that only talks.

    engine process (prepared deltas, one message a step) ──▶ server process ──▶ client processes

    python -m bench.front --streams 256 --tokens 400 --client-processes 2 [--profile front.prof]

Every stream gets one event per token. On a machine with fewer free cores than processes the wall clock measures their quarrel, so
the server's processor time per event is printed beside it: its inverse is what one core serves.
"""
from __future__ import annotations

import argparse
import cProfile
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench import machine
from minivllm.benchmarks.address import ServerAddress
from minivllm.benchmarks.load import Load, TimedRequest, run_load
from minivllm.benchmarks.statistics import percentile
from minivllm.engine.messages import EngineInfo
from minivllm.engine.metrics import EngineStats
from minivllm.engine_request import EngineRequest
from minivllm.outputs import OutputDelta
from minivllm.sampling_params import SamplingParams


class TalkingEngine:
    """The part of `EngineCore` that the engine loop uses; each step gives every request one more word."""

    def __init__(self, steps_per_second: float) -> None:
        self._interval = 1 / steps_per_second if steps_per_second else 0.0
        self._due = 0.0
        self._left: dict[str, int] = {}
        self._steps = 0

    def info(self) -> EngineInfo:
        return EngineInfo(
            model="talking", model_folder="", tokenizer_folder=None, max_model_len=1 << 20, vocab_size=50_000, eos_token_ids=(0,),
            device="cpu", dtype="none", num_blocks=2, block_size=16, generation_config={},
        )

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self._left), num_blocks=1, num_steps=self._steps)

    def add(self, request: EngineRequest) -> None:
        assert request.params.max_tokens is not None
        self._left[request.request_id] = request.params.max_tokens

    def abort_request(self, request_id: str) -> list[OutputDelta]:
        return [OutputDelta(request_id, 0, (), "", finish_reason="abort")] if self._left.pop(request_id, None) else []

    def prepare_ahead(self) -> bool:
        return False

    def warm_up(self) -> None:
        pass

    def check_room(self, owner: str, num_preparing: int) -> None:
        pass

    def preparation(self, params: SamplingParams) -> None:
        return None

    def has_unfinished_requests(self) -> bool:
        return bool(self._left)

    def step(self) -> list[OutputDelta]:
        self._due = max(self._due + self._interval, time.perf_counter())
        while (early := self._due - time.perf_counter()) > 0:
            time.sleep(early)
        self._steps += 1
        deltas = []
        for request_id, left in list(self._left.items()):
            deltas.append(OutputDelta(request_id, 0, (1000 + left,), f" word{left % 7}", None, "length" if left == 1 else None))
            if left == 1:
                del self._left[request_id]
            else:
                self._left[request_id] = left - 1
        return deltas

    def when_failed(self, call: Callable[[Exception], None]) -> None:
        pass

    def close(self) -> None:
        pass


def serve(steps_per_second: float, in_thread: bool, profile: str | None, pipe: Connection) -> None:
    """The server's process. Says its port and its engine's process id; ends when the pipe says so."""
    from minivllm.config import ServerConfig
    from minivllm.engine.client import ThreadClient
    from minivllm.engine.process import ProcessClient, freeze_heap
    from minivllm.server.app import create_app
    from minivllm.server.listen import Server

    build = partial(TalkingEngine, steps_per_second)
    client = (ThreadClient if in_thread else ProcessClient).start_with(build)  # type: ignore[arg-type]
    config = ServerConfig(access_log=False)
    app = create_app(client, config, None)
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)

    def ready() -> None:
        import asyncio

        freeze_heap()  # as `minivllm serve` does
        loop = asyncio.get_running_loop()
        pipe.send((listener.getsockname()[1], getattr(client, "pid", None), type(loop).__module__))

        def wait_for_end() -> None:
            pipe.recv()
            loop.call_soon_threadsafe(server.end, False)

        threading.Thread(target=wait_for_end, daemon=True).start()

    server = Server(app, config, ready)
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    server.run(sockets=[listener])
    if profile:
        profiler.disable()
        profiler.dump_stats(profile)
    client.close()
    pipe.send("ended")


def cpu_seconds(pid: int) -> tuple[float, float]:
    """Processor time of a process so far: its own, and in the kernel for it (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK"), int(fields[12]) / os.sysconf("SC_CLK_TCK")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.front", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=400, help="of each stream")
    parser.add_argument("--steps-per-second", type=float, default=0.0, help="of the engine; 0: as fast as it can")
    parser.add_argument("--client-processes", type=int, default=1)
    parser.add_argument("--thread", action="store_true", help="the engine in a thread of the server instead of a process")
    parser.add_argument("--no-stream", dest="stream", action="store_false")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", metavar="FILE", help="cProfile of the server's event loop; slows it down")
    return parser.parse_args()


def main() -> None:
    args = parse()
    where = machine.describe("cpu", 1)
    print(machine.one_line(where))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(args.steps_per_second, args.thread, args.profile, theirs))
    server.start()
    assert server.pid is not None
    port, engine_pid, loop = ours.recv()
    body = {"prompt": [100] * 16, "max_tokens": args.tokens, "ignore_eos": True, "temperature": 0.6, "stream": args.stream}
    if args.stream:
        body["stream_options"] = {"include_usage": True}
    load = Load(ServerAddress("127.0.0.1", port), "/v1/completions", [TimedRequest(json.dumps(body).encode())] * args.streams)
    print(f"{args.streams} streams of {args.tokens} tokens, event loop {loop}, {args.client_processes} client processes, "
          f"server process {server.pid}", flush=True)
    for _ in range(args.repeats):
        pids = {"server": server.pid} | ({"engine": engine_pid} if engine_pid else {})
        before = {name: cpu_seconds(pid) for name, pid in pids.items()}
        begin, outcomes = run_load(load, args.client_processes)
        after = {name: cpu_seconds(pid) for name, pid in pids.items()}
        used = {name: sum(after[name]) - sum(before[name]) for name in pids}
        used["kernel"] = after["server"][1] - before["server"][1]
        report(begin, outcomes, used, args)
    ours.send("end")
    ours.recv()
    server.join()


def report(begin: float, outcomes: list[Any], used: dict[str, float], args: argparse.Namespace) -> None:
    errors = [o.error for o in outcomes if o.error]
    if errors:
        sys.exit(f"{len(errors)} requests failed: {errors[0]}")
    tokens = sum(o.tokens for o in outcomes)
    events = sum(len(o.times) for o in outcomes)
    if tokens != args.streams * args.tokens or (args.stream and events != tokens):
        sys.exit(f"wrong counts: {events} events, {tokens} tokens, expected {args.streams * args.tokens}")
    seconds = max(o.end for o in outcomes) - begin
    gaps = [1e3 * (b - a) for o in outcomes for a, b in zip(o.times, o.times[1:], strict=False)] or [0.0]
    per_event = {name: 1e6 * s / tokens for name, s in used.items()}
    print(json.dumps({
        "tokens_per_s": round(tokens / seconds), "server_us_per_token": round(per_event["server"], 2),
        "of_that_in_kernel": round(per_event["kernel"], 2),
        "tokens_per_server_core_s": round(1e6 / per_event["server"]),
        "engine_us_per_token": round(per_event.get("engine", 0.0), 2),
        "itl_ms_p50": round(percentile(gaps, 50), 2), "itl_ms_p99": round(percentile(gaps, 99), 2),
    }), flush=True)


if __name__ == "__main__":
    main()
