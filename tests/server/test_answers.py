"""Deltas as JSON, without a server: what a slow reader gets at once says the same as what a quick one gets in pieces."""
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
from minivllm.server.answers import Answer, ChatAnswer, CompletionAnswer, Job


class Letters:
    """Token i is the i-th letter."""

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([97 + token_id])

    def is_special(self, token_id: int) -> bool:
        return False


def make(
    kind: type[Answer], *, prompts: int = 1, n: int = 1, logprobs: int | None = None, prompt_logprobs: int | None = None, **job: Any,
) -> Answer:
    params = SamplingParams(n=n, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    requests = tuple(EngineRequest(request_id=f"r{i}", prompt_token_ids=(0, 1), params=params) for i in range(prompts))
    return kind(Job(id="id", created=1, model="m", fingerprint="fp", requests=requests, **job), Letters())


def speech(child: int, length: int, *, logprobs: bool = False) -> list[OutputDelta]:
    """Token by token; the last one ends it."""
    return [
        OutputDelta("r", child, (t,), chr(97 + t), logprobs=(TokenLogprobs(t, -1.0, 1, (t,), (-1.0,)),) if logprobs else None,
                    finish_reason="stop" if t == length - 1 else None, stop_reason=t if t == length - 1 else None)
        for t in range(length)
    ]


def choices(data: bytes) -> list[dict[str, Any]]:
    bodies = [json.loads(part.removeprefix("data: ")) for part in data.decode().split("\n\n") if part and part != "data: [DONE]"]
    return [choice for body in bodies for choice in body["choices"]]


@pytest.mark.parametrize("kind", [CompletionAnswer, ChatAnswer])
@pytest.mark.parametrize("logprobs", [None, 1])
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), data=st.data())
def test_a_stream_joins_to_the_whole_answer_however_its_deltas_are_bunched(
    kind: type[Answer], logprobs: int | None, lengths: list[int], data: st.DataObject,
) -> None:
    n = len(lengths)
    left = [speech(child, length, logprobs=logprobs is not None) for child, length in enumerate(lengths)]
    stream, whole = make(kind, n=n, logprobs=logprobs, stream=True), make(kind, n=n, logprobs=logprobs)
    out = stream.first()
    while any(left):
        bunch = []
        for _ in range(data.draw(st.integers(1, 4))):
            child = data.draw(st.sampled_from([c for c in range(n) if left[c]] or [0]))
            if left[child]:
                bunch.append(left[child].pop(0))
        out += stream.chunk(0, bunch)
        whole.keep(0, bunch)
    pieces = choices(out + stream.last())
    for choice in whole.whole()["choices"]:
        mine = [piece for piece in pieces if piece["index"] == choice["index"]]
        said = [piece["delta"].get("content", "") if kind is ChatAnswer else piece["text"] for piece in mine]
        assert "".join(said) == (choice["message"]["content"] if kind is ChatAnswer else choice["text"])
        assert [p["finish_reason"] for p in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert (mine[-1]["finish_reason"], mine[-1]["stop_reason"]) == (choice["finish_reason"], choice["stop_reason"])
        if logprobs is not None:
            name = "content" if kind is ChatAnswer else "tokens"
            assert [t for p in mine if p["logprobs"] for t in p["logprobs"][name]] == choice["logprobs"][name]
    assert whole.usage() == stream.usage() and whole.usage()["completion_tokens"] == sum(lengths)


def test_a_chunk_of_text_only_has_the_same_fields_as_any_other() -> None:
    for kind in (CompletionAnswer, ChatAnswer):
        for include_usage in (False, True):
            answer = make(kind, stream=True, include_usage=include_usage)
            plain, last = (json.loads(answer.chunk(0, [delta]).removeprefix(b"data: ")) for delta in speech(0, 2))
            assert list(plain) == list(last) and list(plain["choices"][0]) == list(last["choices"][0])


def test_the_prompts_logprobs_are_echoed_by_every_child_whoever_brought_them() -> None:
    answer = make(CompletionAnswer, n=2, logprobs=1, prompt_logprobs=1, echo=("ab",))
    entry = TokenLogprobs(1, -3.0, 1, (1,), (-3.0,))
    second, first = speech(1, 1, logprobs=True)[0], speech(0, 1, logprobs=True)[0]
    brings = OutputDelta("r", 0, first.token_ids, first.text, first.logprobs, "stop", prompt_logprobs=(None, entry))
    answer.keep(0, [second, brings])
    for choice in answer.whole()["choices"]:
        assert choice["text"] == "aba" and choice["logprobs"]["token_logprobs"] == [None, -3.0, -1.0]
        assert choice["logprobs"]["text_offset"] == [0, 1, 2]


def test_cached_tokens_count_each_prompt_once() -> None:
    answer = make(CompletionAnswer, prompts=2, n=2)
    for prompt in (0, 1):
        answer.keep(prompt, [OutputDelta("r", child, (1,), "b", finish_reason="stop", num_cached_tokens=16) for child in (0, 1)])
    assert answer.usage()["prompt_tokens_details"]["cached_tokens"] == 32
