"""Workloads follow their definitions exactly."""
from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivllm.benchmarks import statistics, workloads


def test_nano_is_exactly_the_published_workload() -> None:
    random.seed(0)
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    lengths = [random.randint(100, 1024) for _ in range(256)]
    work = workloads.nano()
    assert [list(r.prompt_token_ids) for r in work] == prompts
    assert [r.output_len for r in work] == lengths
    assert workloads.output_tokens(work) == 133_966
    assert {r.temperature for r in work} == {0.6}


def test_mixed_requests_stay_within_their_bounds_and_differ() -> None:
    work = workloads.mixed()
    assert len(work) == 32
    assert all(20 <= len(r.prompt_token_ids) <= 200 and 20 <= r.output_len <= 200 for r in work)
    assert len({len(r.prompt_token_ids) for r in work}) > 16 and len({r.output_len for r in work}) > 16


def test_repetitions_of_the_mixed_workload_have_the_same_lengths_and_new_prompts() -> None:
    first, second = workloads.mixed(seed=0), workloads.mixed(seed=1)
    assert [(len(r.prompt_token_ids), r.output_len) for r in first] == [(len(r.prompt_token_ids), r.output_len) for r in second]
    assert not {r.prompt_token_ids for r in first} & {r.prompt_token_ids for r in second}


def test_the_same_seed_gives_the_same_workload_and_another_seed_new_prompts() -> None:
    assert workloads.mixed(seed=3) == workloads.mixed(seed=3)
    first, second = workloads.uniform(4, 128, 8, seed=0), workloads.uniform(4, 128, 8, seed=1)
    assert not {r.prompt_token_ids for r in first} & {r.prompt_token_ids for r in second}


def test_requests_of_the_prefix_workload_start_with_the_cached_prefix_and_differ_after_it() -> None:
    prime, work = workloads.shared_prefix()
    n = len(prime.prompt_token_ids)
    assert n == 2048 and len(work) == 64
    assert all(r.prompt_token_ids[:n] == prime.prompt_token_ids and len(r.prompt_token_ids) == n + 64 for r in work)
    assert len({r.prompt_token_ids[n:] for r in work}) == 64


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentiles_equal_numpys(values: list[float], q: float) -> None:
    assert statistics.percentile(values, q) == pytest.approx(float(np.percentile(values, q)), rel=1e-9, abs=1e-6)


def test_a_percentile_of_no_values_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        statistics.percentile([], 50)
