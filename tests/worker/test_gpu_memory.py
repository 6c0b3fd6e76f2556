"""No memory grows after start-up: requests arrive, finish and are aborted for long, in every kind of step, graphs included."""
from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minivllm import LLM, SamplingParams

pytestmark = pytest.mark.gpu
ROWS, LONGEST, SETTLED, STEPS = 16, 200, 50, 300
KINDS = [
    dict(temperature=0),
    dict(temperature=0.8, top_p=0.9, logprobs=3),
    dict(temperature=1.2, top_k=7, min_p=0.01),
    dict(temperature=0, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=-0.5, logprobs=0, prompt_logprobs=2),
    dict(temperature=1.0, min_tokens=3, logit_bias={5: 4.0, 9: -100}, stop_token_ids=[11]),
    dict(temperature=1.0, allowed_token_ids=[3, 4, 5]),
    dict(temperature=0.9, bad_words_token_ids=((5, 6), (7, 8, 9)), repetition_penalty=1.1),
]


class Load:
    """Requests at random."""

    def __init__(self, llm: LLM) -> None:
        self.engine, self.rng, self.alive, self.added = llm.llm_engine.core, random.Random(0), [], 0
        self.allocated: list[int] = []  # after each step
        self.reserved: list[int] = []

    def add(self, kind: dict, prompt_len: int, output_len: int) -> None:
        prompt = {"prompt_token_ids": [self.rng.randrange(2, 320) for _ in range(prompt_len)]}
        self.engine.add_request(str(self.added), prompt, SamplingParams(**kind, max_tokens=output_len, ignore_eos=True, detokenize=False))
        self.alive.append(str(self.added))
        self.added += 1

    def step(self) -> None:
        ended = {delta.request_id for delta in self.engine.step() if delta.finish_reason is not None}
        self.alive = [name for name in self.alive if name not in ended]
        self.allocated.append(torch.cuda.memory_allocated())
        self.reserved.append(torch.cuda.memory_reserved())

    def random_step(self) -> None:
        """Add some requests, perhaps abort one, and run a step."""
        while len(self.alive) < ROWS and self.rng.random() < 0.5:
            self.add(self.rng.choice(KINDS), self.rng.randint(1, LONGEST), self.rng.randint(4, 40))
        if self.alive and self.rng.random() < 0.05:
            self.engine.abort_request(self.alive.pop(self.rng.randrange(len(self.alive))))
        self.step()


def test_no_memory_is_allocated_after_the_first_steps(tiny_llama: Callable[..., Path]) -> None:
    with LLM(model=str(tiny_llama()), device="cuda", dtype="bfloat16", num_gpu_blocks_override=300, max_num_seqs=ROWS,
             max_num_batched_tokens=1024, cuda_graph_capture="start") as llm:
        load = Load(llm)
        for kind in KINDS:  # the largest steps there can be of each kind, so that the random ones need no more
            for _ in range(ROWS):
                load.add(kind, LONGEST, 4)
            while load.alive:
                load.step()
        for _ in range(SETTLED):
            load.random_step()
        allocated, reserved = max(load.allocated), max(load.reserved)
        sizes = set()
        for _ in range(STEPS):
            load.random_step()
            sizes.add(len(load.alive))
            assert load.allocated[-1] <= allocated and load.reserved[-1] <= reserved
        assert len(sizes) > 5 and load.added > 100  # it was a long run of changing batches


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17])
def test_graphs_of_short_sequences_are_captured_inside_their_tables(tiny_llama: Callable[..., Path], length: int) -> None:
    """An index out of bounds would fail here or at the next synchronization."""
    found = []
    for eager in (True, False):
        with LLM(model=str(tiny_llama()), device="cuda", dtype="float32", num_gpu_blocks_override=64, max_num_seqs=4, max_model_len=length,
                 max_num_batched_tokens=64, enforce_eager=eager, cuda_graph_capture="start") as llm:
            params = SamplingParams(temperature=0, max_tokens=0 if length == 1 else 99, ignore_eos=True, prompt_logprobs=0)
            found.append([output.outputs[0].token_ids for output in llm.generate([[5], [6], [7]], params, use_tqdm=False)])
            torch.cuda.synchronize()
    assert found[0] == found[1] and [len(tokens) for tokens in found[0]] == [length - 1] * 3


def test_bad_words_and_penalties_give_the_tokens_of_a_cpu(tiny_llama: Callable[..., Path]) -> None:
    words = (*((a, b) for a in range(160) for b in range(320) if (a + b) % 3 == 0), (170, 171, 172), (180,) * 5)
    params = [SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, bad_words_token_ids=words),
              SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, repetition_penalty=1e30, frequency_penalty=1.5)]
    found = []
    for device in ("cpu", "cuda"):
        with LLM(model=str(tiny_llama()), device=device, dtype="float32", num_gpu_blocks_override=64, max_num_seqs=4) as llm:
            found.append([o.outputs[0].token_ids for o in llm.generate([[5, 6], [7, 8]], params, use_tqdm=False)])
    assert found[0] == found[1]
    assert all((a, b) not in words for a, b in itertools.pairwise(found[0][0]))
