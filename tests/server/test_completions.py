"""`/v1/completions` through the official client, over a real socket, with a scripted engine."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.scripted import LiveServer, ScriptedEngine, scripted_server

MODEL = "org/fake-model"


@pytest.fixture(scope="module")
def engine(tokenizer_folder: Path) -> ScriptedEngine:
    return ScriptedEngine(tokenizer_folder)


@pytest.fixture(scope="module")
def live(engine: ScriptedEngine) -> Iterator[LiveServer]:
    with scripted_server(engine) as live:
        yield live


def test_a_prompt_is_answered_with_text_and_usage(api: openai.OpenAI, engine: ScriptedEngine) -> None:
    answer = api.completions.create(model=MODEL, prompt="the capital", max_tokens=100)
    prompt, output = len(engine.tokenizer.encode("the capital")), len(engine.tokenizer.encode("Paris 0."))
    assert answer.choices[0].text == "Paris 0." and answer.choices[0].index == 0 and answer.choices[0].finish_reason == "length"
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion" and answer.model == MODEL
    assert answer.system_fingerprint and answer.created > 1_600_000_000
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (prompt, output, prompt + output)
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    assert answer.choices[0].logprobs is None


def test_the_output_is_sixteen_tokens_by_default_and_fewer_at_the_end_of_the_context(api: openai.OpenAI, engine: ScriptedEngine) -> None:
    api.completions.create(model=MODEL, prompt=[5] * 10)
    assert engine.seen[-1].params.max_tokens == 16
    api.completions.create(model=MODEL, prompt=[5] * 250)
    assert engine.seen[-1].params.max_tokens == 6


@pytest.mark.parametrize("prompt, sent", [
    ("the cat", ["the cat"]), (["the cat", "the hat"], ["the cat", "the hat"]), ([5, 6, 7], [(5, 6, 7)]), ([[5, 6], [7]], [(5, 6), (7,)]),
])
def test_all_four_forms_of_a_prompt_are_accepted(api: openai.OpenAI, engine: ScriptedEngine, prompt: object, sent: list[object]) -> None:
    del engine.seen[:]
    answer = api.completions.create(model=MODEL, prompt=prompt)  # type: ignore[call-overload]
    assert len(answer.choices) == len(sent)
    wanted = [tuple(engine.tokenizer.encode(p)) if isinstance(p, str) else p for p in sent]
    assert sorted(r.prompt for r in engine.seen) == sorted(wanted)


def test_a_choice_has_the_index_prompt_times_n_plus_child(api: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.script = lambda prompt, params, child: [((5,), f"prompt {prompt[0]} child {child}")]
    try:
        answer = api.completions.create(model=MODEL, prompt=[[10], [11], [12]], n=2, temperature=0)
        streamed = {c.index: c.text for chunk in api.completions.create(model=MODEL, prompt=[[10], [11], [12]], n=2, stream=True)
                    for c in chunk.choices if c.text}
    finally:
        engine.script = engine.default_script
    wanted = [f"prompt {p} child {c}" for p in (10, 11, 12) for c in (0, 1)]
    assert [c.text for c in answer.choices] == wanted and [c.index for c in answer.choices] == list(range(6))
    assert streamed == dict(enumerate(wanted))
    assert answer.usage is not None and answer.usage.prompt_tokens == 3 and answer.usage.completion_tokens == 6


def test_a_stream_has_one_chunk_per_token_and_the_last_has_the_finish_reason(api: openai.OpenAI, engine: ScriptedEngine) -> None:
    chunks = list(api.completions.create(model=MODEL, prompt="x", max_tokens=100, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == "Paris 0."
    assert len(chunks) == len(engine.tokenizer.encode("Paris 0."))
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({(c.id, c.created, c.model, c.object, c.system_fingerprint) for c in chunks}) == 1
    assert all(c.usage is None for c in chunks)


def test_include_usage_adds_a_last_chunk_without_choices(api: openai.OpenAI) -> None:
    chunks = list(api.completions.create(model=MODEL, prompt="x", max_tokens=3, stream=True, stream_options={"include_usage": True}))
    assert [c.usage for c in chunks[:-1]] == [None] * 3 and chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage is not None and (usage.prompt_tokens, usage.completion_tokens) == (1, 3)


def test_continuous_usage_stats_count_up_in_every_chunk(api: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(api.completions.create(model=MODEL, prompt="x", max_tokens=3, stream=True, stream_options=options))  # type: ignore[call-overload]
    assert [c.usage.completion_tokens for c in chunks] == [1, 2, 3, 3]


def test_a_delta_without_text_makes_no_chunk(api: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.script = lambda prompt, params, child: [((5,), ""), ((6,), "é"), ((7,), ""), ((8,), "")]
    try:
        chunks = list(api.completions.create(model=MODEL, prompt="x", stream=True))
    finally:
        engine.script = engine.default_script
    assert [(c.choices[0].text, c.choices[0].finish_reason) for c in chunks] == [("é", None), ("", "length")]


@pytest.mark.parametrize("text", ['"quotes" \\ and \n\t\x01', "naïve 🦙 日本", "\u2028line"])
def test_any_text_is_unchanged_in_complete_and_streamed_responses(api: openai.OpenAI, engine: ScriptedEngine, text: str) -> None:
    engine.script = lambda prompt, params, child: [((5,), text), ((6,), text)]
    try:
        whole = api.completions.create(model=MODEL, prompt="x").choices[0].text
        pieces = [c.choices[0].text for c in api.completions.create(model=MODEL, prompt="x", stream=True)]
    finally:
        engine.script = engine.default_script
    assert whole == text + text and pieces == [text, text]


def test_logprobs_are_four_parallel_lists(api: openai.OpenAI, engine: ScriptedEngine) -> None:
    logprobs = api.completions.create(model=MODEL, prompt="x", logprobs=2, max_tokens=100).choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.text_offset is not None
    assert "".join(logprobs.tokens) == "Paris 0."
    assert logprobs.token_logprobs == [-0.5] * len(logprobs.tokens)
    assert logprobs.text_offset == [sum(map(len, logprobs.tokens[:i])) for i in range(len(logprobs.tokens))]
    assert logprobs.top_logprobs is not None
    assert all(len(top) == 2 and top[token] == -0.5 for top, token in zip(logprobs.top_logprobs, logprobs.tokens, strict=True))


def test_logprobs_0_lists_only_the_sampled_token(api: openai.OpenAI) -> None:
    logprobs = api.completions.create(model=MODEL, prompt="x", logprobs=0).choices[0].logprobs
    assert logprobs is not None and logprobs.top_logprobs == [{token: -0.5} for token in logprobs.tokens or ()]


def test_the_sampled_token_is_listed_even_if_it_is_not_among_the_most_probable(api: openai.OpenAI) -> None:
    logprobs = api.completions.create(model=MODEL, prompt="x", logprobs=1).choices[0].logprobs
    assert logprobs is not None and all(len(top) == 2 for top in logprobs.top_logprobs or ())


def test_streamed_logprobs_equal_those_of_the_complete_response(api: openai.OpenAI) -> None:
    whole = api.completions.create(model=MODEL, prompt="x", logprobs=1, echo=True).choices[0].logprobs
    pieces = [c.choices[0].logprobs for c in api.completions.create(model=MODEL, prompt="x", logprobs=1, echo=True, stream=True)]
    assert whole is not None
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for piece in pieces for value in getattr(piece, name)] == getattr(whole, name)


def test_echo_puts_the_prompt_in_front_of_every_choice(api: openai.OpenAI) -> None:
    answer = api.completions.create(model=MODEL, prompt=["the cat ", "a "], echo=True, n=2)
    assert [c.text for c in answer.choices] == ["the cat Paris 0.", "the cat Paris 1.", "a Paris 0.", "a Paris 1."]
    chunks = api.completions.create(model=MODEL, prompt="the cat ", echo=True, stream=True)
    assert "".join(c.choices[0].text for c in chunks) == "the cat Paris 0."


def test_echo_with_logprobs_scores_the_prompt_and_its_first_token_has_none(api: openai.OpenAI, engine: ScriptedEngine) -> None:
    answer = api.completions.create(model=MODEL, prompt="the cat", echo=True, logprobs=1, max_tokens=0)
    logprobs, length = answer.choices[0].logprobs, len(engine.tokenizer.encode("the cat"))
    assert answer.choices[0].text == "the cat" and answer.usage is not None and answer.usage.completion_tokens == 0
    assert logprobs is not None and logprobs.token_logprobs == [None] + [-0.5] * (length - 1)
    assert logprobs.top_logprobs is not None and logprobs.top_logprobs[0] is None and "".join(logprobs.tokens or ()) == "the cat"


def test_prompt_logprobs_and_token_ids_are_returned_on_request(api: openai.OpenAI) -> None:
    answer = api.completions.create(
        model=MODEL, prompt=[5, 6], max_tokens=2, extra_body={"prompt_logprobs": 1, "return_token_ids": True},
    ).choices[0].model_dump()
    assert answer["prompt_token_ids"] == [5, 6] and len(answer["token_ids"]) == 2
    first, second = answer["prompt_logprobs"]
    assert first is None and second["6"]["rank"] == 2 and set(second) == {"6", "7"}


def test_streamed_token_ids_equal_those_of_the_complete_response(api: openai.OpenAI) -> None:
    extra = {"return_token_ids": True}
    whole = api.completions.create(model=MODEL, prompt="x", extra_body=extra).choices[0].model_dump()["token_ids"]
    chunks = api.completions.create(model=MODEL, prompt="x", extra_body=extra, stream=True)
    assert [t for c in chunks for t in c.choices[0].model_dump()["token_ids"]] == whole


def test_sampling_fields_reach_the_engine_unchanged(api: openai.OpenAI, engine: ScriptedEngine) -> None:
    api.completions.create(
        model=MODEL, prompt="x", temperature=0.5, top_p=0.5, presence_penalty=1, frequency_penalty=-1, seed=-7, stop=["a", "b"],
        logit_bias={"5": 200}, max_tokens=7,
        extra_body={"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.5, "stop_token_ids": [9], "include_stop_str_in_output": True,
                    "ignore_eos": True, "min_tokens": 2, "bad_words": ["cat"], "allowed_token_ids": [1, 2], "skip_special_tokens": False},
    )
    params = engine.seen[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (0.5, 0.5, 3, 0.1, -7)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, -1, 1.5)
    assert (params.stop, params.stop_token_ids, params.bad_words, params.allowed_token_ids) == (("a", "b"), (9,), ("cat",), (1, 2))
    assert params.logit_bias == {5: 100} and (params.min_tokens, params.max_tokens) == (2, 7)
    assert params.ignore_eos and params.include_stop_str_in_output and not params.skip_special_tokens


def test_null_is_the_default_of_every_field(api: openai.OpenAI, engine: ScriptedEngine) -> None:
    names = ["temperature", "top_p", "n", "stop", "seed", "logit_bias", "logprobs", "echo", "best_of", "suffix", "user", "stream",
             "max_tokens", "presence_penalty", "frequency_penalty", "stream_options", "top_k", "guided_json", "response_format",
             "priority", "cache_salt"]
    api.completions.create(model=MODEL, prompt="x", extra_body=dict.fromkeys(names))
    with_nulls = engine.seen[-1].params
    api.completions.create(model=MODEL, prompt="x")
    assert engine.seen[-1].params == with_nulls


def test_the_models_own_sampling_defaults_apply_unless_the_request_overrides_them(tokenizer_folder: Path) -> None:
    defaults = {"temperature": 0.3, "top_k": 7, "top_p": 0.8, "eos_token_id": 1, "min_p": None}
    engine = ScriptedEngine(tokenizer_folder, generation_config=defaults)
    with scripted_server(engine) as live, openai.OpenAI(base_url=live.url + "/v1", api_key="unused") as api:
        api.completions.create(model=MODEL, prompt="x", top_p=0.9)
    params = engine.seen[-1].params
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.3, 7, 0.9, 0.0)


def test_priority_and_salt_reach_the_engine_under_the_priority_policy(tokenizer_folder: Path) -> None:
    engine = ScriptedEngine(tokenizer_folder, scheduling_policy="priority")
    with scripted_server(engine) as live, openai.OpenAI(base_url=live.url + "/v1", api_key="unused") as api:
        api.completions.create(model=MODEL, prompt="x", extra_body={"priority": -3, "cache_salt": "mine"})
    assert engine.seen[-1].request.priority == -3 and engine.seen[-1].request.cache_salt == "mine"


@pytest.mark.parametrize("echo", [True, False])
def test_offsets_agree_with_the_text_of_a_prompt_that_ends_inside_a_character(
    api: openai.OpenAI, engine: ScriptedEngine, echo: bool,
) -> None:
    """Streamed and whole: each token's offset is where its text begins."""
    of_byte = {engine.tokenizer.token_bytes(i): i for i in reversed(range(320))}
    cat, a = engine.tokenizer.encode("the cat", add_special_tokens=False), of_byte[b"a"]
    first, second = (of_byte[bytes([b])] for b in "é".encode())

    def script(prompt: Sequence[int], *_: object) -> list[tuple[tuple[int, ...], str]]:
        stream = engine.tokenizer.stream(prompt)
        return [((t,), stream.push(t)) for t in (second, a, first, second, a)]

    engine.script = script
    request: dict[str, Any] = dict(model=MODEL, prompt=[*cat, first], logprobs=0, echo=echo, max_tokens=5)
    whole = api.completions.create(**request).choices[0]
    pieces = [chunk.choices[0] for chunk in api.completions.create(**request, stream=True)]
    assert whole.text == "".join(piece.text for piece in pieces) == ("the cat\ufffd" if echo else "") + "\ufffdaéa"
    assert whole.logprobs is not None and whole.logprobs.text_offset is not None
    assert [offset for piece in pieces if piece.logprobs for offset in piece.logprobs.text_offset or ()] == whole.logprobs.text_offset
    output = whole.logprobs.text_offset[len(cat) + 1 if echo else 0:]
    start = len("the cat\ufffd") if echo else 0
    assert output == [start, start + 1, start + 2, start + 2, start + 3] and whole.text[output[1]] == whole.text[output[4]] == "a"
