"""`minivllm bench latency` and `throughput`: an `LLM` in this process, with exact output lengths and without detokenization."""
from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minivllm.benchmarks.report import client_info
from minivllm.benchmarks.statistics import percentile
from minivllm.benchmarks.workloads import WorkloadRequest, nano, output_tokens, uniform
from minivllm.config import EngineConfig
from minivllm.engine.llm import LLM
from minivllm.sampling_params import SamplingParams

WARM_UP_SEED = 1000  # so that warm-up prompts differ from the measured ones


def run_latency(config: EngineConfig, args: argparse.Namespace) -> int:
    with _load(config) as llm:
        rounds = [uniform(args.batch_size, args.input_len, args.output_len, seed=i) for i in range(args.num_iters)]
        for i in range(args.num_iters_warmup):
            generate(llm, uniform(args.batch_size, args.input_len, args.output_len, seed=WARM_UP_SEED + i))
        seconds = [generate(llm, requests) for requests in rounds]
    result = {
        "avg_latency": sum(seconds) / len(seconds), "latencies": seconds,
        "percentiles": {f"{q:g}": percentile(seconds, q) for q in (10, 25, 50, 75, 90, 99)},
    }
    print(f"{args.batch_size} requests, {args.input_len} input and {args.output_len} output tokens each, {args.num_iters} rounds")
    print(f"mean latency: {result['avg_latency']:.3f} s")
    for q, value in result["percentiles"].items():  # type: ignore[attr-defined]
        print(f"p{q} latency: {value:.3f} s")
    _save(args.save, result)
    return 0


def run_throughput(config: EngineConfig, args: argparse.Namespace) -> int:
    if args.dataset_name == "nano":
        requests = nano()[:args.num_prompts]
    else:
        requests = uniform(args.num_prompts or 100, args.input_len, args.output_len)
    with _load(config) as llm:
        generate(llm, uniform(1, 16, 8, seed=WARM_UP_SEED))
        seconds = generate(llm, requests, show=True)
    out = output_tokens(requests)
    total = out + sum(len(request.prompt_token_ids) for request in requests)
    result = {
        "elapsed_time": seconds, "num_requests": len(requests), "total_num_tokens": total, "output_tokens": out,
        "requests_per_second": len(requests) / seconds, "tokens_per_second": total / seconds, "output_tokens_per_second": out / seconds,
    }
    print(f"throughput: {result['requests_per_second']:.2f} requests/s, {result['tokens_per_second']:.2f} total tokens/s, "
          f"{result['output_tokens_per_second']:.2f} output tokens/s")
    _save(args.save, result)
    return 0


def _load(config: EngineConfig) -> LLM:
    print(f"loading {config.model or 'the default model'} ...", file=sys.stderr, flush=True)
    return LLM(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})


def generate(llm: LLM, requests: Sequence[WorkloadRequest], show: bool = False) -> float:
    """Generate all outputs. Returns the seconds that it took."""
    vocabulary = llm.llm_engine.info().vocab_size  # workloads may have larger ids than a small vocabulary
    prompts = [{"prompt_token_ids": [token % vocabulary for token in request.prompt_token_ids]} for request in requests]
    params = [SamplingParams(temperature=r.temperature, max_tokens=r.output_len, ignore_eos=True, detokenize=False) for r in requests]
    begin = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=show)
    seconds = time.perf_counter() - begin
    assert [len(o.outputs[0].token_ids) for o in outputs] == [r.output_len for r in requests], "end-of-sequence tokens are ignored"
    return seconds


def _save(file: str | None, result: dict[str, Any]) -> None:
    if file is not None:
        Path(file).write_text(json.dumps({**client_info(), **result}, indent=1) + "\n", encoding="utf-8")
