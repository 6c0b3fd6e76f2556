"""Stop strings and text: what is held back, where the output is cut, and that it costs no more as the text grows."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.core.plan import StepPlan, StepResult, Stop
from minivllm.core.stopping import StopRule
from minivllm.engine.detokenizer import Detokenizer, StopMatcher
from minivllm.engine.tokenizer import Tokenizer
from minivllm.sampling_params import SamplingParams
from tests.engine import tokenizers_for_tests as build

EOS = 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(build.save(build.byte_level(), tmp_path_factory.mktemp("tokenizer")))


def _plan(*sequence_ids: str) -> StepPlan:
    count = len(sequence_ids)
    ones = (1,) * count
    return StepPlan(
        step_id=0, request_ids=sequence_ids, rows=tuple(range(count)), starts=ones, num_tokens=ones,
        new_blocks=(((),),) * count, drafts=((),) * count, sample_from=tuple(range(count)), sample_rows=tuple(range(count)),
        sample_ids=sequence_ids,
    )


def _add(detokenizer: Detokenizer, sequence_id: str, params: SamplingParams, max_tokens: int) -> None:
    detokenizer.add(sequence_id, [], params, StopRule.of(params, (EOS,), max_tokens))


def _scan(detokenizer: Detokenizer, tokens: Sequence[int], sequence_id: str = "a") -> Stop | None:
    result = StepResult(step_id=0, token_ids=(tuple(tokens),))
    return detokenizer.scan(_plan(sequence_id), result).get(0)


def _bytes_as_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token per byte, so that every stop string lies across tokens."""
    of_byte = {tokenizer.token_bytes(i): i for i in reversed(range(tokenizer.vocab_size))}
    return [of_byte[bytes([b])] for b in text.encode()]


def _run(
    tokenizer: Tokenizer, tokens: Sequence[int], max_tokens: int = 10**6, per_step: int = 1, **params: object,
) -> tuple[list[str], int, str | None]:
    """Pieces of text, number of tokens kept, matched stop string; the scheduler's part is played by this function."""
    settings_ = SamplingParams(max_tokens=None, **params)  # type: ignore[arg-type]
    detokenizer = Detokenizer(tokenizer)
    _add(detokenizer, "a", settings_, max_tokens)
    ending = set(settings_.stop_token_ids or ()) | (set() if settings_.ignore_eos else {EOS})
    pieces: list[str] = []
    kept = 0
    for start in range(0, len(tokens), per_step):
        step = list(tokens[start: start + per_step])
        stop = _scan(detokenizer, step)
        step = step[: stop.keep] if stop else step
        cut = next((i + 1 for i, t in enumerate(step) if t in ending and kept + i + 1 > settings_.min_tokens), None)
        step = step[: min(cut or len(step), max_tokens - kept)]
        kept += len(step)
        if stop or cut or kept == max_tokens:
            pieces.append(detokenizer.take("a", "stop"))
            assert len(detokenizer) == 0
            return pieces, kept, stop.matched if stop else None
        pieces.append(detokenizer.take("a", None))
    pieces.append(detokenizer.take("a", "length"))
    return pieces, kept, None


def _cut(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """The specification: cut at the stop string that ends first, the longest of those that end there."""
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
def test_text_is_cut_at_the_first_stop_string_however_tokens_fall(
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
def test_no_more_is_held_back_than_could_become_a_stop_string(tokenizer: Tokenizer, text: str, stop: str) -> None:
    detokenizer = Detokenizer(tokenizer)
    _add(detokenizer, "a", SamplingParams(stop=stop), 100)
    given_out = ""
    for i, token in enumerate(_bytes_as_tokens(tokenizer, text)):
        if _scan(detokenizer, [token]) is not None:
            return
        given_out += detokenizer.take("a", None)
        seen = text[: i + 1]
        held = next(k for k in range(len(stop) - 1, -1, -1) if seen.endswith(stop[:k]))
        assert given_out == seen[: len(seen) - held]


@settings(deadline=None, max_examples=300)
@given(text=st.text(st.sampled_from("ab"), max_size=40), stops=st.lists(st.text(st.sampled_from("ab"), min_size=1, max_size=6), max_size=4))
def test_the_matcher_agrees_with_a_search_of_the_whole_text(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    for i, char in enumerate(text):
        seen = text[: i + 1]
        found = matcher.push(char)
        assert found == max((s for s in stops if seen.endswith(s)), key=len, default=None)
        assert matcher.partial == max((k for s in stops for k in range(len(s)) if seen.endswith(s[:k])), default=0)


def test_the_work_per_token_does_not_grow_with_the_text_nor_with_the_stop_string(tokenizer: Tokenizer) -> None:
    steps = 0

    class Counting(str):
        def __getitem__(self, index: object) -> str:  # type: ignore[override]
            nonlocal steps
            steps += 1
            return str.__getitem__(self, index)  # type: ignore[arg-type,index]

    stop = Counting("a" * 400 + "b")
    matcher = StopMatcher([stop])
    steps = 0
    for char in ("a" * 399 + "c") * 20:  # the worst case: nearly a match, again and again
        matcher.push(char)
    assert steps <= 4 * 400 * 20


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
    detokenizer = Detokenizer(tokenizer)
    _add(detokenizer, "a", SamplingParams(stop="b"), 100)
    assert _scan(detokenizer, _bytes_as_tokens(tokenizer, "xbyz")) == Stop(keep=2, matched="b")
    assert detokenizer.take("a", "stop") == "x"


def test_a_stop_string_past_the_token_limit_is_not_found(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    _add(detokenizer, "a", SamplingParams(stop="b"), 2)
    assert _scan(detokenizer, _bytes_as_tokens(tokenizer, "xyb")) is None
    assert detokenizer.take("a", "length") == "xy"


def test_eos_and_stop_tokens_are_tokens_but_not_text(tokenizer: Tokenizer) -> None:
    a, b = _bytes_as_tokens(tokenizer, "ab")
    assert _run(tokenizer, [a, EOS], skip_special_tokens=False)[:2] == (["a", ""], 2)
    assert _run(tokenizer, [a, b], stop_token_ids=[b])[:2] == (["a", ""], 2)
    assert _run(tokenizer, [a, b], stop_token_ids=[b], include_stop_str_in_output=True)[:2] == (["a", "b"], 2)
    assert "".join(_run(tokenizer, [a, EOS, b], ignore_eos=True, skip_special_tokens=False)[0]) == "a</s>b"
    assert "".join(_run(tokenizer, [a, EOS, b], ignore_eos=True)[0]) == "ab"


def test_held_back_text_comes_out_when_the_output_ends_otherwise(tokenizer: Tokenizer) -> None:
    tokens = _bytes_as_tokens(tokenizer, "xSTO")
    assert _run(tokenizer, tokens, stop=["STOP"]) == (["x", "", "", "", "STO"], 4, None)


def test_an_unfinished_character_at_the_end_becomes_one_replacement(tokenizer: Tokenizer) -> None:
    tokens = _bytes_as_tokens(tokenizer, "é🚁")[:-1]
    assert "".join(_run(tokenizer, tokens)[0]) == "é\ufffd"
    # ... but not behind a stop string.
    assert "".join(_run(tokenizer, tokens, stop=["é"])[0]) == ""


def test_sequences_of_one_step_are_kept_apart_and_finished_ones_are_skipped(tokenizer: Tokenizer) -> None:
    a, b = _bytes_as_tokens(tokenizer, "ab")
    detokenizer = Detokenizer(tokenizer)
    _add(detokenizer, "x", SamplingParams(stop="b"), 100)
    _add(detokenizer, "y", SamplingParams(), 100)
    _add(detokenizer, "quiet", SamplingParams(detokenize=False), 100)
    stops = detokenizer.scan(_plan("gone", "y", "quiet", "x"), StepResult(step_id=0, token_ids=((b,), (a,), (a,), (b,))))
    assert stops == {3: Stop(keep=1, matched="b")}
    assert [detokenizer.take(s, None) for s in ("gone", "x", "y", "quiet")] == ["", "", "a", ""]


def test_without_a_tokenizer_there_is_no_text() -> None:
    detokenizer = Detokenizer(None)
    _add(detokenizer, "a", SamplingParams(), 10)
    assert _scan(detokenizer, [5]) is None
    assert detokenizer.take("a", "stop") == ""


def test_the_detokenizer_forgets_what_has_ended(tmp_path: Path) -> None:
    detokenizer = Detokenizer(Tokenizer(build.save(build.byte_level(), tmp_path)))
    for i in range(3):
        _add(detokenizer, str(i), SamplingParams(), 10)
    assert len(detokenizer) == 3
    for i in range(3):
        detokenizer.take(str(i), "abort")
    assert len(detokenizer) == 0
