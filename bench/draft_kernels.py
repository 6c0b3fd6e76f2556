"""What drafts cost on a GPU: the small kernels around a step, and the steps of the default model with and without them.

    python -m bench.draft_kernels [--steps]

    kernels   µs of each kernel alone: n-gram lookup reads the whole text, because nothing in it matches
    --steps   the default model with n-gram drafts. `graph`: µs of the captured step, and of the captured proposer, by sequences and tokens
              of each. `engine`: ms per step of the whole engine, if the step has so many drafts for every sequence. 0 drafts: plain steps
              of an engine with a proposer
"""
from __future__ import annotations

import argparse
import random
import time
from functools import partial
from typing import Any
from unittest import mock

import torch

from bench import machine
from bench.gpu_timing import replay_seconds, seconds
from minivllm.config import EngineConfig
from minivllm.engine.compose import build_engine
from minivllm.engine.engine import EngineCore
from minivllm.kernels import select
from minivllm.kernels.reference.drafts import PlannedStep
from minivllm.sampling_params import SamplingParams
from minivllm.speculative.adaptive import Acceptance
from minivllm.speculative_config import SpeculativeConfig

NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
SIZES = ((1, 2000), (8, 2000), (8, 8000), (64, 8000))  # (sequences, tokens of each text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.draft_kernels", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", action="store_true")
    args = parser.parse_args()
    print(machine.one_line(machine.describe("cuda", 1)), flush=True)
    kernels()
    if args.steps:
        for streams in (1, 8):
            plain = step_time(None, streams, 0)
            for drafts in (0, 2, 5):
                found = step_time(NGRAM, streams, drafts)
                print(f"engine: {streams} streams, {drafts} drafts: {found * 1e3:.3f} ms per step, {found / plain:.3f} of the "
                      f"{plain * 1e3:.3f} ms without a proposer", flush=True)


def kernels() -> None:
    device, width, k = torch.device("cuda"), 6, 5
    ops, whole = select(device), torch.empty(0, dtype=torch.int64, device=device)
    for num_seqs, length in SIZES:
        text = torch.randperm((num_seqs + 1) * 8192, device=device).to(torch.int32).view(num_seqs + 1, 8192)
        rows, lengths = torch.arange(num_seqs, device=device), torch.full((num_seqs + 1,), length, device=device)
        source, width_of = rows.repeat_interleave(width), torch.arange(width, device=device).repeat(num_seqs)
        positions, tables = length + width_of, torch.ones((1, num_seqs + 1, 520), dtype=torch.int32, device=device)
        index, some = source * 8192 + positions, torch.ones(num_seqs * width, dtype=torch.bool, device=device)
        seq_lens, ends = torch.full((num_seqs,), length + width, dtype=torch.int32, device=device), lengths[:-1] + 3
        plan = PlannedStep(rows, ends, seq_lens, source, some, positions, index, index + 1, index)
        drafts = whole.new_ones((num_seqs, k))
        calls = {
            "exact_step": partial(ops.exact_step, plan, text, lengths, tables, 16, 1, True),
            "accept_drafts": partial(ops.accept_drafts, text, lengths, rows, ends, seq_lens, index + 1, index, some[num_seqs:]),
            "proposer_inputs": partial(ops.proposer_inputs, text, rows, source, positions, rows * width),
            "write_drafts": partial(ops.write_drafts, text, rows, ends, lengths[:-1], drafts, 8192),
            "find_ngrams": partial(ops.find_ngrams, text, rows, lengths[:-1] * 0 + length, 2, 4, k)}
        times = [f"{name} {seconds([call] * 20) * 1e6:.1f}" for name, call in calls.items()]
        print(f"kernels: {num_seqs} sequences, {length} tokens: {', '.join(times)} µs", flush=True)


def step_time(speculative: dict[str, Any] | None, streams: int, drafts: int) -> float:
    """Seconds per step. Prompts of 300 tokens; drafts are found in most steps, since a small model soon repeats itself."""
    config = EngineConfig(device="cuda", max_model_len=2048, max_num_seqs=8, speculative_config=speculative)
    with mock.patch.object(Acceptance, "length", lambda self, num_seqs, most, cost: min(drafts, most)):
        engine = build_engine(config)
        best = min(run(engine, streams) for _ in range(3))
        if speculative is not None and drafts == SpeculativeConfig.of(NGRAM).num_speculative_tokens:
            graphs(engine, streams)
        engine.close()
    return best


def run(engine: EngineCore, streams: int) -> float:
    params = SamplingParams(temperature=0, max_tokens=250, ignore_eos=True, detokenize=False)
    for i in range(streams):
        prompt = [random.Random(i).randrange(1000, 40000) for _ in range(100)] * 3
        engine.add_request(f"{time.perf_counter()}", {"prompt_token_ids": prompt}, params)
    for _ in range(4):
        engine.step()
    begin, steps = time.perf_counter(), 0
    while engine.has_unfinished_requests():
        engine.step()
        steps += 1
    return (time.perf_counter() - begin) / steps


def graphs(engine: EngineCore, streams: int) -> None:
    runner: Any = engine.executor
    for graph in runner.runner._graphs._decodes:
        if graph.shape.seqs == streams:
            times = [replay_seconds(part.replay, 30) * 1e6 for part in (graph._graph, graph._second)]
            print(f"graph: {graph.shape.seqs} sequences, {graph.shape.query_width} tokens each, up to {graph.shape.longest} keys: step "
                  f"{times[0]:.0f} µs, proposer {times[1]:.0f} µs", flush=True)


if __name__ == "__main__":
    main()
