"""The frequencies of every kind of rotary scaling equal those of Transformers' own functions, on random parameters."""
from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minivllm.families import RopeSpec, parse_config
from minivllm.layers.rope import inverse_frequencies

HEAD_DIMS = st.sampled_from([4, 16, 64, 80, 128])
THETAS = st.sampled_from([500.0, 10000.0, 500000.0, 1e6])
FACTORS = st.floats(1.0, 40.0)


def check(head_dim: int, max_len: int, params: dict[str, Any], served: int | None = None) -> None:
    theirs = LlamaConfig(hidden_size=head_dim * 2, num_attention_heads=2, max_position_embeddings=max_len, rope_parameters=params)
    spec = parse_config({**theirs.to_dict(), "architectures": ["LlamaForCausalLM"]})
    rope = spec.layers[0].attention.rope
    assert rope is not None
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[params["rope_type"]](theirs, seq_len=served)
    # float32 on both sides: the steps of the Llama 3 ramp round to about 1e-5 where its two factors are close
    torch.testing.assert_close(inverse_frequencies(rope, head_dim, served or max_len), inv_freq, atol=0, rtol=5e-5)
    assert math.isclose(rope.attention_factor, attention_factor)


@given(HEAD_DIMS, THETAS)
def test_unscaled_frequencies_fall_geometrically_from_one(head_dim: int, theta: float) -> None:
    got = inverse_frequencies(RopeSpec(theta=theta), head_dim, 100)
    want = [theta ** (-2 * d / head_dim) for d in range(head_dim // 2)]
    torch.testing.assert_close(got, torch.tensor(want), atol=0, rtol=1e-5)


@settings(deadline=None)
@given(HEAD_DIMS, THETAS, FACTORS)
def test_linear_scaling_equals_transformers(head_dim: int, theta: float, factor: float) -> None:
    check(head_dim, 100, {"rope_type": "linear", "rope_theta": theta, "factor": factor})


@settings(deadline=None)
@given(HEAD_DIMS, THETAS, FACTORS, st.integers(1, 5000))
def test_dynamic_scaling_equals_transformers_at_the_served_length(head_dim: int, theta: float, factor: float, served: int) -> None:
    check(head_dim, 1000, {"rope_type": "dynamic", "rope_theta": theta, "factor": factor}, served)


@settings(deadline=None)
@given(HEAD_DIMS, THETAS, FACTORS, st.floats(0.5, 2.0), st.floats(1.1, 8.0), st.sampled_from([64, 8192]))
def test_llama3_scaling_equals_transformers(head_dim: int, theta: float, factor: float, low: float, ratio: float, original: int) -> None:
    check(head_dim, 131072, {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": low,
                             "high_freq_factor": low * ratio, "original_max_position_embeddings": original})


@settings(deadline=None)
@given(HEAD_DIMS, THETAS, FACTORS, st.sampled_from([512, 4096, 32768]), st.fixed_dictionaries({}, optional={
    "beta_fast": st.floats(8.0, 64.0), "beta_slow": st.floats(0.5, 4.0), "truncate": st.booleans(), "attention_factor": st.floats(0.1, 2.0),
    "mscale": st.floats(0.1, 2.0), "mscale_all_dim": st.floats(0.1, 2.0),
}))
def test_yarn_scaling_equals_transformers(head_dim: int, theta: float, factor: float, original: int, optional: dict[str, Any]) -> None:
    check(head_dim, 131072, {"rope_type": "yarn", "rope_theta": theta, "factor": factor, "original_max_position_embeddings": original,
                             **optional})
