"""Lesson 13: weights, keys and values in 4 or 8 bits instead of 16. What is stored, how large the error is, and how to make it smaller.

Groups of weights share a scale and a zero point. AWQ scales up the columns that matter most before rounding. fp8 and a quantized KV cache
need no calibration. All errors are measured on a layer with a few input channels that are much larger than the others, as in real models.
"""
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Quantized:
    """A weight [out, in] as small integers: weight = (code - zero) * scale, with one scale and zero point per group of columns."""

    codes: Tensor  # uint8 [out, in / 2], two codes of 4 bits in a byte
    scales: Tensor  # [out, groups], numbers of float16
    zeros: Tensor  # [out, groups], a code: the one that means 0.0
    group: int  # columns that share a scale

    def bits_per_weight(self) -> float:
        return 4 + (16 + 4) / self.group

    def dequantized(self) -> Tensor:
        codes = unpack(self.codes).unflatten(1, (-1, self.group)).float()  # [out, groups, group]
        return ((codes - self.zeros[:, :, None]) * self.scales[:, :, None]).flatten(1)


def pack(codes: Tensor) -> Tensor:
    """Codes 0 ... 15, uint8 [rows, columns] -> two in each byte, uint8 [rows, columns / 2]: the even column in the low half."""
    # TASK 2: combine two codes
    return codes[:, 0::2] | (codes[:, 1::2] << 4)
    # END


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    # TASK 2: take them apart
    return torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)
    # END


def quantize(weight: Tensor, group: int) -> Quantized:
    """Round to nearest: each group's range, from its smallest to its largest weight, is divided into 15 steps."""
    groups = weight.unflatten(1, (-1, group))  # [out, groups, group]
    low, high = groups.amin(2).clamp_max(0.0), groups.amax(2).clamp_min(0.0)  # the range includes 0.0, which must be exact
    # TASK 1: the scale (a step, at least 2^-14), the zero point, and the codes. The scale is rounded to float16 BEFORE it is used
    scales = ((high - low) / 15).clamp_min(2.0**-14).half().float()
    zeros = (-low / scales).round()
    codes = ((groups / scales[:, :, None]).round() + zeros[:, :, None]).clamp(0, 15)
    # END
    return Quantized(pack(codes.flatten(1).to(torch.uint8)), scales, zeros, group)


def error(approximate: Tensor, exact: Tensor) -> float:
    """Relative error: the norm of the difference over the norm."""
    return float((approximate - exact).norm() / exact.norm())


def output_error(approximate: Tensor, weight: Tensor, inputs: Tensor) -> float:
    """The error that matters: that of the layer's outputs, for inputs [tokens, in]."""
    return error(inputs @ approximate.T, inputs @ weight.T)


def awq(weight: Tensor, inputs: Tensor, group: int) -> tuple[Quantized, Tensor]:
    """Activation-aware quantization -> the quantized weight, and the factors [in] by which inputs must be divided.

    y = x W^T = (x / s) (W s)^T. A column that is multiplied by a large s before rounding has a small error after the division by s. The
    factors are magnitude^ratio of the input channels; the ratio is searched.
    """
    magnitude = inputs.abs().mean(0)  # [in]
    best, least = None, float("inf")
    for step in range(20):
        # TASK 3: factors for the ratio step / 20 (geometric middle 1, so that the range stays), the quantized weight, its output error
        factors = magnitude.pow(step / 20).clamp_min(1e-4)
        factors = factors / (factors.max() * factors.min()).sqrt()
        quantized = quantize(weight * factors, group)
        this = output_error(quantized.dequantized() / factors, weight, inputs)
        # END
        if this < least:
            best, least = (quantized, factors), this
    assert best is not None
    return best


def improved(weight: Tensor, inputs: Tensor) -> tuple[Quantized, Tensor]:
    """The best quantized weight that you can make with at most 4.6 bits per weight, and the factors [in] that inputs are divided by."""
    return awq(weight, inputs, 64)


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Floating point in 8 bits (e4m3: 4 bits of exponent, 3 of mantissa, at most 448), with one scale per row [out, 1]."""
    scales = weight.abs().amax(1, keepdim=True) / 448.0
    return (weight / scales).to(torch.float8_e4m3fn), scales


def quantize_kv(x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys or values [tokens, heads, dim] -> int8 codes and one scale per token and head [tokens, heads], chosen while they are stored."""
    scales = (x.abs().amax(-1) / 127).clamp_min(2.0**-126).bfloat16().float()
    return (x / scales[:, :, None]).round().clamp(-127, 127).to(torch.int8), scales


def example(out: int = 256, inner: int = 512, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """A weight, and inputs of which 2% of the channels are twenty times as large as the others."""
    dice = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(out, inner, generator=dice) / inner**0.5, torch.randn(tokens, inner, generator=dice)
    inputs[:, torch.randperm(inner, generator=dice)[:inner // 50]] *= 20
    return weight, inputs


def kv_errors(tokens: int = 300, heads: int = 2, dim: int = 64) -> list[tuple[str, float, float]]:
    """(name, bits per number, error of the attention output) for three ways to store keys and values."""
    dice = torch.Generator().manual_seed(1)
    k, v, q = (torch.randn(n, heads, dim, generator=dice) for n in (tokens, tokens, 1))
    k[:, :, 5] *= 8  # keys have large channels too

    def attend(k: Tensor, v: Tensor) -> Tensor:
        weights = (torch.einsum("qhd,thd->hqt", q, k) * dim**-0.5).softmax(-1)  # q query, t token, h head, d dimension of the head
        return torch.einsum("hqt,thd->qhd", weights, v)

    exact, results = attend(k, v), []
    codes = [quantize_kv(x) for x in (k, v)]
    results.append(("int8, a scale per token", 8 + 16 / dim, error(attend(*(c.float() * s[:, :, None] for c, s in codes)), exact)))
    scales = [x.abs().amax(-1, keepdim=True) / 448 for x in (k, v)]
    stored = [(x / s).to(torch.float8_e4m3fn).float() * s for x, s in zip((k, v), scales, strict=True)]
    results.append(("fp8, a scale per token", 8 + 16 / dim, error(attend(*stored), exact)))
    wide = [(x / x.abs().max() * 127).round() / 127 * x.abs().max() for x in (k, v)]
    results.append(("int8, one scale for all", 8.0, error(attend(*wide), exact)))
    return results


def main() -> None:
    torch.set_num_threads(1)
    weight, inputs = example()
    print("a layer of 256 x 512, 10 of 512 input channels are 20 times as large as the others")
    print("                               bits per weight   error of weights   error of outputs   Mistral-7B")
    rows = [("bfloat16", 16.0, weight.bfloat16().float())]
    codes, scales = to_fp8(weight)
    rows.append(("fp8, a scale per row", 8 + 16 / 512, codes.float() * scales))
    for group in (512, 128, 32):
        quantized = quantize(weight, group)
        rows.append((f"4 bits, groups of {group}", quantized.bits_per_weight(), quantized.dequantized()))
    quantized, factors = awq(weight, inputs, 128)
    rows.append(("4 bits, groups of 128, AWQ", quantized.bits_per_weight(), quantized.dequantized() / factors))
    for name, bits, approximate in rows:
        print(f"  {name:28s}{bits:16.2f}{error(approximate, weight):19.2%}{output_error(approximate, weight, inputs):19.2%}"
              f"{7.11e9 * bits / 8 / 1e9:10.1f} GB")
    print("\nkeys and values of 300 tokens        bits per number   error of attention")
    for name, bits, wrong in kv_errors():
        print(f"  {name:33s}{bits:17.2f}{wrong:21.2%}")
    print("\na variant of Mistral-7B that was trained for one task has 14.2 GB of other weights. How can one GPU serve 32 of them?")


if __name__ == "__main__":
    main()
