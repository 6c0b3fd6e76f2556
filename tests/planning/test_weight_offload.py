"""Which layers stay in host memory: the fewest that save what was requested, spread evenly."""
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivllm.errors import InvalidInput
from minivllm.planning.weight_offload import GIB, WeightOffload, choose_layers


@pytest.mark.parametrize(("gib", "expected"), [
    (0, WeightOffload()),
    (1, WeightOffload((2, 5, 7), 3 * GIB, 2 * GIB, 2 * GIB)),  # the second has a buffer for itself, and is copied once
    (1.5, WeightOffload((1, 3, 5, 7), 4 * GIB, 2 * GIB, 4 * GIB)),
    (2, WeightOffload((1, 3, 5, 7), 4 * GIB, 2 * GIB, 4 * GIB)),
    (6, WeightOffload(tuple(range(8)), 8 * GIB, 2 * GIB, 8 * GIB)),
])
def test_equal_layers(gib: float, expected: WeightOffload) -> None:
    assert choose_layers([GIB] * 8, gib) == expected


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.data())
def test_every_choice_saves_enough_and_one_layer_fewer_does_not(sizes: list[int], data: st.DataObject) -> None:
    counts = [WeightOffload.of(sizes, count) for count in range(len(sizes) + 1)]
    for choice in counts:
        assert choice.host_bytes == sum(sizes[i] for i in choice.layers) >= choice.step_bytes
        assert choice.staging_bytes == sum(max((sizes[i] for i in choice.layers[b::2]), default=0) for b in range(2))
        gaps = [b - a for a, b in zip(choice.layers, choice.layers[1:], strict=False)]
        assert not choice.layers or (choice.layers[-1] == len(sizes) - 1 and max(gaps, default=0) - min(gaps, default=0) <= 1)
    most = max(choice.saved_bytes for choice in counts)
    assert (most > 0) == (len(sizes) > 2)
    if most:
        wanted = data.draw(st.integers(1, most))
        found = choose_layers(sizes, wanted / GIB)
        assert found.saved_bytes >= wanted > counts[len(found.layers) - 1].saved_bytes


def test_more_than_the_model_has_is_refused_with_the_largest_value() -> None:
    with pytest.raises(InvalidInput, match=r"cpu_offload_gb is 9, .* can save 6\.00 GiB at most, since two of 8 .*: lower it") as error:
        choose_layers([GIB] * 8, 9)
    assert error.value.param == "cpu_offload_gb"
    with pytest.raises(InvalidInput, match=r"0\.00055 GiB at most") as error:
        choose_layers([100_000] * 6 + [200_000] * 2, 1)
    assert choose_layers([100_000] * 6 + [200_000] * 2, 0.00055)
    with pytest.raises(InvalidInput, match="leave it out"):
        choose_layers([GIB] * 2, 0.1)
