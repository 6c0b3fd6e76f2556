"""One engine in one process: it loads a model, then prints a JSON line for each row of work. bench/run.py starts it with a job.

    -> {"row": "ready", "seconds": since the start of this process}
    -> {"row": "kernels", "logits_apart": 0.03, "tolerance": 0.1}         minivllm on a GPU: compared with the reference kernels
    -> {"row": "check", "tokens": [...], "gaps": [...] | null}
    -> {"row": "c8", "value": 170.2, "unit": "tok/s", "spread": 0.02}      or {"row": ..., "refused": "reason without a figure"}
"""
from __future__ import annotations

import importlib
import json
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minivllm.benchmarks import statistics, workloads
from minivllm.benchmarks.workloads import WorkloadRequest

ENGINES = {"minivllm": "bench.peers.minivllm_engine", "hf": "bench.peers.hf", "vllm": "bench.peers.vllm"}
SMALL_CACHE_ROW = "nano8gb"  # nano's work with SMALL_CACHE, about what an 8 GB card has left with the 0.6B shape
SMALL_CACHE = {"num_gpu_blocks_override": 2800, "block_size": 16}
Row = dict[str, Any]


class WrongOutput(Exception):
    """The engine did not do the work, so its time has no meaning."""


def main() -> None:
    job = json.loads(sys.argv[1])
    import torch

    torch.set_num_threads(job["threads"])
    engine = importlib.import_module(ENGINES[job["engine"]]).Engine(job)
    run(engine, workloads.uniform(1, 4, 1))
    say({"row": "ready", "seconds": round(time.time() - job["started"], 2), "dtype": engine.dtype,
         "parts": getattr(engine, "start_parts", None)})
    if hasattr(engine, "finish_start"):
        engine.finish_start()
    if job["check"]:
        tokens, gaps = engine.generate_with_gaps(workloads.check_requests())
        say({"row": "check", "tokens": tokens, "gaps": gaps})
    wrong = None
    if job["rows"] and job["device"] == "cuda" and hasattr(engine, "check_kernels"):
        verdict = engine.check_kernels()
        wrong = verdict.get("refused")
        say({"row": "kernels", **verdict})
    for name in job["rows"]:
        if wrong:  # wrong kernels can be fast
            say({"row": name, "refused": wrong})
        if wrong or name == "memory":
            continue
        try:
            say({"row": name, **measure(name, engine, job["repeats"], job["max_len"])})
        except Exception as error:  # a row that fails must not end the other rows
            say({"row": name, "refused": f"{type(error).__name__}: {error}"})
    if "memory" in job["rows"] and not wrong:
        other = job["engine"] == "vllm"
        say({"row": "memory", **({"refused": "vLLM's memory is in other processes"} if other else memory(job["device"]))})


def say(row: Row) -> None:
    print("BENCH " + json.dumps(row), flush=True)


def run(engine: Any, requests: list[WorkloadRequest]) -> float:
    """Do the work, check its token counts -> seconds."""
    start = time.perf_counter()
    tokens = engine.generate(requests)
    seconds = time.perf_counter() - start
    if [len(t) for t in tokens] != [r.output_len for r in requests]:
        raise WrongOutput(f"asked for {[r.output_len for r in requests]} tokens, got {[len(t) for t in tokens]}")
    return seconds


def measure(name: str, engine: Any, repeats: int, max_len: int) -> Row:
    """The figure of one row: the median over `repeats`, each with fresh prompts, after one small warm-up."""
    work = "nano" if name == SMALL_CACHE_ROW else name
    kind, number, length = re.fullmatch(r"([a-z]+)(\d*)x?(\d*)", work).groups()  # type: ignore[union-attr]

    def seed(i: int) -> str:  # of no other row or repetition, so that their prompts in the prefix cache do not shorten this one
        return f"{work} {i}"

    rows: dict[str, Callable[[int], tuple[float, str]]] = {
        "c": lambda i: throughput(engine, workloads.uniform(int(number), 128, 128, seed=seed(i))),
        "mixed": lambda i: throughput(engine, workloads.mixed(int(number), seed=seed(i))),
        "nano": lambda i: throughput(engine, workloads.nano(seed=i)),  # as published: seed 0
        "ttft": lambda i: (1e3 * run(engine, workloads.uniform(1, int(number), 1, seed=seed(i))), "ms"),
        "bs": lambda i: tpot(engine, int(number), seed(i)),
        "prefix": lambda i: prefix(engine, seed(i)),
        "long": lambda i: (run(engine, workloads.uniform(int(number), int(length), 1, seed=seed(i))), "s"),
        "longtpot": lambda i: cached_tpot(engine, int(number), int(length), seed(i)),
    }
    tokens = {"ttft": (number, 1), "long": (length, 1), "longtpot": (length, 257)}.get(kind)  # of one request: prompt, output
    if tokens and int(tokens[0]) + tokens[1] > max_len:
        raise WrongOutput(f"the model holds {max_len} tokens")
    if kind in ("ttft", "bs", "long", "longtpot"):
        rows[kind](1000)  # warm-up with the same shape, because these rows measure single steps
    values = []
    for i in range(repeats + 2 if kind == "ttft" else repeats):
        value, unit = rows[kind](i)
        values.append(value)
    middle, spread = statistics.median(values), statistics.spread(values)
    return {"value": round(middle, 3), "unit": unit, "spread": round(spread, 3), "repeats": len(values)}


def throughput(engine: Any, requests: list[WorkloadRequest]) -> tuple[float, str]:
    return workloads.output_tokens(requests) / run(engine, requests), "tok/s"


def tpot(engine: Any, count: int, seed: str) -> tuple[float, str]:
    """(time for 257 tokens - time for 1 token) / 256, in ms; each with fresh prompts."""
    one = run(engine, workloads.uniform(count, 128, 1, seed=f"{seed} one"))
    many = run(engine, workloads.uniform(count, 128, 257, seed=f"{seed} many"))
    return 1e3 * (many - one) / 256, "ms"


def cached_tpot(engine: Any, count: int, prompt_len: int, seed: str) -> tuple[float, str]:
    """As `tpot`, but with the same prompts each time, which the first run puts into the prefix cache."""
    run(engine, workloads.uniform(count, prompt_len, 1, seed))
    one = run(engine, workloads.uniform(count, prompt_len, 1, seed))
    many = run(engine, workloads.uniform(count, prompt_len, 257, seed))
    return 1e3 * (many - one) / 256, "ms"


def prefix(engine: Any, seed: str) -> tuple[float, str]:
    prime, requests = workloads.shared_prefix(seed=seed)
    run(engine, [prime])
    return run(engine, requests), "s"


def memory(device: str) -> Row:
    """Peak resident memory of this process over all rows so far. On a GPU also the peak of its memory."""
    status = Path("/proc/self/status")
    if status.exists():
        peak = int(re.search(r"VmHWM:\s+(\d+)", status.read_text()).group(1)) / 1024  # type: ignore[union-attr]
    else:  # macOS counts bytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    row: Row = {"value": round(peak), "unit": "MiB"}
    if device == "cuda":
        import torch

        row["gpu_mib"] = round(torch.cuda.max_memory_reserved() / 2**20)
    return row


if __name__ == "__main__":
    main()
