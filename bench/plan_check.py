"""How well `minivllm plan` predicts the memory of a start, on this machine's GPU, with random weights.

    python -m bench.plan_check --shape mistral-7b --stored awq --memory-gib 6.8 [--max-num-seqs 32 --max-num-batched-tokens 2048 ..]
    python -m bench.plan_check --shape mistral-7b --stored awq --memory-gib 6.8 --requests 8 --tokens 2000

For each column of the memory ledger: what the plan says, what the start measured, and the difference as a part of the usable memory.
`--memory-gib` limits the engine to so much of the GPU's memory, and PyTorch's allocator too, so that a larger use fails as on a small
card. `--requests` then runs so many requests at once, each of `--tokens` tokens, half of them output. Other flags are those of the engine.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench import models
from minivllm.benchmarks.workloads import FIRST_ID, LAST_ID
from minivllm.cli.flags import add_config_flags, build, given
from minivllm.config import EngineConfig
from minivllm.engine.compose import build_engine
from minivllm.engine.engine import EngineCore
from minivllm.engine.plan_model import gpu_here, plan_model
from minivllm.families import parse_config
from minivllm.planning.memory_plan import GIB
from minivllm.planning.what_if import quantization_config
from minivllm.quantization.methods import METHODS, ONLINE
from minivllm.sampling_params import SamplingParams
from minivllm.worker.worker import Worker

FIELDS = ("dtype", "max_model_len", "gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens", "enforce_eager", "block_size")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=models.SHAPES, default="mistral-7b")
    parser.add_argument("--stored", metavar="NAME", help="storage of the weights: awq, gptq, Q4_K_M, fp8, ... (default: 16 bits)")
    parser.add_argument("--memory-gib", type=float, help="GiB of the GPU's memory that the engine may take")
    parser.add_argument("--requests", type=int, default=0, help="requests to run at once after the start (default: 0)")
    parser.add_argument("--tokens", type=int, default=2000, help="tokens of each request, prompt and output together (default: 2000)")
    add_config_flags(parser, EngineConfig, "engine", only=FIELDS)
    args = parser.parse_args()
    gpu = gpu_here()
    if gpu is None:
        print("plan_check needs a GPU", file=sys.stderr)
        return 1
    described = models.config_of(args.shape)
    online = args.stored if args.stored in ONLINE else None
    if args.stored and online is None:
        described["quantization_config"] = dict(quantization_config(args.stored, parse_config(described), METHODS))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(described))
        config = dataclasses.replace(build(EngineConfig, given(args, EngineConfig)), model=folder, device="cuda", load_format="dummy",
                                     skip_tokenizer_init=True, quantization=online, cuda_graph_capture="start")
        if args.memory_gib is not None:
            config = dataclasses.replace(config, gpu_memory_utilization=args.memory_gib * GIB / gpu.memory)
            torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory_gib * GIB / gpu.memory))
        plan = plan_model(config, described, gpu).memory
        engine = build_engine(config)
    worker = engine.executor
    assert isinstance(worker, Worker) and worker.ledger is not None
    ledger, names = worker.ledger, ("weights", "step", "graphs", "rows", "other", "cache")
    planned = (plan.weight_bytes, plan.step, plan.graphs, plan.rows, plan.other, plan.cache)
    measured = (ledger.weights, ledger.step, ledger.graphs_planned, ledger.rows, ledger.other, ledger.cache)
    print(f"{'MiB':<10}{'plan':>10}{'start':>10}{'part of ' + format(plan.usable / GIB, '.2f') + ' GiB':>20}")
    for name, ours, theirs in zip(names, planned, measured, strict=True):
        print(f"{name:<10}{ours / 2**20:>10.1f}{theirs / 2**20:>10.1f}{(ours - theirs) / plan.usable:>20.2%}")
    print(f"graphs took {ledger.graphs_taken / 2**20:.1f} MiB; blocks {plan.num_blocks:,} planned, {worker.num_blocks:,} allocated")
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "shape": args.shape, "stored": args.stored,
                      "plan": dict(zip(names, planned, strict=True)), "start": dict(zip(names, measured, strict=True))}))
    if args.requests:
        print(run_requests(engine, args.requests, args.tokens))
    engine.close()
    return 0


def run_requests(engine: EngineCore, count: int, tokens: int) -> str:
    """Runs requests at once, and says what they took. Raises RuntimeError for a request that ends with an error or early."""
    rng, outputs = random.Random(0), [0] * count
    params = SamplingParams(temperature=0, max_tokens=tokens - tokens // 2, ignore_eos=True)
    for i in range(count):
        engine.add_request(str(i), {"prompt_token_ids": [rng.randint(FIRST_ID, LAST_ID) for _ in range(tokens // 2)]}, params)
    start, used = time.perf_counter(), 0
    while engine.has_unfinished_requests():
        for delta in engine.step():
            if delta.error is not None:
                raise RuntimeError(f"request {delta.request_id}: {delta.error}")
            outputs[int(delta.request_id)] += len(delta.token_ids)
        free, total = torch.cuda.mem_get_info()
        used = max(used, total - free)
    if outputs != [params.max_tokens] * count:
        raise RuntimeError(f"output tokens: {outputs}, not {params.max_tokens} each")
    return (f"{count} requests of {tokens:,} tokens: {sum(outputs) / (time.perf_counter() - start):,.0f} output tokens/s, "
            f"{engine.stats().num_preemptions} preemptions; the GPU's memory in use: at most {used / GIB:.2f} GiB, "
            f"PyTorch's at most {torch.cuda.max_memory_reserved() / GIB:.2f} GiB")


if __name__ == "__main__":
    sys.exit(main())
