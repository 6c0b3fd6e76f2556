"""Adapters in the engine: tokens do not depend on the batch, on scheduling, or on what is swapped; loads and unloads leak nothing.

The model is a tiny random Llama in float32, and the adapters are random and strong, so that each gives other tokens.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minivllm import LLM, InvalidInput, LoRARequest, SamplingParams
from minivllm.sampling_params import BeamSearchParams, StructuredOutputsParams
from tests.lora.adapters import write_adapter

pytestmark = pytest.mark.usefixtures("one_torch_thread")

PROMPT = list(range(20, 61))
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
NUM_ADAPTERS = 5
Tokens = list[tuple[int, ...]]
SETTINGS: dict[str, Any] = {
    "dtype": "float32", "max_model_len": 64, "num_gpu_blocks_override": 400, "enable_lora": True, "max_lora_rank": 8}


@pytest.fixture(scope="module")
def base(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[LoRARequest]:
    root = tmp_path_factory.mktemp("adapters")
    return [LoRARequest(f"a{i}", i + 1, str(write_adapter(root / f"a{i}", base, rank=1 + i, seed=i))) for i in range(NUM_ADAPTERS)]


def open_llm(base: Path, **settings: Any) -> LLM:
    return LLM(str(base), **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def llm(base: Path) -> Iterator[LLM]:
    with open_llm(base, max_loras=2) as llm:
        yield llm


def ask(llm: LLM, requests: list[LoRARequest | None], params: SamplingParams = GREEDY, prompt: list[int] = PROMPT) -> Tokens:
    """Tokens of every child, request by request."""
    outputs = llm.generate([{"prompt_token_ids": prompt}] * len(requests), params, use_tqdm=False, lora_request=requests)
    llm.llm_engine.core.scheduler.check()
    return [tuple(child.token_ids) for output in outputs for child in output.outputs]


@pytest.fixture(scope="module")
def alone(llm: LLM, adapters: list[LoRARequest]) -> Tokens:
    """The tokens of each adapter, and (last) of the base model, each requested alone."""
    found = [ask(llm, [adapter])[0] for adapter in [*adapters, None]]
    assert len(set(found)) == NUM_ADAPTERS + 1, "an adapter changes nothing"
    return found


def test_the_base_model_answers_as_in_an_engine_without_adapters(base: Path, alone: Tokens) -> None:
    with LLM(str(base), **{k: v for k, v in SETTINGS.items() if "lora" not in k}) as plain:
        assert ask(plain, [None])[0] == alone[-1]


@pytest.mark.parametrize("settings", [
    {"max_loras": 8}, {"max_loras": 1}, {"max_loras": 2, "max_num_batched_tokens": 7}, {"max_loras": 2, "async_scheduling": True},
    {"max_loras": 3, "num_gpu_blocks_override": 20, "block_size": 8, "enable_prefix_caching": False},
    {"max_loras": 3, "num_gpu_blocks_override": 20, "block_size": 8, "kv_offloading_size": 0.001, "async_scheduling": True},
    {"max_loras": 2, "max_num_seqs": 3}, {"max_loras": 2, "speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
    {"max_loras": 2, "max_num_batched_tokens": 20, "block_size": 3, "kv_cache_dtype": "float32", "scheduling_policy": "priority"},
], ids=["all in slots", "one slot", "chunks", "ahead", "preemption", "swap", "few rows", "drafts", "blocks of 3"])
def test_tokens_do_not_depend_on_the_batch(base: Path, adapters: list[LoRARequest], alone: Tokens, settings: dict[str, Any]) -> None:
    requests = [*adapters, None] * 2
    with open_llm(base, **settings) as llm:
        assert ask(llm, requests) == alone * 2
        stats = llm.llm_engine.stats()
        assert (stats.num_preemptions > 0) == ("num_gpu_blocks_override" in settings)


def test_children_grammars_penalties_and_beams_have_their_requests_adapter(llm: LLM, adapters: list[LoRARequest]) -> None:
    seeded = SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=8, ignore_eos=True, repetition_penalty=1.2, logprobs=2)
    grammar = SamplingParams(temperature=0, max_tokens=8, structured_outputs=StructuredOutputsParams(regex="[a-z]{4,9}"))
    for params in (seeded, grammar):
        one_by_one = [ask(llm, [adapter], params) for adapter in (adapters[0], adapters[1], None)]
        assert len({tuple(tokens) for tokens in one_by_one}) == 3
        assert ask(llm, [adapters[0], adapters[1], None], params) == [t for tokens in one_by_one for t in tokens]
    beams = [llm.beam_search([{"prompt_token_ids": PROMPT}], BeamSearchParams(beam_width=2, max_tokens=5), lora_request=a)[0] for a in
             (adapters[0], None)]
    assert beams[0].sequences[0].tokens != beams[1].sequences[0].tokens


def test_adapters_share_no_cached_prefix_and_a_reloaded_one_finds_nothing(base: Path, adapters: list[LoRARequest]) -> None:
    def cached(request: LoRARequest | None) -> int:
        return llm.generate({"prompt_token_ids": PROMPT}, GREEDY, use_tqdm=False, lora_request=request)[0].num_cached_tokens

    with open_llm(base, block_size=8) as llm:
        assert [cached(r) for r in (None, adapters[0], adapters[1])] == [0, 0, 0]
        assert [cached(r) for r in (None, adapters[0], adapters[1])] == [40, 40, 40]
        other = replace(adapters[0], lora_path=adapters[2].lora_path, load_inplace=True)  # the same name, other weights
        assert cached(other) == 0
        llm.llm_engine.remove_lora(adapters[0].lora_int_id)
        assert cached(adapters[0]) == 0 and cached(adapters[0]) == 40


def test_outputs_name_their_adapter_and_lists_must_have_one_entry_per_prompt(llm: LLM, adapters: list[LoRARequest]) -> None:
    output = llm.generate({"prompt_token_ids": PROMPT}, GREEDY, use_tqdm=False, lora_request=adapters[0])[0]
    assert output.lora_request is adapters[0] and output.outputs[0].lora_request is adapters[0]
    with pytest.raises(InvalidInput, match="1 prompts, but 2 LoRARequests"):
        llm.generate({"prompt_token_ids": PROMPT}, GREEDY, use_tqdm=False, lora_request=adapters[:2])


@pytest.mark.parametrize(("request_", "message"), [
    ("sql", "must be a LoRARequest"), (LoRARequest("x", 99), "give its lora_path"), (LoRARequest("x", 99, "/nowhere"), "it is no folder"),
    (LoRARequest("x", 1, "/nowhere"), "is that of the loaded adapter 'a0'"), (LoRARequest("a0", 9), "is loaded as number 1"),
])
def test_wrong_requests_are_refused_by_name(llm: LLM, adapters: list[LoRARequest], request_: Any, message: str) -> None:
    ask(llm, [adapters[0]])
    with pytest.raises(InvalidInput, match=message):
        ask(llm, [request_])


def test_an_adapter_can_be_unloaded_while_its_requests_run(llm: LLM, adapters: list[LoRARequest], alone: Tokens) -> None:
    engine = llm.llm_engine
    engine.add_request("r", {"prompt_token_ids": PROMPT}, GREEDY, lora_request=adapters[3])
    engine.step()
    worker = engine.core.executor
    before = len(worker._adapters.adapter_ids)
    assert engine.remove_lora(4) and 4 not in engine.list_loras() and not engine.remove_lora(4)
    assert len(worker._adapters.adapter_ids) == before
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert tuple(outputs[-1].outputs[0].token_ids) == alone[3]
    assert len(worker._adapters.adapter_ids) == before - 1
    assert engine.add_lora(adapters[3])
    with pytest.raises(InvalidInput, match="is loaded already"):
        engine.add_lora(adapters[3])


def test_max_cpu_loras_drops_what_a_later_request_can_load_again(base: Path, adapters: list[LoRARequest], alone: Tokens) -> None:
    with open_llm(base, max_loras=1, max_cpu_loras=2, max_num_seqs=1) as llm:
        assert [ask(llm, [adapter])[0] for adapter in adapters] == alone[:-1]
        assert llm.llm_engine.list_loras() == {4, 5}
        with pytest.raises(InvalidInput, match=r"max_cpu_loras \(2\) LoRA adapters are loaded"):
            ask(llm, list(adapters[:3]))  # all three would be in use at the same time
        for number in llm.llm_engine.list_loras():
            llm.llm_engine.remove_lora(number)
        for adapter in adapters[:2]:
            llm.llm_engine.add_lora(adapter)
        with pytest.raises(InvalidInput, match=r"max_cpu_loras \(2\) LoRA adapters are loaded"):
            ask(llm, [adapters[2]])


def test_loading_and_unloading_200_adapters_under_traffic_leaks_nothing(base: Path, adapters: list[LoRARequest]) -> None:
    with open_llm(base, max_loras=2, max_num_seqs=4, num_gpu_blocks_override=100) as llm:
        engine, core = llm.llm_engine, llm.llm_engine.core
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
        for i in range(200):
            load = LoRARequest(f"load{i}", i + 1, adapters[i % NUM_ADAPTERS].lora_path)
            engine.add_lora(load)
            engine.add_request(f"r{i}", {"prompt_token_ids": PROMPT[: 5 + i % 30]}, params, lora_request=load)
            engine.step()
            engine.remove_lora(i + 1)
            assert len(core.executor._adapters.adapter_ids) <= core.scheduler.stats().num_running + core.scheduler.stats().num_waiting
        while engine.has_unfinished_requests():
            engine.step()
        core.scheduler.check()
        assert core.scheduler.stats().num_used_blocks == 0
        assert core.adapters() == () and core.executor._adapters.adapter_ids == ()
        assert not core._adapters._read and not core._adapters._leaving


def test_the_settings_need_enable_lora(base: Path) -> None:
    with pytest.raises(InvalidInput, match="max_loras has no effect without enable_lora"):
        LLM(str(base), max_loras=2)
    with pytest.raises(InvalidInput, match="max_cpu_loras must be at least 4"):
        LLM(str(base), enable_lora=True, max_cpu_loras=1)


def test_the_command_line_answers_with_an_adapter(base: Path, adapters: list[LoRARequest], capsys: pytest.CaptureFixture[str]) -> None:
    from minivllm.cli.main import main

    line = ["complete", "the cat and the hat", "--local", "--model", str(base), "--dtype", "float32", "--max-tokens", "8",
            "--temperature", "0"]
    texts = []
    for lora in ([], ["--lora", adapters[4].lora_path], ["--lora", "/nowhere"]):
        status = main([*line, *lora])
        texts.append(capsys.readouterr().out)
        assert status == int(lora == ["--lora", "/nowhere"])
    assert texts[0] != texts[1] and texts[2] == ""
