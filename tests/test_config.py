"""Engine settings: every field is checked, and an unknown name is an error with the nearest valid one."""
from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from minivllm.config import EngineConfig
from minivllm.errors import InvalidInput


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "float8"), ("device", "gpu"), ("load_format", "pt"), ("scheduling_policy", "lifo"), ("block_size", 0),
        ("block_size", 257), ("block_size", "16"), ("max_num_seqs", 0), ("max_model_len", 0), ("max_num_batched_tokens", 0),
        ("num_gpu_blocks_override", 1), ("gpu_memory_utilization", 0.0), ("gpu_memory_utilization", 1.5), ("kv_offloading_size", -1.0),
        ("cpu_offload_gb", -0.5), ("kv_offloading_size", float("nan")), ("kv_offloading_size", float("inf")),
        ("gpu_memory_utilization", float("nan")),
        ("enable_prefix_caching", 1), ("async_scheduling", "yes"), ("max_queue", 0), ("seed", 1.5),
    ],
)
def test_a_wrong_value_is_an_error_that_names_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(InvalidInput) as error:
        EngineConfig(**{field: value})
    assert error.value.param == field and field in str(error.value)


def test_an_error_about_a_choice_names_the_nearest_one() -> None:
    with pytest.raises(InvalidInput, match="did you mean 'bfloat16'"):
        EngineConfig(dtype="bfloat")


def test_an_unknown_keyword_is_a_type_error_with_the_nearest_name() -> None:
    with pytest.raises(TypeError, match="did you mean 'max_model_len'"):
        EngineConfig.from_kwargs(max_modellen=5)


NUMBERS = [f for f in dataclasses.fields(EngineConfig) if str(f.type).split(" | ")[0] in ("int", "float")]


@pytest.mark.parametrize("value", [10**400, -(10**400), 10**5000, 2**63, 1e308, -1e308],
                         ids=["10e400", "-10e400", "10e5000", "2e63", "1e308", "-1e308"])
@pytest.mark.parametrize("field", NUMBERS, ids=lambda f: f.name)
def test_a_number_too_large_for_any_machine_is_a_short_error(field: dataclasses.Field[Any], value: float) -> None:
    with pytest.raises(InvalidInput) as error:
        EngineConfig(**{field.name: value})
    assert error.value.param == field.name and len(str(error.value)) < 250


@pytest.mark.parametrize("field", ["max_model_len", "max_num_batched_tokens", "num_gpu_blocks_override", "max_queue"])
def test_counts_fit_in_32_bits(field: str) -> None:
    EngineConfig(**{field: 2**31 - 1})
    with pytest.raises(InvalidInput, match=f"{field} must be at most 2147483647, got 2147483648"):
        EngineConfig(**{field: 2**31})


def test_a_percentage_has_a_hint() -> None:
    with pytest.raises(InvalidInput, match=r"gpu_memory_utilization must be in \(0, 1\], got 90; 90% is 0.9"):
        EngineConfig(gpu_memory_utilization=90)
