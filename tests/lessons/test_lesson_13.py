"""Lesson 13: its codes, scales and factors are those that `minivllm quantize` computes."""
from __future__ import annotations

from types import ModuleType

import pytest
import torch

from minivllm.kernels.reference import kv_cache
from minivllm.quantization.quantize import awq, eight_bit
from minivllm.quantization.quantize.groups import Grid, nearest_values, round_to_nearest
from tests.lessons.loading import Mistake

STEP = "scales = ((high - low) / 15).clamp_min(2.0**-14).half().float()"
MISTAKES = [
    Mistake(1, STEP, STEP.replace("15", "16"), "divide by 15"),
    Mistake(1, STEP, STEP.replace(".half().float()", ""), "round them before"),
    Mistake(1, "zeros = (-low / scales).round()", "zeros = -low / scales + 0.3", "round the zero point"),
    Mistake(1, ".round() + zeros[:, :, None]).clamp(0, 15)", ".floor() + zeros[:, :, None]).clamp(0, 15)", "half a step at most"),
    Mistake(1, ".round() + zeros[:, :, None]).clamp(0, 15)", ".round() + zeros[:, :, None])", "both rounded up"),
    Mistake(2, "return codes[:, 0::2] | (codes[:, 1::2] << 4)", "return codes[:, 1::2] | (codes[:, 0::2] << 4)", "EVEN column"),
    Mistake(2, "torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)", "torch.cat([packed & 15, packed >> 4], dim=1)", "in turn"),
    Mistake(3, "quantize(weight * factors, group)", "quantize(weight, group)", "before rounding"),
    Mistake(3, "magnitude.pow(step / 20)", "magnitude.pow(-step / 20)", "all factors are equal"),
    Mistake(3, "magnitude.pow(step / 20)", "magnitude.pow(0)", "all factors are equal"),
    Mistake(4, "return awq(weight, inputs, 64)", "return awq(weight, inputs, 16)", "at most 4.6"),
    Mistake(4, "return awq(weight, inputs, 64)", "q, f = awq(weight, inputs, 64)\n    return q, 1 / f", "is not the weight any more"),
]


@pytest.mark.parametrize("group", [16, 64, 128])
def test_lesson_and_package_round_to_the_same_codes(lesson: ModuleType, group: int) -> None:
    weight, _ = lesson.example(32, 128, 10)
    theirs, ours = round_to_nearest(weight, Grid(4, group, False, 0)), lesson.quantize(weight, group)
    assert torch.equal(lesson.unpack(ours.codes), theirs.codes)
    assert torch.equal(ours.scales, theirs.scales) and torch.equal(ours.zeros, theirs.zeros)
    torch.testing.assert_close(ours.dequantized(), theirs.dequantized())


def test_lesson_and_package_find_the_same_factors(lesson: ModuleType) -> None:
    """The package's formulas for one linear layer: the factors of all ratios, and the squared error by trace(dW H dW^T)."""
    weight, inputs = lesson.example(32, 128, 100)
    grid, hessian, magnitude = Grid(4, 64, False, 0), inputs.T @ inputs, inputs.abs().mean(0)
    errors = []
    for ratio in awq.RATIOS:
        scales = magnitude.pow(ratio).clamp_min(1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        errors.append((float(awq.output_error(nearest_values(weight * scales, grid) / scales - weight, hessian)), scales))
    _, factors = lesson.awq(weight, inputs, 64)
    assert torch.equal(factors, min(errors, key=lambda pair: pair[0])[1])


def test_lesson_and_package_store_the_same_eight_bits(lesson: ModuleType) -> None:
    weight, inputs = lesson.example(16, 64, 10)
    codes, scales = lesson.to_fp8(weight)
    theirs = eight_bit.fp8(weight, torch.float32)
    assert torch.equal(scales, theirs["weight_scale"]) and torch.equal(codes.float(), theirs["weight"].float())
    keys = inputs.view(10, 2, 32)
    ours, their_kv = lesson.quantize_kv(keys), kv_cache.quantize(keys, torch.int8)
    assert torch.equal(ours[1], their_kv[1].float()) and (ours[0].int() - their_kv[0].int()).abs().max() <= 1  # x * (1 / scale) there
