"""`/v1/chat/completions`, models and tokens through the official client, with a scripted engine."""
from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from minivllm.config import ServerConfig
from minivllm.engine.chat_template import ChatTemplate
from minivllm.server.chat import ChatPreprocessor
from tests.server.scripted import LiveServer, ScriptedEngine, scripted_server

MODEL = "org/fake-model"
HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def engine(tokenizer_folder: Path) -> ScriptedEngine:
    return ScriptedEngine(tokenizer_folder)


@pytest.fixture(scope="module")
def live(engine: ScriptedEngine) -> Iterator[LiveServer]:
    with scripted_server(engine) as live:
        yield live


def prompt_text(engine: ScriptedEngine) -> str:
    return engine.tokenizer.decode(engine.seen[-1].prompt)


def test_a_chat_is_rendered_with_the_models_template_and_answered_by_the_assistant(api: openai.OpenAI, engine: ScriptedEngine) -> None:
    answer = api.chat.completions.create(model=MODEL, messages=[{"role": "system", "content": "be brief"}, *HELLO])
    assert prompt_text(engine) == "<s>system: be brief</s><s>user: hello</s><s>assistant: "
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].message.content == "Paris 0."
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion" and answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.prompt_tokens == len(engine.seen[-1].prompt)


def test_the_output_may_fill_the_context_by_default(api: openai.OpenAI, engine: ScriptedEngine) -> None:
    api.chat.completions.create(model=MODEL, messages=HELLO)
    assert engine.seen[-1].params.max_tokens == engine.max_model_len - len(engine.seen[-1].prompt)


def test_max_completion_tokens_overrides_max_tokens(api: openai.OpenAI, engine: ScriptedEngine) -> None:
    api.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3)
    assert engine.seen[-1].params.max_tokens == 3
    api.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3, max_completion_tokens=5)
    assert engine.seen[-1].params.max_tokens == 5


def test_text_parts_are_joined_by_newlines(api: openai.OpenAI, engine: ScriptedEngine) -> None:
    parts: Any = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    api.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": parts}])
    assert prompt_text(engine) == "<s>user: a\nb</s><s>assistant: "


def test_the_developer_role_is_the_system_role_of_an_older_template(api: openai.OpenAI, engine: ScriptedEngine) -> None:
    api.chat.completions.create(model=MODEL, messages=[{"role": "developer", "content": "be brief"}, *HELLO])
    assert prompt_text(engine).startswith("<s>system: be brief</s>")


def test_the_final_message_can_be_continued(api: openai.OpenAI, engine: ScriptedEngine) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Well"}]
    api.chat.completions.create(model=MODEL, messages=messages, extra_body={"continue_final_message": True})
    assert prompt_text(engine) == "<s>user: hello</s><s>assistant: Well"


def test_an_answer_can_be_sent_back_unchanged(api: openai.OpenAI, engine: ScriptedEngine) -> None:
    answer = api.chat.completions.create(model=MODEL, messages=HELLO).choices[0].message
    again: Any = [*HELLO, answer.model_dump(), *HELLO]
    api.chat.completions.create(model=MODEL, messages=again)
    assert "<s>assistant: Paris 0.</s>" in prompt_text(engine)


def test_a_stream_starts_with_the_role_and_ends_with_the_finish_reason(api: openai.OpenAI, engine: ScriptedEngine) -> None:
    chunks = list(api.chat.completions.create(model=MODEL, messages=HELLO, stream=True))
    first, rest = chunks[0].choices[0], [c.choices[0] for c in chunks[1:]]
    assert first.delta.role == "assistant" and first.delta.content == "" and first.finish_reason is None
    assert all(c.delta.role is None for c in rest)
    assert "".join(c.delta.content or "" for c in rest) == "Paris 0."
    assert [c.finish_reason for c in rest] == [None] * (len(rest) - 1) + ["length"]
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1 and chunks[0].object == "chat.completion.chunk"


def test_the_children_of_a_stream_interleave_each_with_its_index(api: openai.OpenAI) -> None:
    chunks = [c.choices[0] for c in api.chat.completions.create(model=MODEL, messages=HELLO, n=3, stream=True)]
    for child in range(3):
        mine = [c for c in chunks if c.index == child]
        assert mine[0].delta.role == "assistant" and "".join(c.delta.content or "" for c in mine) == f"Paris {child}."
        assert mine[-1].finish_reason == "length"
    order = [c.index for c in chunks]
    assert order[:9] == [0, 1, 2] * 3, "children advance together"


def test_include_usage_ends_a_chat_stream_with_its_usage(api: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    chunks = list(api.chat.completions.create(model=MODEL, messages=HELLO, n=2, max_tokens=2, stream=True, stream_options=options))
    assert all(c.usage is None and c.choices for c in chunks[:-1]) and chunks[-1].choices == []
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 4


def test_chat_logprobs_have_bytes_and_the_requested_number_of_alternatives(api: openai.OpenAI) -> None:
    choice = api.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True, top_logprobs=2).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert b"".join(bytes(e.bytes or ()) for e in choice.logprobs.content).decode() == "Paris 0."
    assert all(len(e.top_logprobs) == 2 and e.logprob == -0.5 for e in choice.logprobs.content)
    plain = api.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True).choices[0]
    assert plain.logprobs is not None and all(e.top_logprobs == [] for e in plain.logprobs.content or ())


def test_streamed_chat_logprobs_equal_those_of_the_complete_response(api: openai.OpenAI) -> None:
    whole = api.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True, top_logprobs=1).choices[0].logprobs
    chunks = api.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True, top_logprobs=1, stream=True)
    pieces = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content or ()]
    assert whole is not None and pieces == whole.content


def test_the_model_is_listed_with_its_card(api: openai.OpenAI, engine: ScriptedEngine) -> None:
    cards = api.models.list().data
    assert [card.id for card in cards] == [MODEL] and cards[0].object == "model" and cards[0].owned_by == "minivllm"
    assert cards[0].model_dump()["max_model_len"] == engine.max_model_len
    assert api.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("no-such-model")


def test_any_served_name_works_and_is_in_the_response(tokenizer_folder: Path) -> None:
    with scripted_server(ScriptedEngine(tokenizer_folder), served_model_name=("big", "small")) as live, \
            openai.OpenAI(base_url=live.url + "/v1", api_key="unused") as api:
        assert [card.id for card in api.models.list().data] == ["big", "small"]
        assert api.completions.create(model="small", prompt="x").model == "small"
        with pytest.raises(openai.NotFoundError, match="'big', 'small'"):
            api.completions.create(model=MODEL, prompt="x")


def test_a_template_given_to_the_server_replaces_the_models_own(tokenizer_folder: Path) -> None:
    engine = ScriptedEngine(tokenizer_folder)
    engine.tokenizer.chat_template = ChatTemplate("{% for m in messages %}{{ m.content }}|{% endfor %}{{ mood }}")
    with scripted_server(engine) as live, openai.OpenAI(base_url=live.url + "/v1", api_key="unused") as api:
        api.chat.completions.create(model=MODEL, messages=HELLO, extra_body={"chat_template_kwargs": {"mood": "glad"}})
        assert prompt_text(engine) == f"{HELLO[0]['content']}|glad"


def test_tokenize_and_detokenize_are_inverse(live: LiveServer, engine: ScriptedEngine) -> None:
    import httpx

    answer = httpx.post(live.url + "/tokenize", json={"prompt": "the cat", "return_token_strs": True}).json()
    assert answer["tokens"] == engine.tokenizer.encode("the cat") and answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == engine.max_model_len and len(answer["token_strs"]) == answer["count"]
    assert httpx.post(live.url + "/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "the cat"}
    chat = httpx.post(live.url + "/tokenize", json={"messages": HELLO}).json()
    assert engine.tokenizer.decode(chat["tokens"]) == "<s>user: hello</s><s>assistant: "


def test_messages_are_tokenized_to_the_same_prompt_as_in_the_chat_endpoint(tokenizer_folder: Path) -> None:
    import httpx

    engine = ScriptedEngine(tokenizer_folder, max_model_len=2048)
    engine.tokenizer.chat_template = ChatTemplate("{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{{ mood }}"
                                                  "{% for m in messages %}{{ m.content }}{% endfor %}"
                                                  "{% if add_generation_prompt %}>{% endif %}")
    clock = {"type": "function", "function": {"name": "clock"}}
    with scripted_server(engine, tool_call_parser="hermes") as live:
        for more in ({"tools": [clock]}, {"chat_template_kwargs": {"mood": "glad"}}, {"continue_final_message": True}):
            body = {"messages": [{"role": "user", "content": "x"}], **more}
            told = httpx.post(live.url + "/tokenize", json=body)
            assert httpx.post(live.url + "/v1/chat/completions", json=body).status_code == 200
            assert told.json()["tokens"] == list(engine.seen[-1].prompt), more
        assert httpx.post(live.url + "/tokenize", json={**body, "chat_template_kwargs": {"mod": 1}}).headers[
            "x-minivllm-ignored"] == "chat_template_kwargs.mod"
        for wrong, param in (
            ({"prompt": "x", "tools": [clock]}, "tools"), ({"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
            ({**body, "add_special_tokens": True}, "add_special_tokens"), ({**body, "tools": []}, "tools"),
            ({**body, "tools": [{"type": "function", "function": {"nam": "x", "name": "x"}}]}, "tools.0.function.nam"),
            ({**body, "chat_template": "x"}, "chat_template"),
            ({**body, "chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
        ):
            refused = httpx.post(live.url + "/tokenize", json=wrong)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_the_templates_of_requests_are_not_kept() -> None:
    preprocessor = ChatPreprocessor(ServerConfig(trust_request_chat_template=True), None, 256)
    for i in range(40):
        preprocessor._tool_format(ChatTemplate(f"{{# {'x' * 1000}{i} #}}{{{{ tools }}}}{{{{ messages }}}}"))
    assert len(pickle.dumps(preprocessor._explained)) < 1000
