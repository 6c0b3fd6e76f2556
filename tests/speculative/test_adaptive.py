"""The rule that chooses the number of drafts from measured acceptance."""
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from minivllm.kernels.tuning import SPECULATION, SpeculationCost
from minivllm.sampling.sampler import MAX_LOGITS_ROWS
from minivllm.speculative.adaptive import LEAST_GAIN, Acceptance, expected_gain

COSTS = st.builds(SpeculationCost, st.floats(1, 1000), st.floats(0, 1), st.just(64), st.integers(1, 512))


@given(st.floats(0, 1), st.integers(1, 300), st.integers(0, 8), COSTS)
def test_drafts_are_chosen_where_they_gain_and_fit_one_sampling_call(right: float, seqs: int, most: int, cost: SpeculationCost) -> None:
    length = Acceptance(right).length(seqs, most, cost)
    assert 0 <= length <= most
    if length:
        assert seqs * (1 + length) <= cost.most_rows
        assert expected_gain(round(right * 50) / 50, seqs, length, cost) > LEAST_GAIN * 0.99  # the rule takes 0.98 for 1


def test_a_step_with_drafts_has_no_more_rows_than_one_sampling_call() -> None:
    cost = SPECULATION["cuda"]
    assert cost.most_rows == MAX_LOGITS_ROWS
    assert [Acceptance(0.9).length(seqs, 8, cost) for seqs in (1, 32, 64)] == [8, 7, 3]
    assert [Acceptance(0.9).length(seqs, 8, SpeculationCost(1e9, 0.0, 1000, MAX_LOGITS_ROWS)) for seqs in (128, 129, 300)] == [1, 0, 0]


def test_acceptance_follows_the_newest_observations() -> None:
    acceptance, lengths = Acceptance(0.9), []
    for _ in range(40):
        lengths.append(acceptance.length(1, 8, SPECULATION["cuda"]))
        acceptance.tested(False)
    assert lengths[0] == 8 and lengths[-1] == 0 and lengths == sorted(lengths, reverse=True)
    for _ in range(40):
        acceptance.tested(True)
    assert acceptance.length(1, 8, SPECULATION["cuda"]) == 8
