"""Deltas as JSON, without a server: the response is the same however the deltas are grouped."""
from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivllm.core.plan import TokenLogprobs
from minivllm.engine_request import EngineRequest
from minivllm.outputs import OutputDelta
from minivllm.sampling_params import SamplingParams
from minivllm.server.formatters import ChatFormatter, ChoicesFormatter, CompletionFormatter, PreparedRequest
from minivllm.server.output_spec import OutputSpec
from minivllm.server.parsed_chat import ParsedChatFormatter

KINDS = [CompletionFormatter, ChatFormatter, ParsedChatFormatter]


class Letters:
    """Token i is the i-th letter."""

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([97 + token_id])

    def is_special(self, token_id: int) -> bool:
        return False


def make(
    kind: type[ChoicesFormatter], *, prompts: int = 1, n: int = 1, logprobs: int | None = None, prompt_logprobs: int | None = None,
    **fields: Any,
) -> ChoicesFormatter:
    params = SamplingParams(n=n, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    requests = tuple(EngineRequest(request_id=f"r{i}", prompt_token_ids=(0, 1), params=params) for i in range(prompts))
    return kind(PreparedRequest(id="id", created=1, model="m", fingerprint="fp", prompts=requests, **fields), Letters())


def deltas_of(child: int, length: int, *, logprobs: bool = False) -> list[OutputDelta]:
    """One delta per token. The last one has the finish reason."""
    return [
        OutputDelta("r", child, (t,), chr(97 + t), logprobs=(TokenLogprobs(t, -1.0, 1, (t,), (-1.0,)),) if logprobs else None,
                    finish_reason="stop" if t == length - 1 else None, stop_reason=t if t == length - 1 else None)
        for t in range(length)
    ]


def choices(data: bytes) -> list[dict[str, Any]]:
    bodies = [json.loads(part.removeprefix("data: ")) for part in data.decode().split("\n\n") if part and part != "data: [DONE]"]
    return [choice for body in bodies for choice in body["choices"]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("logprobs", [None, 1])
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), data=st.data())
def test_a_stream_adds_up_to_the_complete_response_however_its_deltas_are_grouped(
    kind: type[ChoicesFormatter], logprobs: int | None, lengths: list[int], data: st.DataObject,
) -> None:
    n, is_chat = len(lengths), kind is not CompletionFormatter
    left = [deltas_of(child, length, logprobs=logprobs is not None) for child, length in enumerate(lengths)]
    stream, complete = make(kind, n=n, logprobs=logprobs, stream=True), make(kind, n=n, logprobs=logprobs)
    out = stream.first_events()
    while any(left):
        group = []
        for _ in range(data.draw(st.integers(1, 4))):
            child = data.draw(st.sampled_from([c for c in range(n) if left[c]] or [0]))
            if left[child]:
                group.append(left[child].pop(0))
        fast = stream.text_events(group) if data.draw(st.booleans()) else None
        out += stream.events(0, group) if fast is None else fast
        complete.collect(0, group)
    pieces = choices(out + stream.last_events())
    for choice in complete.body()["choices"]:
        own = [piece for piece in pieces if piece["index"] == choice["index"]]
        texts = [piece["delta"].get("content", "") if is_chat else piece["text"] for piece in own]
        assert "".join(texts) == (choice["message"]["content"] if is_chat else choice["text"])
        assert [p["finish_reason"] for p in own] == [None] * (len(own) - 1) + ["stop"]
        assert (own[-1]["finish_reason"], own[-1]["stop_reason"]) == (choice["finish_reason"], choice["stop_reason"])
        if logprobs is not None:
            name = "content" if is_chat else "tokens"
            assert [t for p in own if p["logprobs"] for t in p["logprobs"][name]] == choice["logprobs"][name]
    assert complete.state.usage() == stream.state.usage() and stream.state.usage()["completion_tokens"] == sum(lengths)


@pytest.mark.parametrize("kind", [CompletionFormatter, ChatFormatter])
@pytest.mark.parametrize("include_usage", [False, True])
def test_a_chunk_of_text_only_has_the_same_fields_as_other_chunks(kind: type[ChoicesFormatter], include_usage: bool) -> None:
    formatter = make(kind, stream=True, include_usage=include_usage)
    plain, last = (json.loads(formatter.events(0, [delta]).removeprefix(b"data: ")) for delta in deltas_of(0, 2))
    assert list(plain) == list(last) and list(plain["choices"][0]) == list(last["choices"][0])


@pytest.mark.parametrize("kind", [CompletionFormatter, ChatFormatter])
def test_the_fast_path_gives_the_same_bytes_and_declines_the_first_and_the_last_delta(kind: type[ChoicesFormatter]) -> None:
    first, middle, last = deltas_of(0, 3)
    fast, slow = make(kind, stream=True), make(kind, stream=True)
    assert fast.text_events([first]) is None
    fast.events(0, [first])
    slow.events(0, [first])
    assert fast.text_events([middle]) == slow.events(0, [middle]) != b""
    assert fast.text_events([last]) is None and fast.state.usage() == slow.state.usage()


@pytest.mark.parametrize("kind, fields", [
    (CompletionFormatter, {"continuous_usage": True}), (CompletionFormatter, {"return_token_ids": True}), (ChatFormatter, {"logprobs": 0}),
    (ParsedChatFormatter, {"output": OutputSpec(start="undecided", splits_reasoning=True)}),
])
def test_the_fast_path_declines_chunks_that_are_more_than_their_text(kind: type[ChoicesFormatter], fields: Any) -> None:
    formatter = make(kind, stream=True, **fields)
    first, middle, _ = deltas_of(0, 3)
    formatter.events(0, [first])
    assert formatter.text_events([middle]) is None


def test_every_child_echoes_the_prompts_logprobs_whichever_delta_has_them() -> None:
    formatter = make(CompletionFormatter, n=2, logprobs=1, prompt_logprobs=1, echo=("ab",))
    entry = TokenLogprobs(1, -3.0, 1, (1,), (-3.0,))
    second, first = deltas_of(1, 1, logprobs=True)[0], deltas_of(0, 1, logprobs=True)[0]
    with_prompt = OutputDelta("r", 0, first.token_ids, first.text, first.logprobs, "stop", prompt_logprobs=(None, entry))
    formatter.collect(0, [second, with_prompt])
    for choice in formatter.body()["choices"]:
        assert choice["text"] == "aba" and choice["logprobs"]["token_logprobs"] == [None, -3.0, -1.0]
        assert choice["logprobs"]["text_offset"] == [0, 1, 2]


def test_cached_tokens_count_each_prompt_once() -> None:
    formatter = make(CompletionFormatter, prompts=2, n=2)
    for prompt in (0, 1):
        formatter.collect(prompt, [OutputDelta("r", child, (1,), "b", finish_reason="stop", num_cached_tokens=16) for child in (0, 1)])
    assert formatter.state.usage()["prompt_tokens_details"]["cached_tokens"] == 32
