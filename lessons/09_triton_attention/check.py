"""Checks of lesson 9, for `minivllm course check 09`. A failed assert is the explanation that the learner reads."""
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def task_1_keys_through_the_table(lesson):
    q, k, v, tables, lengths = _example(lesson, [48, 48, 48])
    got = _run(lesson, q, k, v, tables, lengths)
    assert torch.isfinite(got).all(), "the result is not finite: positions beyond `length` were loaded. Mask the loads, with other=0.0"
    ordered = torch.arange(tables.numel(), dtype=torch.int32, device=DEVICE).view_as(tables)
    assert not _equal(got, lesson.plain(q, k, v, ordered, lengths)), (
        "these are the keys of the FIRST blocks of the memory. Block i of a sequence is block tables[sequence, i]")
    right = lesson.plain(q, k, v, tables, lengths)
    first = lesson.plain(q, k[:, :, :1].expand_as(k), v[:, :, :1].expand_as(v), tables, lengths)
    assert not _equal(got, first), "every head got the keys of key head 0: the address needs `kv_head`"
    assert _equal(got, right), "a sequence that fills its blocks gets a wrong result: check block, offset in the block, key head, dimension"


def task_1_the_last_block_is_not_full(lesson):
    q, k, v, tables, lengths = _example(lesson, [19])
    got = _run(lesson, q, k, v, tables, lengths)
    assert torch.isfinite(got).all(), (
        "NaN: unwritten slots of the last block were loaded. A weight of 0 does not help, because 0 x NaN is NaN. Mask the loads of keys "
        "AND of values with positions < length")
    assert _equal(got, lesson.plain(q, k, v, tables, lengths)), "19 tokens in blocks of 16 give a wrong result"


def task_2_the_softmax(lesson):
    q, k, v, tables, lengths = _example(lesson, [5])
    got = _run(lesson, q, k, v, tables, lengths)
    block = tables[0, :1].long()
    wrong = lesson.plain(q, k[block].nan_to_num(), v[block].nan_to_num(), tables[:, :1] * 0, lengths * 0 + 16)
    assert not _equal(got, wrong), (
        "positions beyond the length got a weight: their keys are 0.0, so their scores are 0, and exp(0) is 1. Set their scores to -inf")
    assert _equal(got, lesson.plain(q, k, v, tables, lengths)), "5 tokens, a single tile: the weighted mean of the values is wrong"
    q, k, v, tables, lengths = _example(lesson, [48])
    assert _equal(_run(lesson, q, k, v, tables, lengths), lesson.plain(q, k, v, tables, lengths)), (
        "one tile is right and three are wrong: the sums of earlier tiles must be multiplied by exp(old best - new best), `total` and "
        "`weighted`, and `best` must be kept for the next tile")


def task_3_parts(lesson):
    logs = torch.tensor([[[0.0, 300.0]], [[2.0, 301.0]]], device=DEVICE)  # 2 parts, 1 sequence, 2 heads
    mean = torch.tensor([1.0, 5.0], device=DEVICE).view(2, 1, 1, 1).expand(2, 1, 2, 16).contiguous()
    out = torch.empty(1, 2, 16, device=DEVICE)
    lesson.merge[(2,)](mean, logs, out, 2, DIM=16, PARTS=2)
    out = out.cpu()
    assert not torch.allclose(out, torch.tensor(3.0)), "this is the plain mean of the parts. A part with more weight counts more"
    assert torch.isfinite(out).all(), "weights of exp(300) overflow: subtract the largest log_weight first"
    right = torch.tensor([(1 + 5 * 7.389056) / 8.389056, (1 + 5 * 2.718282) / 3.718282])
    assert torch.allclose(out[0, :, 0], right, atol=1e-4), (
        f"two parts with means 1 and 5, and log weights 0 and 2, then 300 and 301: expected {right.tolist()}, got {out[0, :, 0].tolist()}")
    q, k, v, tables, lengths = _example(lesson, [70, 20])
    got = _run(lesson, q, k, v, tables, lengths, parts=4)
    assert _equal(got, lesson.plain(q, k, v, tables, lengths)), (
        "70 and 20 tokens in 4 parts of whole tiles (some are empty) give a wrong result")


def task_4_divide_the_work(lesson):
    total, shown = 0.0, []
    for sequences, longest in ((1, 32768), (8, 16384), (64, 2048), (256, 500)):
        launch = lesson.choose(sequences, 32, 8, longest, 132)
        for name, value, most in (("rows", launch.rows, 4), ("tile", launch.tile, 128), ("parts", launch.parts, 128)):
            least = 16 if name == "tile" else 1
            assert value & (value - 1) == 0 and least <= value <= most, f"{name} must be a power of two from {least} to {most}, got {value}"
        if torch.cuda.is_available():
            example = lesson.example(sequences, 32, 8, 128, longest, "cuda", torch.bfloat16)
            us = lesson.triton.testing.do_bench(lambda example=example, launch=launch: lesson.paged_attention(*example, launch)) * 1000
        else:
            us = lesson.estimate_us(launch, sequences, 32, 128, longest)
        total += us
        shown.append(f"{sequences} x {longest:,} tokens: {us:.0f} us with {launch}")
    return "\n".join([*shown, f"sum {total:.0f} us, {'measured' if torch.cuda.is_available() else 'estimated for an H200'}"])


def _example(lesson, lengths):
    """4 query heads, 2 key heads of 16 numbers. Unwritten slots are NaN."""
    q, k, v, tables, _ = lesson.example(len(lengths), 4, 2, 16, max(max(lengths), 48), DEVICE, torch.float32)
    for row, length in zip(tables.tolist(), lengths, strict=True):
        for position in range(length, len(row) * 16):
            k[row[position // 16], position % 16] = v[row[position // 16], position % 16] = float("nan")
    return q, k, v, tables, torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def _run(lesson, q, k, v, tables, lengths, parts=1):
    """One part per sequence: then a merge that is not written yet changes nothing."""
    if parts > 1:
        return lesson.paged_attention(q, k, v, tables, lengths, lesson.Launch(2, 16, parts))
    mean, log_weight = torch.empty(1, *q.shape, device=q.device), torch.empty(1, *q.shape[:2], device=q.device)
    lesson.attend[(len(q), 2, 1)](q, k, v, tables, lengths, mean, log_weight, tables.shape[1], 0.25, 4, 2,
                                  HEADS_PER_KV=2, ROWS=2, DIM=16, BLOCK=16, TILE=16)
    return mean[0]


def _equal(a, b):
    return torch.allclose(a, b, atol=1e-4)
