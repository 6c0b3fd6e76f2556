"""Speculative decoding from `speculative_config` to the metrics: it changes no token, and what it did is reported."""
from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minivllm import LLM
from minivllm.engine.metrics_reader import Counter, Vector
from minivllm.errors import InvalidInput
from minivllm.kernels.tuning import SPECULATION, SpeculationCost
from minivllm.sampling_params import SamplingParams, StructuredOutputsParams
from tests.engine.test_drafts import GREEDY, REQUESTS, SEEDED, Tokens, build, generate

pytestmark = pytest.mark.usefixtures("one_torch_thread")

LOOP = [5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]
WANTED = REQUESTS | {
    "loop": (LOOP, replace(GREEDY, max_tokens=40)), "seeded loop": (LOOP, replace(SEEDED, temperature=0.3, max_tokens=40, n=2)),
    "prompt logprobs": (LOOP, replace(GREEDY, prompt_logprobs=1, logprobs=1, max_tokens=12)),
    "longest": (LOOP * 9, replace(GREEDY, max_tokens=None)),  # ends at max_model_len
    **{f"few tokens {n}": (LOOP[:n], replace(GREEDY, allowed_token_ids=list(range(9, 9 + n)), max_tokens=60)) for n in (1, 2, 3)},
    "letters": (LOOP, replace(GREEDY, max_tokens=50, structured_outputs=StructuredOutputsParams(regex="(ab|ba){20}"))),
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {}, "ahead": {"async_scheduling": True}, "small chunks": {"max_num_batched_tokens": 11, "max_num_seqs": 8, "block_size": 4},
    "no prefix cache": {"enable_prefix_caching": False, "async_scheduling": True}, "one row": {"max_num_seqs": 1, "async_scheduling": True},
    "preempted": {"num_gpu_blocks_override": 20, "block_size": 8, "async_scheduling": True},
    "swapped": {"num_gpu_blocks_override": 20, "block_size": 8, "kv_offloading_size": 2**-8},
}
FORMATS: dict[str, dict[str, Any]] = {"fp8 cache": {"kv_cache_dtype": "fp8"}, "int8 weights": {"quantization": "int8"}}


def ngram(k: int = 4, **entries: Any) -> dict[str, Any]:
    return {"method": "ngram", "num_speculative_tokens": k, "prompt_lookup_min": 1, "prompt_lookup_max": 3, **entries}


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


def answers(folder: Path, names: Collection[str] = WANTED, **config: Any) -> Tokens:
    engine = build(folder, **config)
    found = generate(engine, {name: WANTED[name] for name in names})[0]
    engine.close()
    return found


@pytest.fixture(scope="module")
def plain(folder: Path) -> Tokens:
    return answers(folder)


@pytest.fixture
def free_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts cost nothing, so as many as possible are verified."""
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(SPECULATION, device, SpeculationCost(1e9, 0.0, 1000))


@pytest.mark.usefixtures("free_drafts")
@pytest.mark.parametrize(("way", "k"), [
    ("plain", 1), ("plain", 8), ("ahead", 2), ("ahead", 5), ("small chunks", 3), ("no prefix cache", 4), ("one row", 6), ("preempted", 7),
    ("swapped", 4)])
def test_ngram_drafts_change_no_token(folder: Path, plain: Tokens, way: str, k: int) -> None:
    engine = build(folder, speculative_config=ngram(k), **WAYS[way])
    for _ in range(2 if way in ("plain", "small chunks") else 1):  # the second time with cached prefixes
        found, deltas = generate(engine, WANTED)
        assert found == plain
    counts = engine.stats().drafts
    assert counts is not None and counts.num_accepted > 30 and counts.num_drafts > counts.num_accepted
    assert len(counts.accepted_per_position) == k and counts.accepted_per_position == sorted(counts.accepted_per_position, reverse=True)
    assert sum(len(e.logprobs or ()) for e in deltas["prompt logprobs#0"]) == 12
    assert (engine.stats().num_preemptions > 0) == (way in ("preempted", "swapped"))
    engine.close()


@pytest.mark.usefixtures("free_drafts")
@pytest.mark.parametrize("form", FORMATS)
def test_drafts_change_no_token_of_a_quantized_model_or_cache(folder: Path, form: str) -> None:
    names = ("greedy", "seeded", "few tokens 2", "letters")
    assert answers(folder, names, speculative_config=ngram(2), **FORMATS[form]) == answers(folder, names, **FORMATS[form])


def test_requests_can_be_aborted_and_the_cache_reset_while_drafts_are_verified(folder: Path, plain: Tokens) -> None:
    engine = build(folder, speculative_config=ngram(), async_scheduling=True)
    for name in ("loop", "greedy", "longest"):
        engine.add_request(name, {"prompt_token_ids": WANTED[name][0]}, WANTED[name][1])
    tokens: dict[str, list[int]] = {}
    for step in range(1000):
        if not engine.has_unfinished_requests():
            break
        for delta in engine.step() + (engine.abort_request("longest") if step == 5 else []):
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
        if step == 7:
            engine.reset_prefix_cache()
        engine.scheduler.check()
    assert (tokens["loop"], tokens["greedy"]) == (plain["loop#0"], plain["greedy#0"])
    assert engine.stats().used_blocks == 0
    engine.close()


def test_a_beam_search_has_no_drafts(folder: Path) -> None:
    from minivllm import BeamSearchParams

    found, params = [], BeamSearchParams(beam_width=3, max_tokens=8)
    for speculative in (None, ngram()):
        with LLM(str(folder), device="cpu", dtype="float32", max_model_len=128, num_gpu_blocks_override=200,
                 speculative_config=speculative) as llm:
            found.append([s.tokens for s in llm.beam_search([{"prompt_token_ids": LOOP}], params)[0].sequences])
    assert found[0] == found[1]


def test_outputs_and_metrics_report_the_acceptance_by_position(folder: Path) -> None:
    with LLM(str(folder), device="cpu", dtype="float32", max_model_len=128, num_gpu_blocks_override=200,
             speculative_config=ngram(3), disable_log_stats=False) as llm:
        output = llm.generate({"prompt_token_ids": LOOP}, replace(WANTED["few tokens 2"][1], n=1))[0]
        metrics = {metric.name: metric for metric in llm.get_metrics()}
    assert output.metrics is not None and output.metrics.drafts is not None
    counts = output.metrics.drafts
    assert counts.num_steps + counts.num_accepted >= 40 and len(counts.accepted_per_position) == 3
    values = {name: metric.value for name, metric in metrics.items() if isinstance(metric, Counter)}
    assert values["minivllm:spec_decode_num_drafts"] == counts.num_steps
    assert values["minivllm:spec_decode_num_draft_tokens"] == counts.num_drafts
    assert values["minivllm:spec_decode_num_accepted_tokens"] == counts.num_accepted
    positions = metrics["minivllm:spec_decode_num_accepted_tokens_per_pos"]
    assert isinstance(positions, Vector) and positions.values == counts.accepted_per_position


@pytest.mark.parametrize(("entries", "message"), [
    ({"method": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens must be at least 1, got 0"),
    ({"method": "ngram", "num_speculative_tokens": 99}, "num_speculative_tokens must be at most 16, got 99"),
    ({"method": "ngram", "num_speculative_tokens": True}, "num_speculative_tokens must be a whole number, got True"),
    ({"method": "ngram"}, "needs num_speculative_tokens"), ({"num_speculative_tokens": 3}, "needs method"),
    ({"method": "ngrams", "num_speculative_tokens": 3}, "method must be one of .*did you mean 'ngram'"),
    ({"method": "ngram", "num_speculative_token": 3}, "has no entry 'num_speculative_token'.*did you mean 'num_speculative_tokens'"),
    (ngram(prompt_lookup_min=4), "prompt_lookup_min .4. must be at most prompt_lookup_max .3."),
    (ngram(model="x"), "model has no effect with method 'ngram'"), (ngram(disable_by_batch_size=1), "must be at least 2, got 1"),
    (ngram(draft_sample_method="probabilistic"), "draft_sample_method has no effect"),
    (ngram(draft_tensor_parallel_size=2), "draft_tensor_parallel_size=2 is not supported yet"),
])
def test_a_wrong_setting_is_an_error_that_names_it(entries: dict[str, Any], message: str) -> None:
    from minivllm.config import EngineConfig

    with pytest.raises(InvalidInput, match=message) as caught:
        EngineConfig(speculative_config=entries)
    assert caught.value.param == "speculative_config"


def test_the_older_spellings_give_the_same_settings() -> None:
    from minivllm.config import EngineConfig

    old = EngineConfig.from_kwargs(speculative_model="[ngram]", num_speculative_tokens=5, ngram_prompt_lookup_max=4,
                                   ngram_prompt_lookup_min=2, speculative_disable_by_batch_size=16)
    new = EngineConfig(speculative_config={"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2,
                                           "disable_by_batch_size": 16})
    assert old.speculation == new.speculation


def test_drafts_stop_where_they_do_not_pay(folder: Path) -> None:
    """With a temperature far above 1 the next token is nearly random, so no draft is right."""
    engine = build(folder, speculative_config=ngram())
    generate(engine, {"random": (LOOP, SamplingParams(temperature=50.0, seed=1, ignore_eos=True, max_tokens=100))})
    counts = engine.stats().drafts
    assert counts is not None and counts.num_steps < 30
    engine.close()
