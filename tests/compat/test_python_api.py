"""What scripts written for vLLM do with its Python API, on a tiny model."""
from __future__ import annotations

import asyncio
import dataclasses
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minivllm
from minivllm import LLM, SamplingParams
from minivllm.compat.engine_args import AsyncEngineArgs, EngineArgs, FlexibleArgumentParser
from minivllm.compat.imports import MODULES, UNBUILT
from minivllm.compat.settings import LLM_METHODS
from minivllm.config import EngineConfig
from minivllm.engine.metrics_reader import Counter, Gauge, Histogram
from minivllm.engine_request import LoRARequest
from minivllm.errors import InvalidInput, NotSupportedYet
from minivllm.sampling_params import NEUTRAL, RequestOutputKind, StructuredOutputsParams

GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), dtype="float", max_logprobs=-1, disable_log_stats=False, tensor_parallel_size=1) as llm:
        yield llm


# ---- imports

@pytest.mark.parametrize("path", MODULES)
def test_each_module_path_of_vllm_gives_its_names(path: str) -> None:
    module = importlib.import_module(path)
    for name, home in MODULES[path].items():
        assert getattr(module, name) is getattr(importlib.import_module(home), name)
    assert set(MODULES[path]) <= set(dir(module))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        module.nonsense  # noqa: B018
    with pytest.raises(ImportError):
        importlib.import_module(f"{path}.nonsense")


def test_names_of_the_package() -> None:
    for name in ("EngineArgs", "AsyncEngineArgs", "AsyncLLMEngine", "TextPrompt", "TokensPrompt", "PromptType"):
        assert name in minivllm.__all__ and getattr(minivllm, name)


@pytest.mark.parametrize("path", UNBUILT)
def test_a_module_for_a_feature_that_is_not_built_is_refused_by_name(path: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="is not supported yet"):
        importlib.import_module(path)


def test_modules_are_attributes_of_the_package() -> None:
    program = "import minivllm; minivllm.sampling_params.SamplingParams(); minivllm.inputs.TextPrompt; minivllm.lora.request.LoRARequest"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


# ---- EngineArgs

def test_engine_args_from_a_command_line_are_keywords_of_llm() -> None:
    parser = FlexibleArgumentParser()
    parser.add_argument("--top_p", type=float)
    parser = EngineArgs.add_cli_args(parser)
    parser.set_defaults(model="m")
    args = parser.parse_args(["--max_model_len", "64", "--enforce-eager", "--top_p", "0.5", "--hf-overrides.a.b=1", "-tp", "1"])
    assert (args.top_p, args.max_model_len, args.tensor_parallel_size, args.quantization) == (0.5, 64, 1, None)
    del args.top_p
    config = EngineConfig.from_kwargs(**vars(args))
    assert config == EngineConfig(model="m", max_model_len=64, enforce_eager=True, hf_overrides={"a": {"b": 1}})
    assert AsyncEngineArgs.from_cli_args(args).create_engine_config() == config
    assert EngineArgs("m", max_model_len=64, enforce_eager=True, hf_overrides={"a": {"b": 1}}).create_engine_config() == config
    assert EngineArgs(model="m", tensor_parallel_size=2).create_engine_config() == EngineConfig(model="m", tensor_parallel_size=2)
    with pytest.raises(NotSupportedYet, match="pipeline_parallel_size=2"):
        EngineArgs(model="m", pipeline_parallel_size=2).create_engine_config()
    with pytest.raises(TypeError, match="EngineArgs has no setting 'max_modellen'; did you mean 'max_model_len'"):
        EngineArgs(max_modellen=3)
    assert AsyncEngineArgs(model="m", max_log_len=10).create_engine_config(usage_context=None) == EngineConfig(model="m")
    with pytest.raises(SystemExit):
        parser.parse_args(["--max-model-length", "3"])


def test_an_engine_loop_from_engine_args(folder: Path) -> None:
    engine = minivllm.LLMEngine.from_engine_args(EngineArgs(model=str(folder), dtype="float32"), usage_context=None)
    try:
        engine.add_request("0", "the cat", GREEDY)
        outputs = []
        while engine.has_unfinished_requests():
            outputs += [output for output in engine.step() if output.finished]
        assert [output.request_id for output in outputs] == ["0"] and len(outputs[0].outputs[0].token_ids) == 5
        assert engine.model_config.max_model_len == 256 and engine.model_config.get_vocab_size() == engine.info().vocab_size
    finally:
        engine.close()


def test_async_llm_streams_deltas(folder: Path) -> None:
    async def run() -> list[Any]:
        engine = minivllm.AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(folder), dtype="float32"))
        params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
        try:
            await engine.check_health()
            assert (await engine.get_model_config()).max_model_len == 256
            return [output async for output in engine.generate(request_id="a", prompt="the cat", sampling_params=params)]
        finally:
            engine.shutdown()

    outputs = asyncio.run(run())
    assert sum(len(output.outputs[0].token_ids) for output in outputs) == 5 and len(outputs) > 1
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]


# ---- SamplingParams

def test_parameters_are_settable_and_checked_on_assignment() -> None:
    params = SamplingParams()
    params.max_tokens = 8
    params.stop = "end"
    params.guided_decoding = {"regex": "a+"}
    assert params == SamplingParams(max_tokens=8, stop=["end"], structured_outputs=StructuredOutputsParams(regex="a+"))
    for name, value in (("temperature", -1), ("max_tokens", 0), ("structured_outputs", {"regex": ""}), ("best_of", 3), ("output_kind", 1)):
        before = params.clone()
        with pytest.raises(InvalidInput, match=name):
            setattr(params, name, value)
        assert params == before
    with pytest.raises(AttributeError, match="did you mean 'temperature'"):
        params.temprature = 1  # type: ignore[attr-defined]


def test_names_and_fields_of_older_versions() -> None:
    from minivllm.utils import random_uuid

    from minivllm.sampling_params import BeamSearchParams, GuidedDecodingParams

    assert SamplingParams.from_optional(n=None, top_k=3) == SamplingParams(top_k=3)
    assert BeamSearchParams(beam_width=2, max_tokens=3, temperature=0.0) == BeamSearchParams(beam_width=2, max_tokens=3)
    with pytest.raises(NotSupportedYet, match="temperature"):
        BeamSearchParams(beam_width=2, max_tokens=3, temperature=0.7)
    assert GuidedDecodingParams(choice=["a"], backend="xgrammar:no-fallback") == StructuredOutputsParams(choice=["a"])
    with pytest.raises(InvalidInput, match="backend must be one of"):
        GuidedDecodingParams(choice=["a"], backend="nonsense")
    assert AsyncEngineArgs(model="m", disable_log_requests=True).create_engine_config() == EngineConfig(model="m")
    assert len(random_uuid()) == 32


def test_a_clone_is_not_changed_by_later_assignments() -> None:
    params = SamplingParams(max_tokens=8)
    copy = params.clone()
    params.max_tokens = 9
    assert copy.max_tokens == 8 and dataclasses.replace(params, max_tokens=8) == copy


def test_a_request_keeps_the_parameters_it_was_added_with(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    llm.llm_engine.add_request("kept", "the cat", params)
    params.max_tokens = 1
    while llm.llm_engine.has_unfinished_requests():
        outputs = llm.llm_engine.step()
    assert len(outputs[0].outputs[0].token_ids) == 4


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_parameters_are_accepted_and_others_refused_by_name(name: str) -> None:
    for value in (None, *NEUTRAL[name][1]):
        assert SamplingParams(**{name: value}) == SamplingParams()
        setattr(SamplingParams(), name, value)
    for refuse in (lambda: SamplingParams(**{name: 77}), lambda: setattr(SamplingParams(), name, 77)):
        with pytest.raises(NotSupportedYet, match=f"{name}=77 .* is not supported yet"):
            refuse()


def test_all_logprobs(llm: LLM) -> None:
    vocab = llm.llm_engine.model_config.get_vocab_size()
    output = llm.generate("the cat", SamplingParams(temperature=0, max_tokens=2, logprobs=-1, prompt_logprobs=-1), use_tqdm=False)[0]
    every = output.outputs[0].logprobs
    assert every is not None and len(every[0]) == vocab
    assert abs(float(np.exp([entry.logprob for entry in every[0].values()]).sum()) - 1) < 1e-4
    assert output.prompt_logprobs is not None and output.prompt_logprobs[1] is not None and len(output.prompt_logprobs[1]) == vocab


def test_final_only_gives_one_output(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, n=2, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY)
    llm.llm_engine.add_request("final", "the cat", params)
    outputs = []
    while llm.llm_engine.has_unfinished_requests():
        outputs += llm.llm_engine.step()
    assert len(outputs) == 1 and outputs[0].finished and [len(o.token_ids) for o in outputs[0].outputs] == [4, 4]


# ---- LLM

def test_positional_arguments_in_vllms_order(llm: LLM) -> None:
    expected = llm.generate(["the cat"], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    for outputs in (
        llm.generate(["the cat"], GREEDY, False, None), llm.generate(minivllm.TextPrompt(prompt="the cat"), GREEDY, False),
        llm.generate(prompt_token_ids=[llm.get_tokenizer().encode("the cat")], sampling_params=GREEDY, use_tqdm=False),
        llm.generate({"prompt": "the cat", "multi_modal_data": None}, GREEDY, False),
    ):
        assert outputs[0].outputs[0].token_ids == expected
    assert llm.chat([{"role": "user", "content": "hi"}], GREEDY, False, None, None, "auto")[0].finished


def test_older_call_forms(llm: LLM) -> None:
    expected = llm.generate(["the cat"], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    for outputs in (llm.generate(inputs="the cat", sampling_params=GREEDY, use_tqdm=False, prompt_adapter_request=None),
                    llm.generate(["the cat"], GREEDY, None, False)):
        assert outputs[0].outputs[0].token_ids == expected
    own = llm.llm_engine.core.tokenizer
    assert own is not None
    llm.llm_engine.add_request("old", None, GREEDY, own.encode("the cat"))
    while llm.llm_engine.has_unfinished_requests():
        outputs = llm.llm_engine.step()
    assert outputs[0].outputs[0].token_ids == expected
    assert (outputs[0].lora_request, outputs[0].encoder_prompt, outputs[0].kv_transfer_params) == (None, None, None)
    assert llm.model_config.max_model_len == llm.llm_engine.get_model_config().max_model_len == 256


def test_times_of_an_output_are_those_of_the_wall_clock(llm: LLM) -> None:
    before = time.time()
    metrics = llm.generate("the cat", GREEDY, use_tqdm=False)[0].metrics
    assert metrics is not None and metrics.time_in_queue is not None and metrics.last_token_time is not None
    assert before - 1 < metrics.arrival_time <= metrics.last_token_time < time.time() + 1 and metrics.time_in_queue >= 0


def test_requests_for_features_that_are_not_built_are_refused(llm: LLM) -> None:
    adapter = LoRARequest("sql", 1, "/adapter")
    for refused in (
        lambda: llm.generate({"prompt": "a", "multi_modal_data": {"image": 1}}, GREEDY),
        lambda: llm.chat([{"role": "user", "content": "a"}], mm_processor_kwargs={"a": 1}),
    ):
        with pytest.raises(NotSupportedYet, match="is not supported yet"):
            refused()
    for refused in (
        lambda: llm.generate("a", GREEDY, lora_request=adapter), lambda: llm.generate("a", GREEDY, lora_request=[adapter]),
        lambda: llm.llm_engine.add_request("x", "a", GREEDY, lora_request=adapter), lambda: llm.llm_engine.add_lora(adapter),
    ):
        with pytest.raises(InvalidInput, match="enable_lora"):
            refused()
    for name in LLM_METHODS:
        for owner in (llm, llm.llm_engine):
            if not hasattr(type(owner), name):
                with pytest.raises(NotSupportedYet, match=f"{type(owner).__name__}.{name} "):
                    getattr(owner, name)("a")
    with pytest.raises(AttributeError, match="did you mean 'generate'"):
        llm.genrate  # noqa: B018


def test_enqueued_prompts_are_answered_together(llm: LLM) -> None:
    llm.enqueue(["the cat", "the dog"], GREEDY)
    llm.enqueue("a fox", GREEDY)
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [output.prompt for output in outputs] == ["the cat", "the dog", "a fox"]
    assert llm.wait_for_completion(use_tqdm=False) == []


def test_a_progress_bar_class_may_be_given(llm: LLM) -> None:
    from tqdm import tqdm

    made: list[dict[str, Any]] = []

    def make(**options: Any) -> Any:
        made.append(options)
        return tqdm(**{**options, "disable": True})

    llm.generate(["the cat"], GREEDY, use_tqdm=make)
    assert made[0]["total"] == 1


def test_metrics_are_objects_of_vllms_reader(llm: LLM, folder: Path) -> None:
    before = {metric.name: metric for metric in llm.get_metrics() if isinstance(metric, Counter)}
    llm.generate(["the cat"], GREEDY, use_tqdm=False)
    found = {metric.name: metric for metric in llm.get_metrics()}
    tokens = found["minivllm:generation_tokens"]
    assert isinstance(tokens, Counter) and tokens.value == before["minivllm:generation_tokens"].value + 5
    assert isinstance(found["minivllm:kv_cache_usage_perc"], Gauge)
    latency = found["minivllm:time_to_first_token_seconds"]
    assert isinstance(latency, Histogram) and latency.count == latency.buckets["+Inf"] > 0 and latency.sum > 0


def test_a_profile_is_a_trace_file(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_TORCH_PROFILER_DIR", str(tmp_path / "traces"))
    with pytest.raises(InvalidInput, match="call start_profile first"):
        llm.stop_profile()
    llm.start_profile()
    llm.generate("the cat", SamplingParams(max_tokens=1), use_tqdm=False)
    trace = json.loads(llm.stop_profile().read_text(encoding="utf-8"))
    assert trace["traceEvents"]


def test_the_tokenizer_is_the_transformers_one(llm: LLM) -> None:
    tokenizer, own = llm.get_tokenizer(), llm.llm_engine.core.tokenizer
    assert own is not None
    ids = tokenizer(["the cat", "a"])["input_ids"]
    assert ids == [own.encode("the cat"), own.encode("a")] and len(tokenizer) == own.vocab_size
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == ["the cat", "a"]
    conversations = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "ho"}]]
    texts = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
    assert texts == [own.apply_chat_template(one, tokenize=False) for one in conversations]
    assert tokenizer.convert_ids_to_tokens(own.eos_token_id) == tokenizer.eos_token
