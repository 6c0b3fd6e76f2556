"""Checks of lesson 8, for `minivllm course check 08`. A failed assert is the explanation that the learner reads."""
import math

import torch


def task_1_bytes(lesson):
    model = _model(lesson)
    weights, key = model.weights() * 2, model.kv_bytes()
    got = lesson.decode_bytes(model, 3, 10)
    assert got != 3 * (weights + 10 * key), (
        "this reads the weights once per sequence. A step multiplies the rows of all sequences with each weight while it is there: that is "
        "why batching pays")
    assert got != weights + 10 * key, "this reads the keys of one sequence. Each of the 3 sequences has other keys"
    assert got != model.weights() + 30 * key, "these are numbers of weights, not bytes: each of them has bytes_per_number bytes"
    assert got == weights + 30 * key, f"weights {weights} bytes, keys 3 x 10 x {key} bytes: expected {weights + 30 * key}, got {got}"


def task_1_flops(lesson):
    model = _model(lesson)
    products, attention = 2 * model.weights(), 4 * 10 * 2 * 8 * 4  # 2 layers, 8 query heads of 4 numbers
    got = lesson.decode_flops(model, 3, 10)
    assert got != 3 * products, "attention is missing: each query head is compared with 10 keys, and sums up 10 values"
    assert 2 * got != 3 * (products + attention), "a multiply-add is 2 FLOPs: one multiplication and one addition"
    assert got != 3 * (products + attention // 2), "attention has two products: queries times keys, and weights times values"
    assert got != 3 * (products + attention // 4), (
        "these are the key/value heads. They are read once, but every QUERY head computes with them: GQA saves bytes, not FLOPs")
    assert got == 3 * (products + attention), f"3 x ({products} for weights + {attention} for attention) FLOPs, got {got}"


def task_2_the_slower_limit(lesson):
    card = lesson.Machine("card", 500.0, 100.0)
    assert lesson.step_ms(card, 1e9, 0) != 0.002, "GB/s are 10^9 bytes per SECOND, and the result is in ms: multiply by 1000"
    assert math.isclose(lesson.step_ms(card, 1e9, 0), 2.0), f"1 GB at 500 GB/s takes 2 ms, got {lesson.step_ms(card, 1e9, 0)}"
    assert math.isclose(lesson.step_ms(card, 0, 1e12), 10.0), f"10^12 FLOPs at 100 TFLOP/s take 10 ms, got {lesson.step_ms(card, 0, 1e12)}"
    both = lesson.step_ms(card, 1e9, 1e12)
    assert not math.isclose(both, 12.0), "both happen at the same time: while one tile is computed, the next one is read"
    assert math.isclose(both, 10.0), f"2 ms of reading and 10 ms of arithmetic at the same time: 10 ms, got {both}"


def task_2_the_roof(lesson):
    card = lesson.Machine("card", 500.0, 100.0)
    assert lesson.reached(card, 10_000.0) <= 100.0, "no intensity makes a machine faster than its arithmetic units"
    assert math.isclose(lesson.reached(card, 2.0), 1.0), f"2 FLOPs per byte at 500 GB/s are 1 TFLOP/s, got {lesson.reached(card, 2.0)}"
    assert math.isclose(lesson.reached(card, card.ridge()), 100.0), "at the ridge both limits are equal"


def task_3_break_even(lesson):
    model, card = _model(lesson), lesson.Machine("card", 500.0, 100.0)
    got = lesson.break_even(card, model, 0)
    assert math.isclose(got, card.ridge()), (
        f"without keys, n sequences make n FLOPs per byte of 2-byte weights: break even at the ridge, {card.ridge():.0f}, got {got}")
    with_keys = lesson.break_even(card, model, 1)
    assert not math.isclose(with_keys, got), "keys are not counted: each sequence reads its own, so more sequences also read more"
    n = with_keys
    reading, computing = lesson.step_ms(card, lesson.decode_bytes(model, 1, 1) + (n - 1) * model.kv_bytes(), 0), \
        lesson.step_ms(card, 0, n * lesson.decode_flops(model, 1, 1))
    assert math.isclose(reading, computing), f"at n = {n:.1f} reading takes {reading:.6f} ms and arithmetic {computing:.6f} ms: not equal"
    assert lesson.break_even(card, model, 10**6) == math.inf, (
        "with a long context each sequence adds more reading than arithmetic, so more sequences never break even: return math.inf")


def task_4_a_faster_product(lesson):
    torch.set_num_threads(1)
    dice = torch.Generator().manual_seed(0)
    weight, x = torch.randn(2048, 4096, generator=dice), torch.randn(1, 4096, generator=dice)
    prepared = lesson.prepare(weight)
    got, right = lesson.product(x, prepared), x @ weight.T
    assert got.shape == right.shape, f"the result must have the shape {tuple(right.shape)}, got {tuple(got.shape)}"
    error = ((got.float() - right).norm() / right.norm()).item()
    assert error < 0.02, f"the result is off by {error:.1%}. At most 2% are allowed"
    took, simple = (lesson.seconds(run, 5) for run in (lambda: lesson.product(x, prepared), lambda: x @ weight.T))
    return (f"{took * 1e3:.2f} ms for one row, with an error of {error:.2%}; x @ weight.T in float32: {simple * 1e3:.2f} ms "
            f"({weight.nbytes / simple / 1e9:.1f} GB/s)")


def _model(lesson):
    return lesson.Model("tiny", layers=2, hidden=16, heads=8, kv_heads=2, head_dim=4, inner=32, vocab=50)
