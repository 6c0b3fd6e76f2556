"""`LLM`: outputs in the order of the prompts, with vLLM's names and shapes."""
from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import minivllm
from minivllm.config import EngineConfig
from minivllm.engine.engine import EngineCore
from minivllm.engine.llm import LLM
from minivllm.engine.tokenizer import Tokenizer
from minivllm.errors import InvalidInput, NotSupportedYet
from minivllm.sampling_params import SamplingParams
from tests.engine import tokenizers_for_tests as build
from tests.engine.fake import FakeExecutor, expected, make_engine

GREEDY = SamplingParams(temperature=0, max_tokens=4)


@pytest.fixture
def llm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    folder = build.save(build.byte_level(), tmp_path)

    def build_engine(config: EngineConfig) -> EngineCore:
        return make_engine(FakeExecutor(), folder=folder, max_queue=config.max_queue, max_num_seqs=config.max_num_seqs)

    monkeypatch.setattr("minivllm.engine.llm.build_engine", build_engine)
    with LLM(max_num_seqs=4, max_queue=3) as llm:
        yield llm


def test_outputs_have_the_order_of_the_prompts_however_long_each_takes(llm: LLM) -> None:
    texts = ["the", "the fox", "jumps", "over", "a", "b", "c", "d", "e"]  # more than the queue holds
    params = [SamplingParams(temperature=0, max_tokens=9 - i) for i in range(9)]
    outputs = llm.generate(texts, params, use_tqdm=False)
    tokenizer = llm.llm_engine.core.tokenizer
    for text, asked, output in zip(texts, params, outputs, strict=True):
        assert output.prompt == text
        assert output.prompt_token_ids == tokenizer.encode(text)
        assert output.outputs[0].token_ids == expected(tokenizer.encode(text), asked.max_tokens or 0)
        assert output.outputs[0].text == tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True)
        assert (output.finished, output.outputs[0].finish_reason) == (True, "length")
        assert output.metrics is not None
    assert [o.request_id for o in outputs] == [str(i) for i in range(9)]


def test_one_prompt_may_come_without_a_list(llm: LLM) -> None:
    ids = llm.llm_engine.core.tokenizer.encode("the fox")
    for prompt in ("the fox", {"prompt": "the fox"}, {"prompt_token_ids": ids}, ids, [ids], ["the fox"]):
        (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)  # type: ignore[arg-type]
        assert output.outputs[0].token_ids == expected(ids, 4)
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_logprobs_have_vllms_shape(llm: LLM) -> None:
    (output,) = llm.generate("the fox", dataclasses.replace(GREEDY, logprobs=3, prompt_logprobs=0, n=2), use_tqdm=False)
    for completion in output.outputs:
        assert completion.logprobs is not None
        assert len(completion.logprobs) == 4
        for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
            assert next(iter(entry)) == token
            assert len(entry) == 3  # the chosen token is among the top 3
            assert entry[token].rank == 1
            assert isinstance(entry[token].decoded_token, str)
        assert completion.cumulative_logprob == sum(e[t].logprob for t, e in zip(completion.token_ids, completion.logprobs, strict=True))
    assert output.prompt_logprobs is not None
    assert [e and list(e) for e in output.prompt_logprobs] == [None, *([t] for t in output.prompt_token_ids[1:])]
    (plain,) = llm.generate("the fox", GREEDY, use_tqdm=False)
    assert (plain.prompt_logprobs, plain.outputs[0].logprobs, plain.outputs[0].cumulative_logprob) == (None, None, None)


def test_chat_writes_the_models_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "the fox"}]
    (one,) = llm.chat(messages, GREEDY, use_tqdm=False)
    assert one.prompt == "<s><|user|>the fox</s>\n<|assistant|>"
    assert one.prompt_token_ids == llm.llm_engine.core.tokenizer.apply_chat_template(messages)
    two = llm.chat([messages, [*messages, {"role": "assistant", "content": "x"}]], GREEDY, use_tqdm=False)
    assert two[0].outputs[0].token_ids == one.outputs[0].token_ids
    assert two[1].prompt == "<s><|user|>the fox</s>\n<|assistant|>x</s>\n<|assistant|>"


def test_chat_takes_tools_and_text_parts_in_openais_form(llm: LLM) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    messages = [{"role": "user", "content": [{"type": "text", "text": "the"}, {"type": "text", "text": "fox"}]},
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}]
    template = "{{ tools[0].function.name }}{% for m in messages %}|{{ m.content }}"\
               "{% for c in m.tool_calls %}{{ c.function.arguments }}{% endfor %}{% endfor %}"
    (output,) = llm.chat(messages, GREEDY, tools=tools, chat_template=template, use_tqdm=False)
    assert output.prompt == 'f|the\nfox|{"a": 1}'
    text = llm.llm_engine.core.tokenizer.apply_chat_template(messages[:1], tools=tools, tokenize=False)
    assert "<tool_call>" in str(text), "the model's own template has no place for tools"


def test_the_models_own_defaults_are_used_where_none_are_given(llm: LLM) -> None:
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.5)
    (output,) = llm.generate("the fox", use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 16


def test_wrong_arguments_are_refused_and_leave_no_request_behind(llm: LLM) -> None:
    for wrong in (b"Once", {"Once", "upon"}, 5):  # bytes look like token ids, and a set has no order
        with pytest.raises(InvalidInput, match="prompts are texts or lists of token ids"):
            llm.generate(wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="2 prompts, but 1 SamplingParams"):
        llm.generate(["a", "b"], [GREEDY], use_tqdm=False)
    with pytest.raises(InvalidInput, match="2 prompts, but 3 priorities"):
        llm.generate(["a", "b"], GREEDY, priority=[1, 2, 3], use_tqdm=False)
    with pytest.raises(InvalidInput, match="prompt is empty"):
        llm.generate(["a", "b", ""], GREEDY, use_tqdm=False)
    assert not llm.llm_engine.core.has_unfinished_requests()
    assert llm.generate("the fox", GREEDY, use_tqdm=False)[0].finished


def test_an_interrupted_generate_aborts_its_requests(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step = llm.llm_engine.core.step
    calls = []

    def interrupted() -> Any:
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.llm_engine.core, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    monkeypatch.undo()
    while llm.llm_engine.core.has_unfinished_requests():
        assert llm.llm_engine.core.step() == []
    assert llm.llm_engine.core.stats().used_blocks == 0


def test_requests_may_be_added_to_the_engine_directly(llm: LLM) -> None:
    llm.llm_engine.core.add_request("mine", "the fox", GREEDY)
    assert llm.generate("a", GREEDY, use_tqdm=False)[0].finished  # `generate` ignores the deltas of the other request
    while llm.llm_engine.core.has_unfinished_requests():
        llm.llm_engine.core.step()


def test_a_progress_bar_shows_tokens_per_second(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], GREEDY)
    shown = capsys.readouterr().err
    assert "Processed prompts: 100%" in shown
    assert "out " in shown and "tok/s" in shown
    llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_unknown_keywords_name_the_nearest_one_before_anything_is_loaded() -> None:
    with pytest.raises(TypeError, match="did you mean 'max_model_len'"):
        LLM(max_modellen=5)
    with pytest.raises(NotSupportedYet, match="KV scales from a file"):
        LLM("x", quantization_param_path="scales.json")
    with pytest.raises(InvalidInput, match="block_size must be at least 1"):
        LLM(block_size=0)


def test_importing_the_package_imports_nothing() -> None:
    code = (
        "import sys, minivllm\n"
        "assert minivllm.__version__ and 'LLM' in dir(minivllm)\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'numpy', 'jinja2', 'tqdm', 'prometheus_client', 'fastapi', 'minivllm.config'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "from minivllm import SamplingParams, EngineConfig, InvalidInput\n"
        "assert 'torch' not in sys.modules\n"
        "import minivllm.engine.client, minivllm.engine.process\n"
        "assert not {'torch', 'fastapi'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_exported_name_resolves() -> None:
    for name in minivllm.__all__:
        assert getattr(minivllm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'LLLM'"):
        _ = minivllm.LLLM  # type: ignore[attr-defined]


def test_text_of_a_stream_and_of_a_list_are_the_same(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=30, n=2, stop=["e"])
    (output,) = llm.generate("the fox", params, use_tqdm=False)
    tokenizer = Tokenizer(llm.llm_engine.core.tokenizer.folder)
    for completion in output.outputs:
        assert "e" not in completion.text
        assert tokenizer.decode(completion.token_ids).startswith(completion.text.rstrip("\ufffd"))
