"""How well `minivllm plan` predicts the memory of a start, on this machine's GPU, with random weights.

    python -m bench.plan_check --shape mistral-7b --stored awq --memory-gib 6.8 [--max-num-seqs 32 --max-num-batched-tokens 2048 ..]

For each column of the memory ledger: what the plan says, what the start measured, and the difference as a part of the usable memory.
`--memory-gib` limits the engine to so much of the GPU's memory. Other flags are those of the engine.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import torch

from bench import models
from minivllm.cli.flags import add_config_flags, build, given
from minivllm.config import EngineConfig
from minivllm.engine.compose import build_engine
from minivllm.engine.plan_model import gpu_here, plan_model
from minivllm.families import parse_config
from minivllm.planning.memory_plan import GIB
from minivllm.planning.what_if import quantization_config
from minivllm.quantization.methods import METHODS, ONLINE
from minivllm.worker.worker import Worker

FIELDS = ("dtype", "max_model_len", "gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens", "enforce_eager", "block_size")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=models.SHAPES, default="mistral-7b")
    parser.add_argument("--stored", metavar="NAME", help="storage of the weights: awq, gptq, Q4_K_M, fp8, ... (default: 16 bits)")
    parser.add_argument("--memory-gib", type=float, help="GiB of the GPU's memory that the engine may take")
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
                                     skip_tokenizer_init=True, quantization=online)
        if args.memory_gib is not None:
            config = dataclasses.replace(config, gpu_memory_utilization=args.memory_gib * GIB / gpu.memory)
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
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
