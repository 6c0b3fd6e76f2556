"""`SamplingParams`: ranges, names, and error messages with a fix."""
from __future__ import annotations

import json as jsonlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivllm import SamplingParams
from minivllm.core.plan import RowAdmission
from minivllm.errors import InvalidInput, NotSupportedYet
from minivllm.sampling.sampler import Sampler
from minivllm.sampling_params import GREEDY_EPSILON


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0), ("n", True), ("n", 1.0), ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")),
        ("temperature", 10**400), ("temperature", "0.5"), ("temperature", True), ("n", 10**9), ("n", np.bool_(True)), ("top_p", 0.0),
        ("top_p", 1.1), ("top_k", -2), ("top_k", 1.5), ("min_p", 1.1), ("presence_penalty", 2.1), ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0), ("repetition_penalty", -1.0), ("repetition_penalty", float("inf")), ("seed", 2**63),
        ("seed", -(2**63) - 1), ("seed", "1"), ("seed", 1.0), ("stop", [""]), ("stop", [1]), ("stop", [str(i) for i in range(5000)]),
        ("bad_words", ["\ud800"]), ("bad_words", [""]), ("bad_words", {"a": 1}), ("stop", b"x"), ("stop", [["a"]]),
        ("stop", 5), ("stop_token_ids", 5),
        ("stop_token_ids", [True]), ("stop_token_ids", [1.0]), ("max_tokens", True), ("top_k", True), ("logprobs", True),
        ("stop_token_ids", [1] * 5000), ("allowed_token_ids", [1] * 600_000),
        ("stop_token_ids", [-1]), ("stop_token_ids", "12"), ("allowed_token_ids", []), ("max_tokens", 0), ("max_tokens", "5"),
        ("min_tokens", 17), ("logprobs", -2), ("prompt_logprobs", 1.5), ("logit_bias", {"x": 1}),
        ("logit_bias", [1, 2]), ("logit_bias", "5"), ("logit_bias", {1.5: 1}), ("logit_bias", {True: 1}), ("logit_bias", {-1: 1}),
        ("logit_bias", {1: "2"}), ("logit_bias", {1: float("nan")}), ("truncate_prompt_tokens", 0), ("truncate_prompt_tokens", -2),
        ("logit_bias", {5: 1, "05": 2}), ("logit_bias", {"\N{FULLWIDTH DIGIT FIVE}": 1}),
        ("truncate_prompt_tokens", 2.0), ("logit_bias", {1: float("inf")}), ("logit_bias", {1: 10**400}), ("ignore_eos", 1),
        ("detokenize", None),
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


@pytest.mark.parametrize("value", [1e-300, 1e-40, 0.01, 1.0, 100.0, 1e3, 1e39, 1e300])
def test_any_positive_repetition_penalty_is_legal_and_stays_finite_in_the_sampler(value: float) -> None:
    params = SamplingParams(repetition_penalty=value, temperature=GREEDY_EPSILON, frequency_penalty=2.0)
    assert params.repetition_penalty == value
    (logits,) = _sampled_logits(params)
    assert torch.isfinite(logits / GREEDY_EPSILON).all()
    if value > 1:  # the prompt's tokens 1 and 2 become less probable, whatever their sign
        assert logits[0] < 100 and logits[1] < -1


@pytest.mark.parametrize("value", [1e4, 1e39, 1e300])
def test_a_huge_temperature_makes_all_tokens_equally_likely(value: float) -> None:
    sampler = Sampler(1, 4, torch.device("cpu"))
    params, rows = SamplingParams(temperature=value), np.zeros(400, np.int64)
    sampler.admit(RowAdmission(0, "a", (0, 1), 2, ((),), params, seed=1, child_index=0))
    logits = torch.tensor([100.0, -100.0, 0.0, 50.0]).repeat(400, 1)
    tokens = sampler.sample(logits, rows, np.arange(2, 402), torch.zeros((1, 402), dtype=torch.int32)).token_ids
    assert np.bincount(tokens, minlength=4).min() > 60


def _sampled_logits(params: SamplingParams) -> torch.Tensor:
    """Logits [1, 4] after the penalties of a request with prompt 0, 1."""
    sampler, logits = Sampler(1, 4, torch.device("cpu")), torch.tensor([[100.0, -1.0, 0.0, 50.0]])
    sampler.admit(RowAdmission(0, "a", (0, 1), 2, ((),), params, seed=1, child_index=0))
    sampler.sample(logits, np.zeros(1, np.int64), np.full(1, 2), torch.zeros((1, 3), dtype=torch.int32))
    return logits


def test_numpy_scalars_and_other_sequences_are_accepted_as_plain_values() -> None:
    params = SamplingParams(
        n=np.int64(2), temperature=np.float32(0.5), top_k=np.int32(7), max_tokens=np.int64(9), seed=np.int64(-7), logprobs=np.int8(3),  # type: ignore[arg-type]
        stop_token_ids=np.array([3, 3, 5]), allowed_token_ids=range(9), stop=("a", "b", "a"), ignore_eos=np.bool_(True),  # type: ignore[arg-type]
        logit_bias={np.int64(4): np.float32(1.5)}, bad_words="spam")  # type: ignore[dict-item]
    plain = SamplingParams(n=2, temperature=0.5, top_k=7, max_tokens=9, seed=-7, logprobs=3, stop_token_ids=(3, 5),
                           allowed_token_ids=tuple(range(9)), stop=("a", "b"), ignore_eos=True, logit_bias={4: 1.5}, bad_words=("spam",))
    assert params == plain and repr(params) == repr(plain)
    assert jsonlib.dumps([params.n, params.temperature, params.seed, params.logit_bias]) == '[2, 0.5, -7, {"4": 1.5}]'


def test_seed_minus_one_means_no_seed_as_in_vllm() -> None:
    assert SamplingParams(seed=-1).seed is None and SamplingParams(seed=-(2**63)).seed == -(2**63)


def test_best_of_is_refused_with_the_setting_to_use() -> None:
    assert SamplingParams(n=2, best_of=2) == SamplingParams(n=2)
    with pytest.raises(InvalidInput, match=r"best_of.*use n.* is not supported yet: leave it out"):
        SamplingParams(best_of=2)


numbers = st.integers() | st.floats()


names = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "seed"]


@given(st.dictionaries(st.sampled_from(names), numbers))
def test_every_accepted_value_fits_the_sampler(fields: dict[str, Any]) -> None:
    """Otherwise one request could fail the step of all others, or fill its row with NaN."""
    try:
        params = SamplingParams(**fields)
    except InvalidInput as error:
        assert error.param in fields
        return
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        assert torch.isfinite(_sampled_logits(params)).all()


def test_a_misspelled_keyword_of_the_constructor_is_refused_with_a_hint() -> None:
    with pytest.raises(TypeError, match="no parameter 'temprature'; did you mean 'temperature'"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]
