"""Which steps are captured as CUDA graphs: decided from the model's size alone, without a GPU."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench.models import COMMON, SHAPES
from minivllm.families import ModelSpec, parse_config
from minivllm.kernels.tuning import LARGE_MIXED_GRAPHS, LAUNCH_FLOPS, MIXED_GRAPHS
from minivllm.worker.cuda_graphs import flops_of_earlier_keys, graph_bytes, mixed_shapes


def spec(name: str, **changes: Any) -> ModelSpec:
    return parse_config({**COMMON, **SHAPES[name], **changes})


def test_small_models_have_graphs_of_whole_steps_and_large_ones_of_some_hundreds_of_tokens() -> None:
    largest = [mixed_shapes(spec(name), 8192)[-1][0] for name in ("smollm2-135m", "qwen3-0.6b", "mistral-7b")]
    assert largest == [8192, 3072, 512]


@pytest.mark.parametrize("budget", [600, 768, 5000, 8192, 100_000])
def test_no_large_graph_is_larger_than_a_step_may_be(budget: int) -> None:
    shapes = mixed_shapes(spec("smollm2-135m"), budget)
    assert shapes[: len(MIXED_GRAPHS)] == MIXED_GRAPHS
    assert [tokens for tokens, _ in shapes[len(MIXED_GRAPHS):]] == [tokens for tokens in LARGE_MIXED_GRAPHS if tokens <= budget]


def test_chunks_after_many_earlier_keys_run_without_a_graph() -> None:
    model = spec("qwen3-0.6b")

    def flops(*chunks: tuple[int, int]) -> float:
        return flops_of_earlier_keys(model, *np.array(chunks).T)

    assert flops((10, 30)) == 28 * 4 * 2048 * 10 * 20
    assert flops((3000, 3000)) == 0
    assert flops((256, 2000), (500, 1000)) < LAUNCH_FLOPS / 2 < flops((256, 32000), (1, 30)) < flops((2000, 32000))
    windowed = spec("mistral-7b", sliding_window=100)
    assert flops_of_earlier_keys(windowed, *np.array([(10, 30), (10, 500)]).T) == 32 * 4 * 4096 * 10 * (20 + 100)


def test_a_model_with_almost_no_weights_does_not_divide_by_zero() -> None:
    tiny = spec("smollm2-135m", hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    assert mixed_shapes(tiny, 8192)[-1][0] == 8192


def test_memory_reserved_for_graphs_grows_with_the_largest_graph() -> None:
    model = spec("smollm2-135m")
    assert graph_bytes(model, 256, 512) < graph_bytes(model, 256, 2048) < graph_bytes(model, 256, 8192)
