"""The rule that ends an output, case by case."""
from __future__ import annotations

import pytest

from minivllm.core.plan import Stop
from minivllm.core.stopping import StopRule
from minivllm.sampling_params import SamplingParams

EOS, END = 1, 7
TEXT = Stop(keep=2, matched="###")


def rule(max_tokens: int = 10, **params: object) -> StopRule:
    settings = SamplingParams(max_tokens=None, stop_token_ids=[END], **params)  # type: ignore[arg-type]
    return StopRule.of(settings, (EOS,), max_tokens)


@pytest.mark.parametrize(("before", "tokens", "stop", "expected"), [
    (0, (3, 4), None, ((3, 4), None, None)),
    (0, (3, EOS, 4), None, ((3, EOS), "stop", None)),
    (0, (3, END, EOS), None, ((3, END), "stop", END)),
    (9, (3, 4), None, ((3,), "length", None)),
    (9, (3,), None, ((3,), "length", None)),
    (9, (END, 4), None, ((END,), "stop", END)),  # a stop token on the last token that is allowed
    (0, (3, 4, 5), TEXT, ((3, 4), "stop", "###")),
    (8, (3, 4, 5), TEXT, ((3, 4), "stop", "###")),  # a stop string on the last token that is allowed
    (9, (3, 4, 5), TEXT, ((3,), "length", None)),  # the limit comes before the stop string
    (0, (EOS, 4, 5), TEXT, ((EOS,), "stop", None)),
    (0, (3, END, 5), TEXT, ((3, END), "stop", END)),  # a stop token that completes a stop string
    (0, (3,), Stop(keep=0, matched=None), ((), "stop", None)),
    (0, (), None, ((), None, None)),
])
def test_the_first_end_wins(before: int, tokens: tuple[int, ...], stop: Stop | None, expected: tuple[object, ...]) -> None:
    assert rule().cut(before, tokens, stop) == expected


def test_stop_tokens_count_only_after_min_tokens() -> None:
    patient = rule(min_tokens=2)
    assert [patient.end(before, (END,)) for before in range(4)] == [(1, None), (1, None), (1, "stop"), (1, "stop")]
    assert patient.end(0, (EOS, END, 3, EOS, 3)) == (4, "stop")


def test_eos_is_an_ordinary_token_with_ignore_eos_and_may_still_be_a_stop_token() -> None:
    assert rule(ignore_eos=True).cut(0, (EOS, 3), None) == ((EOS, 3), None, None)
    params = SamplingParams(stop_token_ids=[EOS], ignore_eos=True)
    assert StopRule.of(params, (EOS,), 10).cut(0, (EOS, 3), None) == ((EOS,), "stop", EOS)
    assert StopRule.of(SamplingParams(stop_token_ids=[EOS]), (EOS,), 10).cut(0, (EOS, 3), None) == ((EOS,), "stop", None)
