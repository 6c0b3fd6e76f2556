"""From a configuration to a running engine, on a tiny model: files, errors, and memory after `close`."""
from __future__ import annotations

import asyncio
import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minivllm import LLM, AsyncLLM, EngineConfig, SamplingParams
from minivllm.core.trace import read, replay
from minivllm.engine.client import EngineClient
from minivllm.engine.compose import sampling_defaults
from minivllm.engine.process import start_client
from minivllm.engine_request import EngineRequest
from minivllm.errors import InvalidInput, ModelError
from minivllm.families.config_json import token_ids

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PLAIN: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_model_len": 64, "num_gpu_blocks_override": 60}


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def generation_config(folder: Path, **values: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def test_all_eos_tokens_of_a_model_end_its_outputs(copy: Path) -> None:
    with LLM(str(copy), **PLAIN) as llm:
        assert llm.llm_engine.core.eos_token_ids == (1,)
        said = llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids  # type: ignore[list-item]
    generation_config(copy, eos_token_id=[said[2], 1], max_length=20)
    with LLM(str(copy), **PLAIN) as llm:
        assert llm.llm_engine.core.eos_token_ids == (said[2], 1)
        (output,) = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)  # type: ignore[list-item]
        first = said.index(said[2])
        assert output.outputs[0].token_ids == said[: first + 1]
        assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)


def test_sampling_defaults_come_from_the_models_generation_config(copy: Path) -> None:
    generation_config(copy, temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=None, max_new_tokens=5, do_sample=True)
    with LLM(str(copy), **PLAIN) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0.6, top_p=0.9, top_k=20, max_tokens=5)


def test_a_wrong_generation_config_is_the_models_error() -> None:
    with pytest.raises(ModelError, match=r"generation_config\.json is wrong: temperature"):
        sampling_defaults({"temperature": -1})


def test_a_length_above_the_models_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidInput, match="257 exceeds the model's context length of 256 tokens") as error:
        LLM(str(folder), device="cpu", max_model_len=257)
    assert error.value.param == "max_model_len"


def test_the_length_is_lowered_to_what_the_cache_holds_and_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with LLM(str(folder), **{**PLAIN, "max_model_len": None, "num_gpu_blocks_override": 5}) as llm:
        assert llm.llm_engine.core.max_model_len == 64  # 4 usable blocks of 16
        (output,) = llm.generate([[5]], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True), use_tqdm=False)  # type: ignore[list-item]
        assert len(output.outputs[0].token_ids) == 63
    assert "max_model_len lowered from 256 to 64" in capsys.readouterr().err


def test_without_a_tokenizer_ids_go_in_and_ids_come_out(copy: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (copy / file).unlink()
    with LLM(str(copy), skip_tokenizer_init=True, **PLAIN) as llm:
        (output,) = llm.generate({"prompt_token_ids": [5, 6]}, GREEDY, use_tqdm=False)
        assert (len(output.outputs[0].token_ids), output.outputs[0].text) == (8, "")
        with pytest.raises(InvalidInput, match="no tokenizer"):
            llm.chat([{"role": "user", "content": "x"}], GREEDY)
    with pytest.raises(ModelError, match="tokenizer"):
        LLM(str(copy), **PLAIN)


def test_a_tokenizer_may_come_from_another_folder(folder: Path, copy: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (copy / file).unlink()
    with LLM(str(copy), tokenizer=str(folder), **PLAIN) as llm:
        assert llm.generate("the cat", GREEDY, use_tqdm=False)[0].outputs[0].text


def test_random_weights_need_no_checkpoint_and_follow_the_seed(copy: Path) -> None:
    (copy / "model.safetensors").unlink()

    def tokens(seed: int) -> list[int]:
        with LLM(str(copy), load_format="dummy", seed=seed, **PLAIN) as llm:
            return llm.generate("the cat", GREEDY, use_tqdm=False)[0].outputs[0].token_ids

    assert tokens(1) == tokens(1) != tokens(2)


def test_requests_without_a_seed_repeat_with_the_engines_seed(folder: Path) -> None:
    def tokens(seed: int) -> list[list[int]]:
        with LLM(str(folder), seed=seed, **PLAIN) as llm:
            outputs = llm.generate(["the cat"] * 2, SamplingParams(n=2, max_tokens=8, ignore_eos=True), use_tqdm=False)
        return [c.token_ids for o in outputs for c in o.outputs]

    first = tokens(0)
    assert first == tokens(0) != tokens(1)
    assert len({tuple(t) for t in first}) == 4


def test_two_engines_live_in_one_process(folder: Path, tiny_llama: Callable[..., Path]) -> None:
    other = tiny_llama(seed=9)
    alone = []
    for path in (folder, other):
        with LLM(str(path), **PLAIN) as llm:
            alone.append(llm.generate("the cat", GREEDY, use_tqdm=False)[0].outputs[0].token_ids)
    with LLM(str(folder), **PLAIN) as first, LLM(str(other), **PLAIN) as second:
        for llm in (first, second):
            llm.llm_engine.core.add_request("x", "the cat", GREEDY)
        found: list[list[int]] = [[], []]
        while first.llm_engine.has_unfinished_requests() or second.llm_engine.has_unfinished_requests():
            for i, llm in enumerate((first, second)):
                found[i] += [t for d in llm.llm_engine.core.step() for t in d.token_ids]
    assert found == alone
    assert alone[0] != alone[1]


def test_closing_frees_weights_and_cache_while_the_object_still_exists(folder: Path) -> None:
    llm = LLM(str(folder), **PLAIN)
    runner = llm.llm_engine.core.executor.runner  # type: ignore[attr-defined]
    gone = [weakref.ref(runner.model), weakref.ref(runner.kv.layers[0].k), weakref.ref(runner)]
    del runner
    llm.generate("the cat", GREEDY, use_tqdm=False)
    llm.llm_engine.core.add_request("x", "the cat", GREEDY)
    llm.llm_engine.core.step()  # a step is in flight
    llm.close()
    gc.collect()
    assert [ref() for ref in gone] == [None, None, None]
    llm.close()


def test_a_failed_start_frees_the_loaded_model(folder: Path) -> None:
    with pytest.raises(InvalidInput, match="chunked prefill"):
        LLM(str(folder), **PLAIN, enable_chunked_prefill=False, max_num_batched_tokens=8)
    gc.collect()
    from minivllm.models.decoder import Decoder

    assert not [o for o in gc.get_objects() if type(o) is Decoder]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_trace_of_a_run_replays_without_a_model(folder: Path, tmp_path: Path, ahead: bool) -> None:
    file = tmp_path / "run.jsonl"
    with LLM(str(folder), trace=str(file), async_scheduling=ahead, **{**PLAIN, "num_gpu_blocks_override": 8}) as llm:
        llm.generate(["the cat and the hat"] * 3, SamplingParams(n=2, seed=1, max_tokens=30, stop=["the"]), use_tqdm=False)
        llm.llm_engine.core.add_request("gone", "the end", GREEDY)
        llm.llm_engine.core.step()
        llm.llm_engine.core.abort_request("gone")
        llm.reset_prefix_cache()
        llm.generate(["the cat"], GREEDY, use_tqdm=False)
    steps = list(replay(read(file)))
    assert len(steps) > 30
    assert all(step.mismatch is None for step in steps)


def test_a_trace_file_that_cannot_be_written_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot write the trace"):
        LLM(str(folder), trace="/nowhere/at/all.jsonl", **PLAIN)


# -- through a client --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [False, True], ids=["thread", "process"])
def test_a_model_behind_a_client_gives_the_tokens_of_llm(folder: Path, process: bool) -> None:
    with LLM(str(folder), **PLAIN) as llm:
        (expected,) = llm.generate("the cat", GREEDY, use_tqdm=False)
        info = llm.llm_engine.core.info()
    client = start_client(EngineConfig(model=str(folder), **PLAIN), process=process)
    try:
        assert client.info == info
        found = asyncio.run(_collect(client, tuple(expected.prompt_token_ids)))
    finally:
        client.close()
    assert found == (expected.outputs[0].token_ids, expected.outputs[0].text)


async def _collect(client: EngineClient, prompt: tuple[int, ...]) -> tuple[list[int], str]:
    deltas = []
    async for some in client.generate(EngineRequest(request_id="r", prompt_token_ids=prompt, params=GREEDY)):
        deltas += some
    return [t for d in deltas for t in d.token_ids], "".join(d.text for d in deltas)


@pytest.mark.parametrize("process", [False, True], ids=["thread", "process"])
def test_a_client_reports_why_its_engine_could_not_start(tmp_path: Path, process: bool) -> None:
    with pytest.raises(ModelError, match="nothing-here"):
        start_client(EngineConfig(model=str(tmp_path / "nothing-here"), device="cpu"), process=process)


def test_the_async_api_streams_growing_outputs(folder: Path) -> None:
    with LLM(str(folder), **PLAIN) as llm:
        (expected,) = llm.generate("the cat", GREEDY, use_tqdm=False)

    async def main() -> None:
        async with AsyncLLM(str(folder), **PLAIN) as llm:
            lengths = []
            async for output in llm.generate("the cat", GREEDY):
                lengths.append(len(output.outputs[0].token_ids))
            assert lengths == sorted(lengths)
            assert output.finished
            assert output.outputs[0] == expected.outputs[0]
            async for _ in llm.generate("the cat", SamplingParams(max_tokens=50, ignore_eos=True), request_id="early"):
                break
            reasons = []
            async for output in llm.generate("the cat", SamplingParams(max_tokens=50, ignore_eos=True), request_id="mine"):
                await llm.abort("mine")
                reasons.append(output.outputs[0].finish_reason)
            assert reasons[-1] == "abort"
            with pytest.raises(InvalidInput, match="prompt is empty"):
                async for _ in llm.generate([], GREEDY):
                    pass
            params = SamplingParams(max_tokens=1, truncate_prompt_tokens=2, prompt_logprobs=0)
            *_, output = [output async for output in llm.generate([5, 6, 7, 8], params)]
            assert output.prompt_token_ids == [7, 8] and len(output.prompt_logprobs or ()) == 2

    asyncio.run(main())


def test_the_memory_of_weights_and_kv_cache_is_reported(folder: Path) -> None:
    from safetensors.numpy import load_file

    with LLM(str(folder), **PLAIN) as llm:
        info = llm.llm_engine.info()
        expected = sum(tensor.size * 4 for tensor in load_file(folder / "model.safetensors").values())
        assert abs(info.weight_bytes - expected) <= 0.1 * expected
        config = json.loads((folder / "config.json").read_text())
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head * 4
        assert info.kv_cache_bytes == info.num_blocks * info.block_size * token


# ---- special tokens that are not tokens

@pytest.mark.parametrize(("file", "wrong", "named"), [
    ("config.json", -1, -1), ("generation_config.json", [10**30, 320], 10**30),
])
def test_an_eos_id_outside_the_vocabulary_is_not_used(
    copy: Path, capsys: pytest.CaptureFixture[str], file: str, wrong: Any, named: int,
) -> None:
    """It was, as an index: -1 made min_tokens ban the last token of the vocabulary."""
    config = json.loads((copy / "config.json").read_text()) if file == "config.json" else {}
    (copy / file).write_text(json.dumps({**config, "eos_token_id": wrong}))
    with LLM(str(copy), **PLAIN) as llm:
        assert llm.llm_engine.core.eos_token_ids == (1,)  # the tokenizer's
        params = SamplingParams(max_tokens=3, min_tokens=3, temperature=0, allowed_token_ids=[319])
        (output,) = llm.generate([[5, 6, 7]], params, use_tqdm=False)  # type: ignore[list-item]
        assert output.outputs[0].token_ids == [319, 319, 319]
    assert f"{file}: eos_token_id {named} is outside the model's vocabulary (0 to 319), and not used" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "used", "others"), [
    (5, [5], []), ([5, 0, 319], [5, 0, 319], []), (None, [], []), ([], [], []), (320, [], [320]),
    ([7, -1, 2**31, 2**70], [7], [-1, 2**31, 2**70]),
])
def test_token_ids_of_a_file_are_those_of_the_vocabulary(value: Any, used: list[int], others: list[int]) -> None:
    assert token_ids("config.json", {"eos_token_id": value}, "eos_token_id", 320) == (used, others)


@pytest.mark.parametrize("wrong", ["2", True, 2.0, [1, "</s>"], [[1]], {"id": 1}, float("nan")])
def test_an_eos_id_of_a_wrong_type_is_an_error_that_names_file_and_value(wrong: Any) -> None:
    with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id must be a token id or a list of token ids, got "):
        token_ids("generation_config.json", {"eos_token_id": wrong}, "eos_token_id", 320)
