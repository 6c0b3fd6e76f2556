"""Kernel benchmarks check results before they measure: correct kernels pass (here in Triton's interpreter), wrong ones get no figure."""
from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import gpu_kernels, models
from bench.gpu_kernels import Maker, cases, figures, line
from bench.gpu_timing import Ceiling
from minivllm.families import parse_config
from minivllm.kernels import REFERENCE, Ops

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="Triton is not installed")
from minivllm.kernels import triton as fast

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SMALL: dict[str, Any] = {
    **models.config_of("tiny"), "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 300, "num_hidden_layers": 1,
}
TRITON = replace(
    REFERENCE, prepare_attention=fast.attention.prepare_attention, self_attention=fast.attention.self_attention,
    fused_linear=fast.linear.fused_linear, pack_groups=fast.packed_weight.pack_groups, grouped_linear=fast.grouped.grouped_linear,
    rms_norm=fast.norm.rms_norm, rope_angles=fast.rope.rope_angles, sample=fast.sampling.sample)


def verdicts(ops: Ops, *kinds: str) -> dict[str, str]:
    with torch.inference_mode():
        # float16, because the interpreter's tl.dot does not support bfloat16
        maker = Maker(parse_config(SMALL), ops, DEVICE, torch.float16, compared_rows=10)
        return {f"{case.name} {case.size}": case.wrong() for case in
                cases(maker, kinds, (1, 3), {"2": [40, 17]}, {"3": ([150, 140, 131], 128)}, (20,), ((5, 20),))}


def test_the_triton_kernels_pass_at_a_small_shape() -> None:
    found = verdicts(TRITON, *gpu_kernels.KINDS)
    assert set(found.values()) == {""}, found
    assert len(found) == 5 * 2 + 4 * 2 * 2 + 3 * 2 + 3 + 3 + 3 * 2


def shifted(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A kernel that returns each row in its neighbor's position."""
    return lambda *args, **options: function(*args, **options).roll(1, 0)


@pytest.mark.parametrize(
    "kind, op", [("linear", "fused_linear"), ("decode", "self_attention"), ("norm", "rms_norm"), ("sampler", "sample")])
def test_a_wrong_kernel_has_no_figure(kind: str, op: str) -> None:
    found = verdicts(replace(REFERENCE, **{op: shifted(getattr(REFERENCE, op))}), kind)
    assert all(wrong for name, wrong in found.items() if " 1 x" not in name or kind == "sampler"), found  # a single row has no neighbor


def test_refused_and_predicted_figures_are_distinguished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "seconds", lambda calls: 1e-3)
    limits = Ceiling(copy=4e12, matmul=8e14)
    case = gpu_kernels.Case("k", "1 x 1", [], lambda: "", num_bytes=272_000_000, flops=10**9)
    row = figures(case, limits)
    assert (row["us"], row["GB/s"], row["of_copy"], row["TFLOP/s"], row["predicted_us"]) == (1000.0, 272.0, 0.068, 1.0, 1000.0)
    assert "predicted_us" not in figures(replace(case, flops=10**12), limits)  # bound by arithmetic
    assert "predicted_us" not in figures(replace(case, num_bytes=1000), limits)  # bound by the launch
    refused = figures(replace(case, wrong=lambda: "off by 1 (rms)"), limits)
    assert "us" not in refused and "off by 1" in line(refused)


def test_one_missing_key_of_two_hundred_is_detected() -> None:
    keys, values = torch.randn(200, 64), torch.randn(200, 64).bfloat16()
    weights = (torch.randn(64, 64) @ keys.t() / 8).softmax(-1)
    want = (weights @ values.float()).bfloat16()
    without = weights.clone()
    without[:, 5] = 0
    assert gpu_kernels.compare(want, want) == "" and gpu_kernels.compare((without @ values.float()).bfloat16(), want)
    assert gpu_kernels.compare(torch.full_like(want, torch.nan), want)
