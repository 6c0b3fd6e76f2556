"""Text and stop strings: which characters are held back, and where the output ends."""
from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.core.plan import Stop
from minivllm.core.stopping import StopRule
from minivllm.engine.detokenizer import SequenceText
from minivllm.engine.tokenizer import Tokenizer
from minivllm.sampling_params import SamplingParams
from tests.engine import tokenizers_for_tests as build

EOS = 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(build.save(build.byte_level(), tmp_path_factory.mktemp("tokenizer")))


def _text(tokenizer: Tokenizer, params: SamplingParams, max_tokens: int = 100) -> SequenceText:
    return SequenceText(tokenizer.stream([], params.skip_special_tokens), params, StopRule.of(params, (EOS,), max_tokens))


def _bytes_as_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token per byte, so that stop strings span tokens."""
    of_byte = {tokenizer.token_bytes(i): i for i in reversed(range(tokenizer.vocab_size))}
    return [of_byte[bytes([b])] for b in text.encode()]


def _run(
    tokenizer: Tokenizer, tokens: Sequence[int], max_tokens: int = 10**6, per_step: int = 1, **params: object,
) -> tuple[list[str], int, str | None]:
    """(pieces of text, number of tokens kept, matched stop string). This function does the scheduler's part."""
    settings_ = SamplingParams(max_tokens=None, **params)  # type: ignore[arg-type]
    sequence = _text(tokenizer, settings_, max_tokens)
    ending = set(settings_.stop_token_ids or ()) | (set() if settings_.ignore_eos else {EOS})
    pieces: list[str] = []
    kept = 0
    for start in range(0, len(tokens), per_step):
        step = list(tokens[start: start + per_step])
        stop = sequence.push(step)
        step = step[: stop.keep] if stop else step
        cut = next((i + 1 for i, t in enumerate(step) if t in ending and kept + i + 1 > settings_.min_tokens), None)
        step = step[: min(cut or len(step), max_tokens - kept)]
        kept += len(step)
        if stop or cut or kept == max_tokens:
            pieces.append(sequence.take(finished=True))
            return pieces, kept, stop.matched if stop else None
        pieces.append(sequence.take(finished=False))
    pieces.append(sequence.take(finished=True))
    return pieces, kept, None


def _cut(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """The specification: the output ends with the stop string that ends first. If several do, with the longest one."""
    ends = [(text.find(s) + len(s), -len(s), s) for s in stops if s in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end if include else end - len(stop)], stop


@settings(deadline=None, max_examples=300)
@given(
    text=st.text(st.sampled_from("abé"), max_size=25), stops=st.lists(st.text(st.sampled_from("abé"), min_size=1, max_size=5), max_size=3),
    include=st.booleans(), per_step=st.integers(1, 3),
)
def test_text_ends_at_the_first_stop_string_wherever_token_boundaries_are(
    tokenizer: Tokenizer, text: str, stops: list[str], include: bool, per_step: int,
) -> None:
    tokens = _bytes_as_tokens(tokenizer, text)
    pieces, kept, matched = _run(tokenizer, tokens, per_step=per_step, stop=stops, include_stop_str_in_output=include)
    expected, stop = _cut(text, stops, include)
    assert ("".join(pieces), matched) == (expected, stop)
    if stop is not None:
        assert kept == len((expected if include else expected + stop).encode())


@settings(deadline=None, max_examples=300)
@given(text=st.text(st.sampled_from("ab"), max_size=20), stop=st.text(st.sampled_from("ab"), min_size=1, max_size=5))
def test_only_text_that_may_become_a_stop_string_is_held_back(tokenizer: Tokenizer, text: str, stop: str) -> None:
    sequence = _text(tokenizer, SamplingParams(stop=stop))
    given_out = ""
    for i, token in enumerate(_bytes_as_tokens(tokenizer, text)):
        if sequence.push([token]) is not None:
            return
        given_out += sequence.take(finished=False)
        seen = text[: i + 1]
        held = next(k for k in range(len(stop) - 1, -1, -1) if seen.endswith(stop[:k]))
        assert given_out == seen[: len(seen) - held]


def test_a_stop_string_before_min_tokens_does_not_end_the_output(tokenizer: Tokenizer) -> None:
    tokens = _bytes_as_tokens(tokenizer, "xabyabz")
    assert _run(tokenizer, tokens, stop=["ab"])[:2] == (["x", "", ""], 3)
    for min_tokens in (4, 5, 6):
        pieces, kept, matched = _run(tokenizer, tokens, stop=["ab"], min_tokens=min_tokens)
        assert ("".join(pieces), kept, matched) == ("xaby", 6, "ab")
    assert "".join(_run(tokenizer, tokens, stop=["ab"], min_tokens=7)[0]) == "xabyabz"


def test_text_after_the_stop_string_in_the_same_token_is_dropped(tokenizer: Tokenizer) -> None:
    fox = tokenizer.encode(" quick")[0]
    text = tokenizer.token_bytes(fox).decode()
    assert len(text) > 2
    pieces, kept, matched = _run(tokenizer, [fox, fox], stop=[text[1]], include_stop_str_in_output=True)
    assert ("".join(pieces), kept, matched) == (text[:2], 1, text[1])


def test_tokens_after_the_stop_in_one_result_are_not_kept(tokenizer: Tokenizer) -> None:
    sequence = _text(tokenizer, SamplingParams(stop="b"))
    assert sequence.push(_bytes_as_tokens(tokenizer, "xbyz")) == Stop(keep=2, matched="b")
    assert sequence.take(finished=True) == "x"


def test_a_stop_string_past_the_token_limit_is_not_found(tokenizer: Tokenizer) -> None:
    sequence = _text(tokenizer, SamplingParams(stop="b"), max_tokens=2)
    assert sequence.push(_bytes_as_tokens(tokenizer, "xyb")) is None
    assert sequence.take(finished=True) == "xy"


def test_eos_and_stop_tokens_are_tokens_but_not_text(tokenizer: Tokenizer) -> None:
    a, b = _bytes_as_tokens(tokenizer, "ab")
    assert _run(tokenizer, [a, EOS], skip_special_tokens=False)[:2] == (["a", ""], 2)
    assert _run(tokenizer, [a, b], stop_token_ids=[b])[:2] == (["a", ""], 2)
    assert _run(tokenizer, [a, b], stop_token_ids=[b], include_stop_str_in_output=True)[:2] == (["a", "b"], 2)
    assert "".join(_run(tokenizer, [a, EOS, b], ignore_eos=True, skip_special_tokens=False)[0]) == "a</s>b"
    assert "".join(_run(tokenizer, [a, EOS, b], ignore_eos=True)[0]) == "ab"


def test_held_back_text_is_returned_when_the_output_ends_for_another_reason(tokenizer: Tokenizer) -> None:
    tokens = _bytes_as_tokens(tokenizer, "xSTO")
    assert _run(tokenizer, tokens, stop=["STOP"]) == (["x", "", "", "", "STO"], 4, None)


def test_an_unfinished_character_at_the_end_becomes_one_replacement(tokenizer: Tokenizer) -> None:
    tokens = _bytes_as_tokens(tokenizer, "é🚁")[:-1]
    assert "".join(_run(tokenizer, tokens)[0]) == "é\ufffd"
    # After a stop string it is dropped.
    assert "".join(_run(tokenizer, tokens, stop=["é"])[0]) == ""
