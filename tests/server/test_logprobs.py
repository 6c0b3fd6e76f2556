"""Log-probabilities in OpenAI's formats, also for tokens that are parts of characters."""
from __future__ import annotations

import math

import pytest

from minivllm.core.plan import TokenLogprobs
from minivllm.server.logprobs import LOWEST, CompletionLogprobs, NumberedTokens, chat_entries, finite, prompt_logprobs


class Bytes:
    """Token i is one piece of "é🦙!"; token 9 is special."""

    def token_bytes(self, token_id: int) -> bytes:
        return {0: "é".encode()[:1], 1: "é".encode()[1:], 2: "🦙".encode()[:3], 3: "🦙".encode()[3:], 4: b"!", 9: b"</s>"}[token_id]

    def is_special(self, token_id: int) -> bool:
        return token_id == 9


def entry(token: int, *tops: int) -> TokenLogprobs:
    return TokenLogprobs(token, -1.0, 1, tops, tuple(-1.0 - i for i in range(len(tops))))


def test_offsets_count_whole_characters_of_the_text() -> None:
    counter = CompletionLogprobs(Bytes(), 0, skip_special=True)
    parts = [counter.add([t], [entry(t)]) for t in (0, 1, 2, 3, 9, 4)]
    assert [p["text_offset"][0] for p in parts] == [0, 0, 1, 1, 2, 2]
    assert CompletionLogprobs(Bytes(), 0, skip_special=False).add([9, 4], [entry(9), entry(4)])["text_offset"] == [0, 4]


def test_a_token_after_an_incomplete_character_starts_behind_its_replacement() -> None:
    counter = CompletionLogprobs(Bytes(), 0, skip_special=True)
    found = [counter.add([t], [entry(t)])["text_offset"][0] for t in (0, 4, 2, 0, 1, 2, 9, 4, 0, 4)]
    assert found == [0, 1, 2, 3, 3, 4, 4, 5, 6, 7], "of the text \ufffd!\ufffd\u00e9\ufffd!\ufffd!"


def test_a_part_of_a_character_is_named_by_its_bytes_so_that_names_are_unique() -> None:
    tops = CompletionLogprobs(Bytes(), 2, skip_special=True).add([0], [entry(0, 0, 1)])
    assert tops["tokens"] == ["bytes:\\xc3"]
    assert tops["top_logprobs"] == [{"bytes:\\xc3": -1.0, "bytes:\\xa9": -2.0}]


def test_chat_bytes_are_exact_for_parts_of_characters() -> None:
    first, second = chat_entries(Bytes(), [entry(0, 0, 1, 4), entry(4)], top=2)
    assert first["token"] == "\ufffd" and first["bytes"] == [0xC3] and [t["bytes"] for t in first["top_logprobs"]] == [[0xC3], [0xA9]]
    assert second == {"token": "!", "logprob": -1.0, "bytes": [33], "top_logprobs": []}


def test_impossible_tokens_have_a_finite_logprob() -> None:
    assert [finite(x) for x in (-math.inf, math.nan, -2.5)] == [LOWEST, LOWEST, -2.5]
    impossible = TokenLogprobs(4, -math.inf, 400, (4,), (-math.inf,))
    assert chat_entries(Bytes(), [impossible], 1)[0]["top_logprobs"][0]["logprob"] == LOWEST
    assert CompletionLogprobs(Bytes(), 1, True).add([4], [impossible])["top_logprobs"] == [{"!": LOWEST}]
    assert prompt_logprobs(Bytes(), [None, impossible])[1] == {"4": {"logprob": LOWEST, "rank": 400, "decoded_token": "!"}}


def test_prompt_logprobs_have_the_rank_of_a_token_that_is_not_among_the_most_probable() -> None:
    row = prompt_logprobs(Bytes(), [TokenLogprobs(4, -7.0, 12, (0, 1), (-1.0, -2.0))])[0]
    assert row is not None and {k: v["rank"] for k, v in row.items()} == {"0": 1, "1": 2, "4": 12}


def test_without_a_tokenizer_tokens_are_named_by_their_ids() -> None:
    assert CompletionLogprobs(NumberedTokens(), 0, True).add([7], [entry(7)])["tokens"] == ["token_id:7"]


# -- an echoed prompt: offsets agree with the text --------------------------------------------------------------------


class Spaces(Bytes):
    """Tokens of a SentencePiece vocabulary, whose first one has a space in front: 5 is " Hi", 6 is " you"."""

    def token_bytes(self, token_id: int) -> bytes:
        return {5: b" Hi", 6: b" you"}.get(token_id) or super().token_bytes(token_id)


@pytest.mark.parametrize("pieces", [1, 2, 99])
@pytest.mark.parametrize(("echo", "prompt", "output", "offsets"), [
    ("!\ufffd", [4, 0], [1, 4], [0, 1, 2, 3]),  # the prompt ends inside a character, and the output completes it
    ("!\ufffd", [4, 2], [3], [0, 1, 2]),
    ("\ufffd", [0], [4], [0, 1]),
    ("\ufffd!", [0, 4], [0, 4], [0, 1, 2, 3]),
    ("é", [0, 1], [2, 3, 4], [0, 0, 1, 1, 2]),
    ("Hi you", [5, 6], [6], [0, 2, 6]),  # the tokenizer put a space in front
    ("Hi</s> you", [9, 5, 9, 6], [4], [0, 0, 2, 6, 10]),  # BOS was added, the user typed the other one
    ("Hi you", [9, 5, 6], [9, 4], [0, 0, 2, 6, 6]),
])
def test_offsets_of_an_echoed_prompt_and_its_output_agree_with_the_text(
    echo: str, prompt: list[int], output: list[int], offsets: list[int], pieces: int,
) -> None:
    counter, found = CompletionLogprobs(Spaces(), 0, skip_special=True, echo=(len(prompt), echo)), []
    tokens = prompt + output
    for part in (tokens[:len(prompt) + pieces - 1], *([t] for t in tokens[len(prompt) + pieces - 1:])):
        found += counter.add(part, [entry(t) for t in part])["text_offset"]
    assert found == offsets
