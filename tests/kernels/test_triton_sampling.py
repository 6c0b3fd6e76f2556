"""The Triton sampler against the reference: equal words and thresholds, noise within 2 ulp, equal tokens except for ties."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from minivllm.kernels import tuning
from minivllm.kernels.reference import sampling as reference
from tests.kernels.test_sampling import CHI2_999, chi_square, keys_of, survivors

pytest.importorskip("triton", reason="Triton is not installed")
import triton
import triton.language as tl

from minivllm.kernels.triton import sampling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = math.inf
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # for exp2(200) = inf in numpy


@triton.jit
def words_kernel(out, keys, first, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    words = sampling.random_words(first + at, tl.load(keys).to(tl.uint32, bitcast=True), tl.load(keys + 1).to(tl.uint32, bitcast=True))
    tl.store(out + at, words.to(tl.int32, bitcast=True))


@triton.jit
def noise_kernel(out, words, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, sampling.exponential(tl.load(words + at).to(tl.uint32, bitcast=True)))


def columns(**filters: list[float]) -> dict[str, torch.Tensor]:
    kinds = {"top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32}
    return {name: torch.tensor(values, dtype=kinds[name]).to(DEVICE) for name, values in filters.items()}


def thresholds(logits: torch.Tensor, temperature: torch.Tensor, **filters: torch.Tensor) -> torch.Tensor:
    """[n]. The pointers of unused filters are not read."""
    out = torch.full((len(logits),), math.nan, device=logits.device)
    pointers = [filters.get(name, temperature) for name in ("top_k", "top_p", "min_p")]
    sampling._thresholds[(len(logits),)](
        out, logits, logits.stride(0), logits.shape[1], temperature, *pointers,
        TOP_K="top_k" in filters, TOP_P="top_p" in filters, MIN_P="min_p" in filters, SHIFT=sampling.KEY_SHIFT[logits.dtype],
        POSITIONS=tuning.THRESHOLD_POSITIONS, num_warps=tuning.THRESHOLD_WARPS)  # fmt: skip
    return out


def check_tokens(logits: torch.Tensor, temperature: torch.Tensor, seed: int = 0, **filters: torch.Tensor) -> None:
    """Equal tokens, except in the few rows whose two best scores with noise are within 1e-5."""
    keys = keys_of([seed] * len(logits), list(range(len(logits)))).to(logits.device)
    got = sampling.sample(logits, temperature, keys, **filters)
    wide = logits.float()
    want = reference.sample_plain(wide, temperature, keys, **filters)
    differ = (got != want).nonzero().flatten().tolist()
    t = torch.where(temperature == 0, 1.0, temperature)[:, None]
    z = (wide - wide.amax(-1, keepdim=True)) / t
    scores = z + reference.gumbel(reference.noise_words(keys, torch.arange(z.shape[1], dtype=torch.int32, device=z.device)))
    assert len(differ) <= len(logits) // 50, (got, want)
    for i in differ:
        assert temperature[i] > 0 and abs(scores[i, got[i]] - scores[i, want[i]]) < 1e-5, (i, got[i], want[i])


# --- noise ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [(0, 0), (0xFFFFFFFF, 0x80000000), (0x12345678, 0x9ABCDEF0)])
@pytest.mark.parametrize("first", [0, 151_000, 2**31 - 4096])
def test_random_words_equal_the_reference_exactly(key: tuple[int, int], first: int) -> None:
    keys = torch.from_numpy(np.array([key], np.uint32).view(np.int32)).to(DEVICE)
    out = torch.zeros(4096, dtype=torch.int32, device=DEVICE)
    words_kernel[(1,)](out, keys, first, BLOCK=4096)
    ids = torch.arange(first, first + 4096, dtype=torch.int64).to(torch.int32).to(DEVICE)
    assert torch.equal(out, reference.noise_words(keys, ids)[0])


def test_noise_is_within_2_ulp_of_log1p_from_the_smallest_word_to_the_largest() -> None:
    rng = np.random.default_rng(0)
    spread = np.exp2(rng.uniform(0, 32, 1 << 17)).astype(np.uint64)  # as many tiny words as large ones
    near_one = 2**32 - 1 - np.exp2(rng.uniform(0, 31, 1 << 17)).astype(np.uint64)
    words = np.concatenate([spread, near_one, [0, 1, 2**31, 2**32 - 1], np.arange(2**16 - 4)]).astype(np.uint32)
    block = 8192
    words = words[: len(words) // block * block]
    out = torch.zeros(len(words), device=DEVICE)
    noise_kernel[(len(words) // block,)](out, torch.from_numpy(words.view(np.int32)).to(DEVICE), BLOCK=block)
    v = np.minimum((words.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32), np.float32(reference.V_MAX))
    exact = -np.log1p(-v.astype(np.float64))
    error = np.abs(out.cpu().double().numpy() - exact) / np.spacing(exact.astype(np.float32))
    assert error.max() <= 2.0, (error.max(), v[error.argmax()])


# --- thresholds ----------------------------------------------------------------------------------------------------

FILTERS = [
    {"top_k": [1, 5, 40, 299]},
    {"top_k": [0, 300, 1000, 7]},
    {"top_p": [0.9, 0.37, 0.999, 1e-6]},
    {"top_p": [1.0, 0.0, 0.05, 0.7]},
    {"min_p": [0.3, 0.001, 1.0, 0.0]},
    {"top_k": [20, 0, 150, 3], "top_p": [0.9, 0.37, 0.7, 1.0], "min_p": [0.0, 0.01, 0.1, 0.3]},
]


@pytest.mark.parametrize(("positions", "dtype"), [(4096, torch.float32), (4096, torch.float16), (32, torch.bfloat16)])
@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: "+".join(f))
def test_thresholds_keep_exactly_the_tokens_of_their_definitions(
    monkeypatch: pytest.MonkeyPatch, positions: int, dtype: torch.dtype, filters: dict[str, list[float]],
) -> None:
    """With 32 positions and four logits kept for each, 128 of the 300 logits are kept: flat rows need passes over the whole row."""
    monkeypatch.setattr(tuning, "THRESHOLD_POSITIONS", positions)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(4, 300, generator=generator) * torch.tensor([[3.0], [0.05], [1.0], [8.0]]) - 1
    rows[2] = torch.randint(-9, 3, (300,), generator=generator) * 0.75  # many ties
    rows[3, 100:] = -INF
    logits, t = rows.to(dtype).to(DEVICE), torch.tensor([1.0, 0.7, 1.5, 2.0], device=DEVICE)
    got = thresholds(logits, t, **columns(**filters)).cpu()
    for i in range(4):
        row = logits[i].cpu()
        z = ((row.float() - row.float().max()) / t[i].item()).double().tolist()
        kept = set((row.float() >= got[i]).nonzero().flatten().tolist()) - set((row == -INF).nonzero().flatten().tolist())
        # A sum that equals the required mass up to rounding may count or not, so p is also tried slightly smaller and larger.
        k, p, floor = (filters.get(name, default)[i] for name, default in (("top_k", [0] * 4), ("top_p", [1.0] * 4), ("min_p", [0.0] * 4)))
        alive = {j for j, value in enumerate(z) if value > -INF}
        allowed = [survivors(z, int(min(k, 300)), q, floor) & alive for q in (p * (1 - 2e-6), p, min(1.0, p * (1 + 2e-6)))]
        assert kept in allowed, (i, len(kept), [len(a) for a in allowed])


@pytest.mark.parametrize("filters", [{"top_k": [3, 4, 5, 6, 7]}, {"top_p": [0.3, 0.55, 0.68, 0.8, 0.9]}], ids=lambda f: "+".join(f))
def test_more_than_four_of_the_largest_logits_may_be_at_one_position(
    monkeypatch: pytest.MonkeyPatch, filters: dict[str, list[float]],
) -> None:
    """Six of them are, and four are kept: the threshold is one of the kept ones, the next one, or a smaller one."""
    monkeypatch.setattr(tuning, "THRESHOLD_POSITIONS", 16)
    row = torch.linspace(-1.0, 0.0, 96)
    row[::16] = torch.tensor([2.8, 2.75, 2.7, 2.65, 2.6, 2.55])
    got = thresholds(row.expand(5, -1).contiguous().to(DEVICE), torch.full((5,), 0.5, device=DEVICE), **columns(**filters)).cpu()
    z = ((row - row.max()) / 0.5).double().tolist()
    for i, (name, value) in enumerate((n, v) for n, values in filters.items() for v in values):
        kept = set((row >= got[i]).nonzero().flatten().tolist())
        assert kept == survivors(z, value if name == "top_k" else 0, value if name == "top_p" else 1.0, 0.0), (value, len(kept))


def test_a_row_without_a_filter_is_not_filtered_by_those_of_other_rows() -> None:
    logits = torch.randn(3, 50).to(DEVICE)
    t = torch.tensor([1.0, 0.0, 1.0], device=DEVICE)
    assert thresholds(logits, t, **columns(top_k=[0, 5, 5], top_p=[1.0, 0.1, 1.0], min_p=[0.0, 0.1, 0.0])).isinf().tolist() == [1, 1, 0]


# --- sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 37, 2048, 5001])
@pytest.mark.parametrize("filters", [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 200, "top_p": 0.9, "min_p": 0.001}],
                         ids=lambda f: "+".join(f) or "no filter")
def test_tokens_equal_the_reference_for_greedy_and_random_rows_at_any_temperature(
    dtype: torch.dtype, size: int, filters: dict[str, float],
) -> None:
    generator = torch.Generator().manual_seed(size)
    t = torch.tensor([1.0, 0.0, 1e-2, 1e4, 0.7, 0.0, 1.3], device=DEVICE)
    wide = (torch.randn(7, size + 3, generator=generator) * 3).to(dtype).to(DEVICE)
    logits = wide[:, 3:]  # rows without any alignment
    logits[5] = logits[5].round()  # ties
    logits[6, : size // 2] = -INF
    check_tokens(logits, t, seed=size, **columns(**{name: [value] * 7 for name, value in filters.items()}))


def test_rows_with_one_possible_token_give_this_token_and_never_nan() -> None:
    rows = [[-INF, -INF, 0.0, -INF], [-INF, 1e30, -INF, -INF], [-INF] * 4, [-INF, -3e38, -INF, -INF], [-INF] * 4]
    logits = torch.tensor(rows, device=DEVICE)
    t = torch.tensor([1.0, 1e-5, 1.0, 1e30, 0.0], device=DEVICE)
    for filters in ({}, {"top_k": [3] * 5}, {"top_p": [0.01] * 5}, {"min_p": [1.0] * 5}):
        keys = keys_of(list(range(5))).to(DEVICE)
        assert sampling.sample(logits, t, keys, **columns(**filters)).tolist() == [2, 1, 0, 1, 0]


def test_greedy_rows_take_the_first_of_equal_logits_even_across_chunks() -> None:
    logits = torch.zeros(2, 9000, device=DEVICE)
    logits[0, [8000, 4100, 4101]] = 5.0
    zeros = torch.zeros(2, device=DEVICE)
    assert sampling.sample(logits, zeros, keys_of([1, 2]).to(DEVICE)).tolist() == [4100, 0]


def test_a_token_depends_neither_on_other_rows_nor_on_the_dtype_of_the_logits() -> None:
    logits = (torch.randn(4, 3000, generator=torch.Generator().manual_seed(0)) * 2).to(torch.bfloat16).to(DEVICE)
    t, keys = torch.tensor([1.0, 0.5, 2.0, 1.0], device=DEVICE), keys_of([1, 2, 3, 4]).to(DEVICE)
    f = columns(top_p=[0.9, 0.8, 0.95, 1.0], top_k=[50, 0, 0, 0])
    together = sampling.sample(logits, t, keys, **f)
    assert torch.equal(sampling.sample(logits.float(), t, keys, **f), together)
    into = torch.full((1,), -1, device=DEVICE)
    for i in range(4):
        alone = sampling.sample(logits[i : i + 1], t[i : i + 1], keys[i : i + 1], **{name: c[i : i + 1] for name, c in f.items()}, out=into)
        assert alone is into and alone.tolist() == [together[i].item()]


def test_sampled_tokens_follow_the_softmax() -> None:
    logits = torch.linspace(-1, 1, 8)[torch.randperm(8, generator=torch.Generator().manual_seed(0))]
    n = 20_000 if DEVICE == "cuda" else 200
    t, keys = torch.full((n,), 0.8, device=DEVICE), keys_of([4] * n, list(range(n))).to(DEVICE)
    tokens = sampling.sample(logits.expand(n, -1).to(DEVICE), t, keys)
    counts = np.bincount(tokens.cpu().numpy(), minlength=8)
    assert chi_square(counts, n * torch.softmax(logits / 0.8, -1).double().numpy()) < CHI2_999[7]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spread", [0.3, 4.0], ids=["flat rows", "peaked rows"])
@pytest.mark.parametrize("filters", [{}, {"top_k": 50}, {"min_p": 0.02}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.9, "min_p": 0.01}],
                         ids=lambda f: "+".join(f) or "no filter")
def test_full_batches_of_a_large_vocabulary_equal_the_reference(
    dtype: torch.dtype, spread: float, filters: dict[str, float],
) -> None:
    generator = torch.Generator("cuda").manual_seed(7)
    logits = (torch.randn(256, 151_936, generator=generator, device="cuda") * spread).to(dtype)
    t = torch.linspace(0.0, 2.0, 256, device="cuda")
    check_tokens(logits, t, **columns(**{name: [value] * 256 for name, value in filters.items()}))


@pytest.mark.gpu
def test_sampling_is_captured_in_a_graph_and_replayed_with_other_logits() -> None:
    logits = torch.randn(8, 49_152, device="cuda").to(torch.bfloat16)
    t, keys = torch.ones(8, device="cuda"), keys_of(list(range(8))).cuda()
    f = columns(top_k=[50] * 8, top_p=[0.9] * 8)
    sampling.sample(logits, t, keys, **f)
    out = torch.empty(8, dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampling.sample(logits, t, keys, **f, out=out)
    for _ in range(3):
        logits.copy_(torch.randn(8, 49_152, device="cuda") * 3)
        graph.replay()
        assert torch.equal(out, sampling.sample(logits, t, keys, **f))
