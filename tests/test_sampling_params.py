"""`SamplingParams`: ranges, names, and error messages with a fix."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivllm import SamplingParams
from minivllm.errors import InvalidInput, NotSupportedYet


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0), ("n", True), ("n", 1.0), ("temperature", -0.1), ("temperature", float("nan")), ("temperature", 1e39),
        ("temperature", 10**400), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -2), ("top_k", 1.5), ("min_p", 1.1),
        ("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("repetition_penalty", 0.0), ("repetition_penalty", 1e-40),
        ("repetition_penalty", 1e3), ("seed", 2**63), ("seed", "1"), ("stop", [""]), ("stop", [1]), ("stop", ["a"] * 5000),
        ("bad_words", ["\ud800"]), ("stop_token_ids", [-1]), ("stop_token_ids", "12"), ("allowed_token_ids", []), ("max_tokens", 0),
        ("max_tokens", "5"), ("min_tokens", 17), ("logprobs", 21), ("logprobs", -1), ("prompt_logprobs", 21), ("logit_bias", {"x": 1}),
        ("logit_bias", {1: float("inf")}), ("logit_bias", {1: 10**400}), ("ignore_eos", 1), ("detokenize", None),
    ],
)
def test_a_value_out_of_range_is_an_error_that_names_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(InvalidInput) as error:
        SamplingParams(**{field: value})
    assert error.value.param == field and field in str(error.value) and len(str(error.value)) < 400


def test_stop_strings_need_detokenization() -> None:
    with pytest.raises(InvalidInput, match="stop_token_ids, or turn detokenize on"):
        SamplingParams(stop="x", detokenize=False)


def test_an_unknown_name_is_refused_with_a_hint_and_an_unsupported_one_says_so() -> None:
    with pytest.raises(InvalidInput, match="did you mean 'temperature'"):
        SamplingParams.from_kwargs(temprature=1.0)
    with pytest.raises(NotSupportedYet, match="not supported yet"):
        SamplingParams.from_kwargs(best_of=2)


def test_equivalent_values_are_normalized() -> None:
    params = SamplingParams(stop="x", top_k=-1, logit_bias={"7": 500})  # type: ignore[dict-item]
    assert params.stop == ("x",) and params.top_k == 0 and params.logit_bias == {7: 100.0}
    assert SamplingParams(temperature=1e-6).greedy and not SamplingParams(temperature=0.01).greedy


numbers = st.integers() | st.floats()


names = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "seed"]


@given(st.dictionaries(st.sampled_from(names), numbers))
def test_every_accepted_value_fits_the_sampler(fields: dict[str, Any]) -> None:
    """Values fit float32 or int32, and divisors are finite and not 0. Otherwise one request could fail the step of all others."""
    try:
        params = SamplingParams(**fields)
    except InvalidInput as error:
        assert error.param in fields
        return
    np.array(params.top_k, np.int32)
    repetition = np.float32(params.repetition_penalty)
    assert 0 < repetition < np.inf and 0 < 1 / repetition < np.inf
    assert params.greedy or 0 < np.float32(params.temperature) < np.inf


def test_a_misspelled_keyword_of_the_constructor_is_refused_with_a_hint() -> None:
    with pytest.raises(TypeError, match="no parameter 'temprature'; did you mean 'temperature'"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]
