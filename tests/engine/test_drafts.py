"""Drafts in the whole engine: they are verified as wide decodes and do not change a token.

The proposer of these tests knows the answers, so a test decides how many drafts are right. All other parts are real: scheduler, worker,
sampler, detokenizer.
"""
from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minivllm.config import EngineConfig
from minivllm.core.plan import StepPlan, StepResult
from minivllm.engine.compose import build_engine
from minivllm.engine.engine import EngineCore
from minivllm.outputs import OutputDelta
from minivllm.sampling_params import SamplingParams, StructuredOutputsParams

pytestmark = pytest.mark.usefixtures("one_torch_thread")

Tokens = dict[str, list[int]]
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
SEEDED = replace(GREEDY, temperature=1.0, seed=3)


def requests() -> dict[str, tuple[list[int], SamplingParams]]:
    rng = random.Random(5)
    base = [rng.randrange(2, 320) for _ in range(50)]
    return {
        "greedy": (base[:33], GREEDY), "other": ([rng.randrange(2, 320) for _ in range(9)], GREEDY), "one token": (base[:1], GREEDY),
        "seeded": (base[:20], SEEDED), "children": (base[:21], replace(SEEDED, n=3)), "short": (base[:40], replace(GREEDY, max_tokens=3)),
        "penalized": (base[:30], replace(SEEDED, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.3)),
        "filtered": (base[:12], replace(SEEDED, top_k=20, top_p=0.9, logprobs=2)),
        "grammar": (base[:14], replace(SEEDED, ignore_eos=False, structured_outputs=StructuredOutputsParams(regex="[a-z ]{30,40}"))),
    }


REQUESTS = requests()


class Proposing:
    """An executor that adds drafts to the results of another one."""

    def __init__(self, executor: Any, propose: Callable[[str, tuple[int, ...]], tuple[int, ...]]) -> None:
        self.executor, self.propose = executor, propose
        self.num_blocks, self.num_host_blocks = executor.num_blocks, executor.num_host_blocks
        self.num_drafts = self.num_accepted = 0

    def launch(self, plan: StepPlan) -> Any:
        return plan, self.executor.launch(plan)

    def sample(self, step: Any, masks: Any = None) -> Any:
        return Proposed(self, step[0], self.executor.sample(step[1], masks))

    def close(self) -> None:
        self.executor.close()


class Proposed:
    def __init__(self, owner: Proposing, plan: StepPlan, step: Any) -> None:
        self.owner, self.plan, self.step = owner, plan, step

    def wait(self) -> StepResult:
        result: StepResult = self.step.wait()
        self.owner.num_drafts += sum(map(len, self.plan.drafts))
        self.owner.num_accepted += sum(len(tokens) - 1 for tokens in result.token_ids)
        drafts = tuple(self.owner.propose(name, tokens) for name, tokens in zip(self.plan.sample_ids, result.token_ids, strict=True))
        return replace(result, drafts=drafts)


def build(folder: Path, **config: Any) -> EngineCore:
    settings = {"model": str(folder), "device": "cpu", "dtype": "float32", "max_model_len": 128, "num_gpu_blocks_override": 200, **config}
    return build_engine(EngineConfig(**settings))


def proposing(engine: EngineCore, propose: Callable[[str, tuple[int, ...]], tuple[int, ...]]) -> tuple[EngineCore, Proposing]:
    """The same engine with an executor that proposes."""
    executor = Proposing(engine.executor, propose)
    return EngineCore(executor=executor, scheduler=engine.scheduler, tokenizer=engine.tokenizer, info=engine.info()), executor


def generate(
    engine: EngineCore, wanted: dict[str, tuple[list[int], SamplingParams]] = REQUESTS,
) -> tuple[Tokens, dict[str, list[OutputDelta]]]:
    for name, (prompt, params) in wanted.items():
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    deltas: dict[str, list[OutputDelta]] = {}
    while engine.has_unfinished_requests():
        for delta in engine.step():
            deltas.setdefault(f"{delta.request_id}#{delta.index}", []).append(delta)
        engine.scheduler.check()
    return {name: [token for delta in some for token in delta.token_ids] for name, some in deltas.items()}, deltas


@pytest.fixture(scope="module")
def plain(tiny_llama: Callable[..., Path]) -> tuple[Tokens, dict[str, list[OutputDelta]]]:
    engine = build(tiny_llama())
    found = generate(engine)
    engine.close()
    return found


def proposer(answers: Tokens, k: int, right: Callable[[int], int]) -> Callable[[str, tuple[int, ...]], tuple[int, ...]]:
    known: dict[str, int] = {}

    def propose(name: str, tokens: tuple[int, ...]) -> tuple[int, ...]:
        known[name] = known.get(name, 0) + len(tokens)
        true = answers[name if "#" in name else f"{name}#0"][known[name] :][:k]
        good = right(len(true))
        return (*true[:good], *((token + 1) % 320 for token in true[good:]))

    return propose


RIGHT: dict[str, Callable[[int], int]] = {"all accepted": lambda n: n, "all rejected": lambda n: 0, "half": lambda n: n // 2}
WAYS: dict[str, dict[str, Any]] = {
    "plenty": {}, "small chunks": {"max_num_batched_tokens": 11, "max_num_seqs": 8, "block_size": 4}, "ahead": {"async_scheduling": True},
    "preempted": {"num_gpu_blocks_override": 17, "block_size": 8}, "swapped": {"num_gpu_blocks_override": 17, "block_size": 8,
                                                                               "kv_offloading_size": 2**-8},
}


@pytest.mark.parametrize(("way", "k", "right"), [
    ("plenty", 1, "all accepted"), ("plenty", 3, "all rejected"), ("plenty", 8, "half"), ("small chunks", 2, "half"),
    ("small chunks", 8, "all accepted"), ("ahead", 3, "half"), ("preempted", 4, "all accepted"), ("preempted", 2, "all rejected"),
    ("swapped", 4, "half"),
])
def test_no_token_changes_with_drafts(
    tiny_llama: Callable[..., Path], plain: tuple[Tokens, dict[str, list[OutputDelta]]], way: str, k: int, right: str,
) -> None:
    engine, executor = proposing(build(tiny_llama(), **WAYS[way]), proposer(plain[0], k, RIGHT[right]))
    got, deltas = generate(engine)
    assert got == plain[0]
    entries = [[round(e.logprob, 4) for delta in found["filtered#0"] for e in delta.logprobs or ()] for found in (deltas, plain[1])]
    assert entries[0] == pytest.approx(entries[1], abs=1e-3) and len(entries[0]) == 20
    assert executor.num_drafts > 20
    assert {"all accepted": executor.num_accepted == executor.num_drafts, "all rejected": executor.num_accepted == 0,
            "half": 0 < executor.num_accepted < executor.num_drafts}[right]
    if way in ("preempted", "swapped"):
        assert engine.scheduler.stats().num_preemptions > 0
    engine.close()


def test_a_stop_string_and_a_stop_token_inside_accepted_drafts_end_the_output_where_plain_decoding_does(
    tiny_llama: Callable[..., Path], plain: tuple[Tokens, dict[str, list[OutputDelta]]],
) -> None:
    text = "".join(delta.text for delta in plain[1]["greedy#0"])
    token = plain[0]["other#0"][11]
    wanted = {"greedy": (REQUESTS["greedy"][0], replace(GREEDY, stop=[text[len(text) // 2 :][:4]])),
              "other": (REQUESTS["other"][0], replace(GREEDY, stop_token_ids=[token]))}
    found = []
    for drafts in (False, True):
        engine = build(tiny_llama())
        if drafts:
            engine, _ = proposing(engine, proposer(plain[0], 5, lambda n: n))
        tokens, deltas = generate(engine, wanted)
        ends = {name: ("".join(d.text for d in some), some[-1].finish_reason, some[-1].stop_reason) for name, some in deltas.items()}
        found.append((tokens, ends))
        engine.close()
    assert found[0] == found[1]
    assert found[0][1]["other#0"][1:] == ("stop", token) and found[0][1]["greedy#0"][1] == "stop"


def test_a_mask_applies_to_its_own_sample_when_another_request_has_drafts(tiny_llama: Callable[..., Path]) -> None:
    """The step in which the prompt of the grammar request ends also verifies the drafts of the other request."""
    engine = build(tiny_llama())
    engine, executor = proposing(engine, lambda name, tokens: (7, 8) if name == "free" else ())
    engine.add_request("free", {"prompt_token_ids": [5, 6, 7]}, replace(GREEDY, max_tokens=12))
    engine.step()
    choice = StructuredOutputsParams(choice=("the cat", "the hat"))
    engine.add_request("grammar", {"prompt_token_ids": [9, 10]}, SamplingParams(temperature=0, max_tokens=20, structured_outputs=choice))
    texts: dict[str, str] = {}
    while engine.has_unfinished_requests():
        for delta in engine.step():
            texts[delta.request_id] = texts.get(delta.request_id, "") + delta.text
            assert delta.error is None
    assert texts["grammar"] in ("the cat", "the hat") and executor.num_drafts > 10
    engine.close()
