"""The sampling kernels against their definitions: hand-written filters, exact probabilities, HF's penalties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.kernels.reference import sampling as ops
from minivllm.sampling.noise import row_keys, stream_key

CHI2_999 = {
    7: 24.32,
    15: 37.70,
    31: 61.10,
    63: 103.44,
    255: 330.52,
    1023: 1168.50,
}  # 99.9% points by degrees of freedom


def lowbias32(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def word(key0: int, key1: int, token: int) -> int:
    x = lowbias32(token) ^ key0
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = (x + key1) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def keys_of(
    seeds: list[int], positions: list[int] | None = None, child: int = 0
) -> torch.Tensor:
    streams = np.array([stream_key(s, child) for s in seeds], np.uint64)
    return torch.from_numpy(
        row_keys(streams, np.array(positions if positions is not None else [0] * len(seeds)))
    )


def unsigned(words: torch.Tensor) -> np.ndarray:
    return words.numpy().view(np.uint32)


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


# --- noise ---------------------------------------------------------------------------------------------------------


def test_hashes_equal_published_test_vectors():
    # SplitMix64 seeded with 1234567 (Vigna's reference program) and lowbias32 (computed by its five lines in plain integers).
    stream = np.array([1234567], np.uint64)
    first = row_keys(stream, np.array([0])).view(np.uint64)[0, 0]  # output 1: counter 0
    assert int(first) == 6457827717110365317
    ids = [0, 1, 2, 49151, 2**31 - 1]
    assert unsigned(ops.hash_ids(torch.tensor(ids, dtype=torch.int32))).tolist() == [lowbias32(i) for i in ids]


@given(
    st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5)
)
@settings(max_examples=200, deadline=None)
def test_random_words_equal_32_bit_integer_arithmetic(key0, key1, ids):
    keys = torch.from_numpy(np.array([[key0, key1]], np.uint32).view(np.int32))
    words = ops.noise_words(keys, torch.tensor(ids, dtype=torch.int32))
    assert unsigned(words)[0].tolist() == [word(key0, key1, i) for i in ids]


def test_noise_depends_on_seed_child_position_and_token():
    ids = torch.arange(1000, dtype=torch.int32)
    base = ops.noise_words(keys_of([7], [3]), ids)
    for other in (
        keys_of([8], [3]),
        keys_of([7], [4]),
        keys_of([7], [3], child=1),
    ):
        assert (ops.noise_words(other, ids) == base).sum() <= 1
    assert len(set(base[0].tolist())) == 1000


def test_no_key_is_used_for_two_positions_or_children():
    keys = [
        tuple(keys_of([s] * 50, list(range(50)), child)[i].tolist())
        for s in (0, 1)
        for child in range(4)
        for i in range(50)
    ]
    assert len(set(keys)) == 2 * 4 * 50


def test_negative_and_huge_seeds_have_different_streams():
    seeds = [-(2**63), -1, 0, 1, 2**63 - 1]
    assert len({stream_key(s, c) for s in seeds for c in range(3)}) == 15


@pytest.mark.parametrize("shift", [0, 8, 16, 24], ids=lambda s: f"bits-{s}-to-{s + 7}")
@pytest.mark.parametrize("along", ["tokens", "seeds", "positions", "children"])
def test_every_byte_of_the_words_is_uniform_along_every_input(along, shift):
    n = 49152
    if along == "tokens":
        words = unsigned(ops.noise_words(keys_of([11]), torch.arange(n, dtype=torch.int32)))
    else:
        token = torch.tensor([17], dtype=torch.int32)
        seeds, positions, streams = [5] * n, list(range(n)), None
        if along == "seeds":
            seeds, positions = list(range(n)), [9] * n
        if along == "children":
            streams = np.array([stream_key(5, c) for c in range(n)], np.uint64)
            words = unsigned(ops.noise_words(torch.from_numpy(row_keys(streams, np.full(n, 9))), token))
        else:
            words = unsigned(ops.noise_words(keys_of(seeds, positions), token))
    counts = np.bincount((words.ravel() >> np.uint32(shift)) & np.uint32(255), minlength=256)
    assert chi_square(counts, np.full(256, n / 256)) < CHI2_999[255] * 1.15


@pytest.mark.parametrize("pair", ["next position", "next child", "next seed", "next token"])
def test_neighboring_words_are_independent(pair):
    """Joint distribution of the upper five bits of two neighbors: 1,024 cells, and the correlation of the words."""
    n = 40_000
    ids = torch.arange(n + 1, dtype=torch.int32)
    a = unsigned(ops.noise_words(keys_of([3], [100]), ids))[0]
    b = {
        "next position": lambda: unsigned(ops.noise_words(keys_of([3], [101]), ids))[0],
        "next child": lambda: unsigned(ops.noise_words(keys_of([3], [100], child=1), ids))[0],
        "next seed": lambda: unsigned(ops.noise_words(keys_of([4], [100]), ids))[0],
        "next token": lambda: np.roll(a, -1),
    }[pair]()
    a, b = a[:n], b[:n]
    cells = np.bincount((a >> np.uint32(27)).astype(np.int64) * 32 + (b >> np.uint32(27)), minlength=1024)
    assert chi_square(cells, np.full(1024, n / 1024)) < CHI2_999[1023]
    assert abs(np.corrcoef(a.astype(np.float64), b.astype(np.float64))[0, 1]) < 4 / math.sqrt(n)


def test_no_two_rows_of_a_large_batch_are_correlated():
    n, rows = 4_000, 400
    ids = torch.arange(n, dtype=torch.int32)
    words = unsigned(
        ops.noise_words(keys_of([i // 20 for i in range(rows)], [i % 20 for i in range(rows)]), ids)
    ).astype(np.float64)
    correlation = np.abs(np.corrcoef(words) - np.eye(rows))
    assert correlation.max() < 5.5 / math.sqrt(n)  # of 79,800 pairs one exceeds 5.5 sigma by chance in one of 300 such tests
    g = (
        ops.gumbel(ops.noise_words(keys_of(list(range(rows))), ids)).double().numpy()
    )  # the noise values are not correlated either
    assert np.abs(np.corrcoef(g) - np.eye(rows)).max() < 6.5 / math.sqrt(n)


def test_gumbel_noise_has_the_gumbel_distribution():
    g = ops.gumbel(ops.noise_words(keys_of([1, 2]), torch.arange(50_000, dtype=torch.int32))).flatten().double().numpy()
    uniform = np.sort(np.exp(-np.exp(-g)))  # its distribution function maps it to a uniform distribution
    steps = np.arange(1, uniform.size + 1) / uniform.size
    assert np.abs(uniform - steps).max() < 1.95 / math.sqrt(uniform.size)  # Kolmogorov-Smirnov, 99.9%
    assert abs(g.mean() - 0.5772157) < 4 * 1.2825 / math.sqrt(g.size)


def test_the_extreme_words_give_finite_noise():
    g = ops.gumbel(torch.tensor([0, 1, -1, -2, 2**31 - 1, -(2**31)], dtype=torch.int32))
    assert torch.isfinite(g).all()
    assert g[0] == g.max() and g[2] == g.min()


# --- filters -------------------------------------------------------------------------------------------------------


def survivors(z: list[float], k: int, p: float, floor: float) -> set[int]:
    """The tokens that the filters keep, by their definitions, in double precision."""
    alive = set(range(len(z)))
    probability = lambda some: {i: math.exp(z[i] - max(z)) for i in some}  # noqa: E731
    if floor > 0:
        mass = probability(alive)
        alive = {i for i in alive if mass[i] >= floor * max(mass.values()) * (1 - 1e-6)}
    if k > 0:
        kth = sorted((z[i] for i in alive), reverse=True)[:k][-1]
        alive = {i for i in alive if z[i] >= kth}
    if p < 1:
        mass = probability(alive)
        total, so_far, last = sum(mass.values()), 0.0, max(z)
        for i in sorted(alive, key=lambda i: -z[i]):
            if so_far >= p * total * (1 - 1e-6):
                break
            so_far, last = so_far + mass[i], z[i]
        alive = {i for i in alive if z[i] >= last}
    return alive


logit_rows = st.lists(
    st.integers(-12, 4).map(lambda n: n * math.log(2)), min_size=1, max_size=40
)  # powers of two: many ties, exact sums


@given(
    logit_rows,
    st.integers(0, 45),
    st.sampled_from([1.0, 0.9, 0.5, 0.25, 0.1, 1e-6, 0.999]),
    st.sampled_from([0.0, 0.3, 0.05, 1.0, 0.001]),
)
@settings(max_examples=300, deadline=None)
def test_filters_keep_exactly_the_tokens_of_their_definitions_including_ties(logits, k, p, floor):
    z = torch.tensor([logits])
    z = z - z.max()
    expected = survivors(z[0].double().tolist(), k, p, floor)
    column = lambda value, dtype: torch.tensor([value], dtype=dtype)  # noqa: E731
    plain = ops.filter_threshold(z, column(k, torch.int32), column(p, torch.float32), column(floor, torch.float32))
    on_cpu = ops._threshold_cpu(z[0].numpy(), k, p, floor)
    for threshold in (plain.item(), on_cpu):
        assert set(np.flatnonzero(z[0].numpy() >= np.float32(threshold))) == expected


def test_a_filter_of_one_row_does_not_change_other_rows():
    z = torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.125]])).repeat(4, 1)
    z = z - z.max()
    t = ops.filter_threshold(
        z, torch.tensor([0, 1, 0, 0]), torch.tensor([1.0, 1.0, 0.6, 1.0]), torch.tensor([0.0, 0.0, 0.0, 0.45])
    )
    assert (z >= t[:, None]).sum(-1).tolist() == [4, 1, 2, 2]


def test_top_p_keeps_tokens_below_the_head_if_the_head_has_too_little_mass():
    rng = np.random.default_rng(0)
    z = np.concatenate([[0.0], rng.uniform(-20, -9, 60_000)]).astype(
        np.float32
    )  # one token, and a long tail with most of the mass
    for p in (0.3, 0.8, 0.99):
        mass = np.sort(np.exp(z.astype(np.float64)))[::-1]
        needed = int(np.searchsorted(mass.cumsum(), p * mass.sum())) + 1
        kept = int((z >= np.float32(ops._threshold_cpu(z, 0, p, 0.0))).sum())
        assert abs(kept - needed) <= max(1, 1e-4 * needed)


# --- sampling ------------------------------------------------------------------------------------------------------


def sampled(
    logits: torch.Tensor, seed: int, count: int, method=ops.sample, temperature: float = 1.0, **filters
) -> np.ndarray:
    """`count` tokens from one row of logits, at positions 0, 1, 2 ... of one request with a seed."""
    columns = {name: torch.full((count,), value) for name, value in filters.items()}
    keys = keys_of([seed] * count, list(range(count)))
    return method(logits.expand(count, -1).contiguous(), torch.full((count,), temperature), keys, **columns).numpy()


@pytest.mark.parametrize("method", [ops.sample, ops.sample_plain])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_tokens_follow_the_softmax(method, temperature):
    logits = torch.linspace(-1.5, 1.5, 16)[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    n = 8_000
    counts = np.bincount(sampled(logits, seed=42, count=n, method=method, temperature=temperature), minlength=16)
    assert chi_square(counts, n * torch.softmax(logits / temperature, -1).double().numpy()) < CHI2_999[15]


def test_tokens_sampled_with_filters_follow_the_renormalized_softmax():
    logits = torch.linspace(-2, 2, 64)
    n = 6_000
    for filters in ({"top_k": 8}, {"top_p": 0.5}, {"min_p": 0.5}):
        counts = np.bincount(sampled(logits, seed=9, count=n, **filters), minlength=64)
        kept = sorted(
            survivors(
                logits.double().tolist(), filters.get("top_k", 0), filters.get("top_p", 1.0), filters.get("min_p", 0.0)
            )
        )
        assert len(kept) >= 8 and counts.sum() == counts[kept].sum() == n
        expected = n * torch.softmax(logits[kept].double(), -1).numpy()
        assert chi_square(counts[kept], expected) < 2.5 * len(kept) + 15


def test_a_long_tail_of_improbable_tokens_is_sampled_with_its_probability():
    logits = torch.full((50_000,), math.log(1e-6))  # 5% of the mass in 49,999 tokens of a millionth each
    logits[123] = math.log(0.95)
    n = 2_000
    tail = (sampled(logits, seed=5, count=n) != 123).mean()
    exact = 49_999e-6 / (49_999e-6 + 0.95)
    assert abs(tail - exact) < 4 * math.sqrt(exact * (1 - exact) / n)


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 4.0, 30.0])
@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.02}, {"top_k": 3000, "top_p": 0.7, "min_p": 1e-4}],
    ids=lambda f: "+".join(f) or "no filter",
)
def test_the_fast_method_on_a_cpu_samples_the_same_tokens_as_the_plain_one(spread, filters):
    logits = torch.randn(24, 9_000, generator=torch.Generator().manual_seed(1)) * spread
    keys = keys_of(list(range(24)), list(range(24)))
    columns = {name: torch.full((24,), value) for name, value in filters.items()}
    for temperature in (0.3, 1.0, 1.7):
        t = torch.full((24,), temperature)
        assert torch.equal(ops.sample(logits, t, keys, **columns), ops.sample_plain(logits, t, keys, **columns))


@pytest.mark.parametrize("method", [ops.sample, ops.sample_plain])
def test_rows_with_one_possible_token_give_this_token_and_never_nan(method):
    inf = math.inf
    logits = torch.tensor(
        [
            [-inf, -inf, 0.0, -inf],
            [-inf, 1e30, -inf, -inf],
            [3.0, 3.0 + 1e-4, 2.0, 1.0],
            [-inf] * 4,
            [-inf, -3e38, -inf, -inf],
        ]
    )
    temperature = torch.tensor([1.0, 1e-5, 1.01e-5, 1.0, 1e30])
    for seed in range(20):
        for filters in (
            {},
            {"top_k": torch.tensor([3] * 5)},
            {"top_p": torch.tensor([0.01] * 5)},
            {"min_p": torch.tensor([1.0] * 5)},
        ):
            tokens = method(logits.clone(), temperature, keys_of([seed] * 5), **filters).tolist()
            assert tokens[:2] == [2, 1] and tokens[2] in (0, 1) and tokens[3:] == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [ops.sample, ops.sample_plain])
def test_temperature_0_takes_the_largest_logit_and_does_not_change_random_rows(method, dtype):
    logits = (torch.randn(6, 500, generator=torch.Generator().manual_seed(8)) * 3).to(dtype)
    logits[2, [100, 400]] = 20.0  # a tie
    t, keys = torch.tensor([0.0, 0.7, 0.0, 1.0, 0.0, 2.0]), keys_of(list(range(6)))
    filters = {"top_p": torch.full((6,), 0.5)}
    tokens = method(logits.float(), t, keys, **filters)
    assert tokens[::2].tolist() == [logits[0].float().argmax(), 100, logits[4].float().argmax()]
    some = {name: column[1::2] for name, column in filters.items()}
    assert torch.equal(tokens[1::2], method(logits[1::2].float(), t[1::2], keys[1::2], **some))
    out = torch.zeros(6, dtype=torch.int64)
    assert ops.sample(logits, t, keys, **filters, out=out) is out and torch.equal(out, tokens)


def test_argmax_takes_the_first_of_equal_logits():
    assert ops.argmax(torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 0.0]])).tolist() == [1, 0]


# --- penalties, log-probabilities ----------------------------------------------------------------------------------


def test_penalties_change_seen_tokens_by_the_published_formulas():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0, 1.0]])
    seen = torch.tensor([[True, True, True, True, False]])
    counts = torch.tensor([[0, 0, 3, 1, 0]], dtype=torch.int32)
    ops.apply_penalties(logits, seen, counts, torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([0.25]))
    assert logits[0].tolist() == [1.0, -4.0, 1.0 - 1.5 - 0.25, -4.0 - 0.5 - 0.25, 1.0]


def test_the_repetition_penalty_equals_huggingfaces():
    transformers = pytest.importorskip("transformers")
    rng = torch.Generator().manual_seed(0)
    logits, history = torch.randn(3, 50, generator=rng), torch.randint(0, 50, (3, 20), generator=rng)
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.3)(history, logits.clone())
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter_(1, history, True)
    zero = torch.zeros(3)
    ops.apply_penalties(logits, seen, torch.zeros(3, 50, dtype=torch.int32), torch.full((3,), 1.3), zero, zero)
    torch.testing.assert_close(logits, expected)


@given(st.integers(1, 5), st.integers(0, 7), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_logprobs_are_log_softmax_and_ranks_count_the_better_tokens(n, k, random):
    logits = torch.tensor([[random.choice([-1.0, 0.0, 0.5, 2.0, 3.0]) for _ in range(9)] for _ in range(n)])
    chosen = torch.tensor([random.randrange(9) for _ in range(n)])
    logprob, rank, top_ids, top = ops.token_logprobs(logits, chosen, k)
    reference = torch.log_softmax(logits.double(), -1)
    for i in range(n):
        assert logprob[i].item() == pytest.approx(reference[i, chosen[i]].item(), abs=1e-6)
        assert rank[i].item() == 1 + sum(v > logits[i, chosen[i]] for v in logits[i]).item()
        assert top[i].tolist() == pytest.approx(sorted(reference[i].tolist(), reverse=True)[:k], abs=1e-6)
        assert reference[i, top_ids[i]].tolist() == pytest.approx(top[i].tolist(), abs=1e-6)
