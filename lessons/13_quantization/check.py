"""Checks of lesson 13, for `minivllm course check 13`. A failed assert is the explanation that the learner reads."""
import torch


def task_1_the_grid(lesson):
    seen = {}
    keep = lesson.pack
    lesson.pack = lambda codes: seen.update(codes=codes) or codes  # task 2 may not be written yet
    try:
        weight = torch.tensor([[-1.0, 2.0, 0.0, 0.52, 10.0, 20.0, 30.0, 40.0, -7.5, 7.5, 1.0, 2.0]])
        got = lesson.quantize(weight, 4)
        codes = seen["codes"].float()
    finally:
        lesson.pack = keep
    assert got.scales.shape == (1, 3), f"each group of 4 columns has one scale: the shape is [1, 3], got {list(got.scales.shape)}"
    assert not torch.allclose(got.scales[0, 0], torch.tensor(3 / 16), atol=1e-4), "16 codes have 15 steps between them: divide by 15"
    assert torch.allclose(got.scales[0, 0], torch.tensor(0.2), atol=1e-4), f"from -1 to 2 in 15 steps: 0.2, got {got.scales[0, 0]:.4f}"
    assert torch.equal(got.scales, got.scales.half().float()), "files store scales in float16: round them before they are used"
    assert codes.min() >= 0 and codes.max() <= 15, (
        f"codes are 0 ... 15, got {codes.tolist()}: clamp them. In the last group, -7.5 to 7.5, the zero point and the "
        "largest weight are both rounded up")
    assert got.zeros[0, 0] != 0, "the zero point of the first group is the code of 0.0, which is -low / scale = 5, not 0"
    values = ((codes.view(1, 3, 4) - got.zeros[:, :, None]) * got.scales[:, :, None]).flatten()
    assert values[2] == 0.0, f"0.0 must be exact, and it became {values[2]:.3f}: round the zero point to a code"
    step = got.scales.repeat_interleave(4, 1)[0]
    wrong = ((values - weight[0]).abs() / step)[:8].max()
    assert wrong < 0.51, f"a weight is off by {wrong:.2f} steps. Rounding to the nearest code is off by half a step at most"


def task_2_two_codes_in_a_byte(lesson):
    codes = torch.tensor([[1, 2, 15, 0], [7, 8, 9, 10]], dtype=torch.uint8)
    packed = lesson.pack(codes)
    assert packed.shape == (2, 2), f"4 codes of 4 bits fit into 2 bytes: the shape is [2, 2], got {list(packed.shape)}"
    assert packed.dtype == torch.uint8, f"bytes are uint8, got {packed.dtype}"
    assert packed[0, 0] != 1 * 16 + 2, "1, 2 became 0x12: the EVEN column belongs into the low half, so it is 0x21"
    assert packed.tolist() == [[0x21, 0x0F], [0x87, 0xA9]], f"expected [[0x21, 0x0f], [0x87, 0xa9]], got {packed.tolist()}"
    back = lesson.unpack(packed)
    assert back.shape == codes.shape, f"unpacking gives the shape {list(codes.shape)} again, got {list(back.shape)}"
    assert back.tolist() != [[1, 15, 2, 0], [7, 9, 8, 10]], "all even columns come before all odd ones: put them back in turn"
    assert torch.equal(back, codes), f"unpacking gave {back.tolist()} instead of {codes.tolist()}"


def task_3_the_columns_that_matter(lesson):
    weight, inputs = lesson.example(64, 128, 200)
    plain = lesson.output_error(lesson.quantize(weight, 64).dequantized(), weight, inputs)
    quantized, factors = lesson.awq(weight, inputs, 64)
    values = quantized.dequantized()
    assert factors.shape == (128,), f"there is one factor for each of the 128 input channels: got the shape {list(factors.shape)}"
    assert lesson.error(values, weight * factors) < 0.3, "the quantized weight must be that of W * factors, column by column"
    with_factors = lesson.output_error(values / factors, weight, inputs)
    big = inputs.abs().mean(0) > 5
    assert not torch.allclose(factors, factors[:1].expand_as(factors)), (
        "all factors are equal: ratio 0 was always best. Multiply the weight by the factors before rounding, and divide before measuring")
    assert factors[big].mean() > factors[~big].mean(), (
        "channels with LARGE inputs need large factors: their weights are multiplied by large numbers, so their errors count most")
    assert with_factors < 0.9 * plain, (
        f"the error of outputs is {with_factors:.2%}, and {plain:.2%} without factors. Measure it as it will run: the weight divided by "
        "the factors again")


def task_4_the_smallest_error(lesson):
    weight, inputs = lesson.example(128, 256, 300)
    quantized, factors = lesson.improved(weight, inputs)
    assert quantized.bits_per_weight() <= 4.6, f"{quantized.bits_per_weight():.2f} bits per weight: at most 4.6 are allowed"
    assert quantized.codes.dtype == torch.uint8 and quantized.codes.shape == (128, 128), "weights are stored as packed codes"
    fresh = torch.randn(300, 256, generator=torch.Generator().manual_seed(5)) * inputs.abs().mean(0)
    found = lesson.output_error(quantized.dequantized() / factors, weight, fresh)
    plain = lesson.output_error(lesson.quantize(weight, 64).dequantized(), weight, fresh)
    assert found < 0.2, f"the error of outputs is {found:.2%}: the stored weight, divided by the factors, is not the weight any more"
    return f"error of outputs {found:.2%} on other inputs, with {quantized.bits_per_weight():.2f} bits; plain groups of 64: {plain:.2%}"
