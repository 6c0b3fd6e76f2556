"""Each Numba kernel against the PyTorch reference, and attention against a dense computation."""
from __future__ import annotations

import dataclasses
import errno
import logging
import operator
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minivllm import kernels
from minivllm.kernels import tuning
from minivllm.kernels.layout import KVLayer
from minivllm.kernels.reference import activation as activation_reference
from minivllm.kernels.reference import attention as attention_reference
from minivllm.kernels.reference import linear as linear_reference
from minivllm.kernels.reference import norm as norm_reference
from minivllm.kernels.reference import rope as rope_reference
from tests.kernels.paged import Case, forget_new, fused, make_case, naive_attention

pytest.importorskip("numba", reason="Numba is not installed")
import numba
from numba.core import caching

from minivllm.kernels.numba import attention, decode_attention, rows, threads, vectors

# (query heads, KV heads, head_dim). They cover: 1, 2, 3 and 7 query heads per KV head; all vector lengths; tasks of all KV heads, of one,
# and of two out of three, where the last task has one. Compiling a kernel takes seconds, so bfloat16 has some of these shapes only, the
# other tests here use (9, 3, 64), and tiny models in other folders use the first two.
SHAPES = [(4, 4, 16), (4, 2, 8), (9, 3, 64), (14, 2, 80), (9, 3, 128)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2}  # of outputs near 1
DTYPES = list(TOLERANCE)
KERNELS = [*((shape, torch.float32) for shape in SHAPES), *((shape, torch.bfloat16) for shape in SHAPES[1:4])]


@pytest.fixture(params=[1, 2], autouse=True)
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def prepare(backend: object, case: Case, window: int | None = None) -> object:
    return backend.prepare_attention(case.batch, 0, block_size=case.block_size, num_heads=case.q.shape[1], num_kv_heads=case.kv.k.shape[2],
                                  head_dim=case.q.shape[2], window=window, dtype=case.q.dtype)


def run(case: Case, kv: KVLayer, meta: object, *, backend: object = attention, **options: object) -> Tensor:
    return backend.self_attention(fused(case), kv, case.batch.slots[0], meta, scale=case.q.shape[2] ** -0.5, **options)


decode_lengths = st.integers(1, 70) | st.sampled_from([127, 128, 129, 256, 257, 400])
sequences = st.lists(
    st.one_of(
        decode_lengths.map(lambda n: (1, n)),
        st.integers(1, 40).map(lambda n: (n, n)),  # a whole prompt
        st.tuples(st.integers(2, 20), st.integers(1, 40)).map(lambda t: (t[0], t[0] + t[1])),  # a later chunk
    ),
    min_size=1, max_size=8,
)


@pytest.mark.parametrize(("shape", "dtype"), KERNELS)
@settings(max_examples=25)
@given(sequences, st.integers(1, 40) | st.sampled_from([16, 256]), st.none() | st.integers(1, 300), st.none() | st.sampled_from([0.5, 5.0]),
       st.integers(0, 1000))
def test_any_mix_over_scattered_poisoned_blocks_equals_a_dense_computation(
    shape: tuple[int, int, int], dtype: torch.dtype, seqs: list[tuple[int, int]], block_size: int, window: int | None,
    softcap: float | None, seed: int,
) -> None:
    heads, kv_heads, head_dim = shape
    case = make_case(seqs, heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, window=window, dtype=dtype, seed=seed)
    kv = forget_new(case)
    got = run(case, kv, prepare(attention, case, window), softcap=softcap)
    want = naive_attention(case, scale=head_dim**-0.5, window=window, softcap=softcap)
    # PyTorch computes the prompt chunks, with more rounding in bfloat16
    torch.testing.assert_close(got.view(case.q.shape).double(), want, atol=2 * TOLERANCE[dtype], rtol=2 * TOLERANCE[dtype])
    assert all(torch.equal(a.nan_to_num(99.0), b.nan_to_num(99.0)) for a, b in ((kv.k, case.kv.k), (kv.v, case.kv.v)))


@pytest.mark.parametrize(("shape", "dtype"), KERNELS)
@settings(max_examples=15)
@given(sequences, st.booleans(), st.booleans(), st.integers(0, 1000))
def test_heads_are_normalized_and_rotated_before_they_attend_as_in_the_reference(
    shape: tuple[int, int, int], dtype: torch.dtype, seqs: list[tuple[int, int]], normed: bool, roped: bool, seed: int,
) -> None:
    heads, kv_heads, head_dim = shape
    case = make_case(seqs, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, seed=seed)
    gen = torch.Generator().manual_seed(seed)
    qk_norm = (torch.randn(heads + kv_heads, head_dim, generator=gen).to(dtype), 1e-6) if normed else None
    rope = rope_reference.rope_angles(case.batch.positions, torch.rand(head_dim // 2, generator=gen), 1.0, dtype) if roped else None
    (got, cache), (want, cache_reference) = ((run(case, kv, prepare(backend, case), backend=backend, rope=rope, qk_norm=qk_norm), kv)
                                        for backend in (attention, attention_reference) for kv in [forget_new(case)])
    torch.testing.assert_close(got, want, atol=4 * TOLERANCE[dtype], rtol=4 * TOLERANCE[dtype])
    for a, b in ((cache.k, cache_reference.k), (cache.v, cache_reference.v)):
        torch.testing.assert_close(a, b, atol=2 * TOLERANCE[dtype], rtol=2e-6 if dtype == torch.float32 else 8e-3, equal_nan=True)
    if dtype == torch.bfloat16 and not normed:
        assert torch.equal(cache.k.nan_to_num(99.0), cache_reference.k.nan_to_num(99.0)), "keys are rounded as in the reference"


@pytest.mark.parametrize("window", [None, 7, 150])
def test_slots_that_no_query_may_see_do_not_influence_the_output(window: int | None) -> None:
    case = make_case([(1, 33), (1, 2), (1, 400), (1, 17), (3, 21)], heads=9, kv_heads=3, head_dim=64, window=window, seed=1)
    assert case.kv.k.isnan().any() and case.kv.v.isnan().any()
    assert not run(case, forget_new(case), prepare(attention, case, window)).isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_one_sequence_does_not_influence_other_sequences(dtype: torch.dtype) -> None:
    case = make_case([(1, 33), (1, 300), (1, 40), (1, 2)], heads=9, kv_heads=3, head_dim=64, dtype=dtype, seed=1)
    before = run(case, forget_new(case), prepare(attention, case))
    for i, length in enumerate(case.batch.seq_lens_host):
        kv = forget_new(case)
        own = case.batch.block_tables[0][i, : -(-length // case.block_size)].tolist()
        kv.k[own] = kv.v[own] = torch.nan
        after = run(case, kv, prepare(attention, case))
        others = [j for j in range(4) if j != i]
        assert torch.equal(after[others], before[others])
        assert after[i].isnan().all() or length == 1


def test_a_sequence_gets_the_same_bits_alone_and_in_a_batch_and_with_any_number_of_threads() -> None:
    case = make_case([(1, 400), (1, 3), (1, 129), (6, 6)], heads=9, kv_heads=3, head_dim=64, seed=6)
    together = run(case, forget_new(case), prepare(attention, case))
    for i in range(3):
        batch = dataclasses.replace(
            case.batch, tokens=case.batch.tokens[i : i + 1], positions=case.batch.positions[i : i + 1],
            query_start=torch.tensor([0, 1]).int(), seq_lens=case.batch.seq_lens[i : i + 1], slots=(case.batch.slots[0][i : i + 1],),
            block_tables=(case.batch.block_tables[0][i : i + 1],), num_decodes=1, query_lens_host=(1,),
            seq_lens_host=case.batch.seq_lens_host[i : i + 1])
        alone = dataclasses.replace(case, batch=batch)
        for threads_now in (1, 2, 3):
            torch.set_num_threads(threads_now)
            got = attention.self_attention(fused(case)[i : i + 1], forget_new(case), batch.slots[0], prepare(attention, alone), scale=0.125)
            assert torch.equal(got, together[i : i + 1])


def test_rows_past_the_last_sequence_are_zero() -> None:
    case = make_case([(1, 5), (1, 150), (3, 3)], heads=9, kv_heads=3, head_dim=64, seed=5)
    rest, null = torch.full((2, 15 * 64), 7.0), torch.zeros(2, dtype=torch.int64)
    slots = torch.cat((case.batch.slots[0], null))
    padded = dataclasses.replace(case.batch, tokens=torch.zeros(7, dtype=torch.int32), slots=(slots,))
    out = attention.self_attention(torch.cat((fused(case), rest)), forget_new(case), slots,
                                   prepare(attention, dataclasses.replace(case, batch=padded)), scale=0.125)
    assert torch.equal(out[:5], run(case, forget_new(case), prepare(attention, case)))
    assert not out[5:].any()


def test_one_preparation_serves_all_layers_and_counters_are_zero_after_each() -> None:
    case = make_case([(1, 400), (1, 9)], heads=9, kv_heads=3, head_dim=64, seed=8)
    meta = prepare(attention, case)
    first = [run(case, forget_new(case), meta) for _ in range(3)]
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2])
    assert not meta.finished.any()
    louder = dataclasses.replace(case, values=[2.0 * v for v in case.values], kv=KVLayer(case.kv.k, 2.0 * case.kv.v))
    torch.testing.assert_close(run(louder, forget_new(louder), meta), 2.0 * first[0])


def test_two_python_threads_may_call_at_the_same_time() -> None:
    cases = [make_case([(1, 300 + 20 * i), (1, 70)], heads=9, kv_heads=3, head_dim=64, seed=i) for i in range(2)]
    expected = [run(case, forget_new(case), prepare(attention, case)) for case in cases]
    x, weight = torch.randn(2, 256, 2048), torch.randn(2048)  # enough rows that calls overlap
    normed = [rows.rms_norm(some, weight, 1e-5) for some in x]
    wrong: list[str] = []

    def work(i: int) -> None:
        for _ in range(100):
            if not torch.equal(run(cases[i], forget_new(cases[i]), prepare(attention, cases[i])), expected[i]):
                wrong.append("attention")
        for _ in range(100):
            if not torch.equal(rows.rms_norm(x[i], weight, 1e-5), normed[i]):
                wrong.append("norm")

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


@pytest.mark.parametrize(("head_dim", "dtype"), [(12, torch.float32), (64, torch.float16)])
def test_shapes_without_a_kernel_are_computed_by_the_reference(head_dim: int, dtype: torch.dtype) -> None:
    case = make_case([(1, 30), (1, 7), (4, 9)], head_dim=head_dim, dtype=dtype)
    meta = prepare(attention, case)
    assert isinstance(meta, attention_reference.ReferenceAttentionMeta)
    want = run(case, forget_new(case), prepare(attention_reference, case), backend=attention_reference)
    assert torch.equal(run(case, forget_new(case), meta), want)


def test_tensors_that_the_kernel_would_read_wrongly_are_refused() -> None:
    """The kernel gets addresses: with a wrong dtype, stride or length it would read or write out of bounds."""
    case = make_case([(1, 30), (1, 7)], heads=9, kv_heads=3, head_dim=64, dtype=torch.bfloat16)
    kv, qkv, slots, angles = case.kv, fused(case), case.batch.slots[0], torch.ones(2, 1, 64)
    good = dict(qkv=qkv, kv=kv, slots=slots, rope=(angles.bfloat16(), angles.bfloat16()), qk_norm=(torch.ones(12, 64).bfloat16(), 1e-6))
    attention.self_attention(meta=prepare(attention, case), scale=1.0, **good)
    wide = torch.ones(2, 2 * qkv.shape[1], dtype=torch.bfloat16)
    for bad in (dict(qkv=qkv.float()), dict(qkv=wide[:, ::2]), dict(qkv=qkv[:1]), dict(qkv=qkv[:, :-64]), dict(slots=slots.int()),
                dict(slots=slots[:1]), dict(kv=KVLayer(kv.k.float(), kv.v.float())), dict(kv=KVLayer(kv.k[:, ::2], kv.v[:, ::2])),
                dict(kv=KVLayer(kv.k, kv.v, torch.ones(1))), dict(rope=(angles, angles)),
                dict(rope=(good["rope"][0][:1], good["rope"][1][:1])), dict(qk_norm=(torch.ones(12, 64), 1e-6))):
        with pytest.raises(AssertionError):
            attention.self_attention(meta=prepare(attention, case), scale=1.0, **{**good, **bad})
    for batch in (dict(seq_lens_host=(30, 0)), dict(block_tables=(case.batch.block_tables[0][:, :6],)),
                  dict(block_tables=(case.batch.block_tables[0].long(),)), dict(seq_lens=case.batch.seq_lens.repeat(2)[::2])):
        with pytest.raises(AssertionError):
            prepare(attention, dataclasses.replace(case, batch=dataclasses.replace(case.batch, **batch)))


def test_a_norm_with_a_weight_of_another_dtype_is_computed_by_the_reference() -> None:
    x, weight = torch.randn(2, 32).to(torch.bfloat16), torch.randn(32)
    assert torch.equal(rows.rms_norm(x, weight, 1e-5), norm_reference.rms_norm(x, weight, 1e-5))
    strided = torch.randn(64).to(torch.bfloat16)[::2]
    assert torch.equal(rows.rms_norm(x, strided, 1e-5), norm_reference.rms_norm(x, strided, 1e-5))


def test_results_are_on_the_cpu_with_any_default_device_of_pytorch() -> None:
    case = make_case([(1, 30), (1, 7)], heads=9, kv_heads=3, head_dim=64)
    meta, kv, x, weight = prepare(attention, case), forget_new(case), torch.ones(2, 32), torch.ones(32)
    with torch.device("meta"):
        assert run(case, kv, meta).device.type == rows.rms_norm(x, weight, 1e-5).device.type == "cpu"


def test_without_an_openmp_library_one_thread_runs_all_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([(1, 400), (1, 9)], heads=9, kv_heads=3, head_dim=64, seed=8)
    want = run(case, forget_new(case), prepare(attention, case))
    monkeypatch.setattr(threads, "_gomp_parallel", lambda: None)
    assert torch.equal(run(case, forget_new(case), prepare(attention, case)), want)


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch is linked with libgomp on Linux")
def test_the_kernels_run_on_pytorchs_own_threads() -> None:
    assert threads._gomp_parallel() is not None
    torch.randn(2000, 2000).sum()
    case = make_case([(1, 400)] * 4, heads=9, kv_heads=3, head_dim=64)
    run(case, forget_new(case), prepare(attention, case))
    before = len(list(Path("/proc/self/task").iterdir()))
    for _ in range(5):
        run(case, forget_new(case), prepare(attention, case))
    assert len(list(Path("/proc/self/task").iterdir())) == before


def test_only_splits_with_visible_keys_are_tasks() -> None:
    assert tuning.CPU_SPLIT_KEYS == 128
    assert decode_attention.first_splits([1, 128, 129, 700], 1 << 40) == [0, 1, 2, 4, 10]
    assert decode_attention.first_splits([1, 128, 129, 700], 300) == [0, 1, 2, 4, 7]  # 700: keys 400 to 699
    assert decode_attention.first_splits([128, 384, 385], 128, query_width=2) == [0, 1, 3, 5]  # keys 0 to 127, 255 to 383, 256 to 384


def test_warming_up_compiles_one_kernel_for_all_query_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[object] = []
    monkeypatch.setattr(attention, "kernel_for", lambda *shape: shapes.append(shape))
    for ops in (kernels.select(torch.device("cpu")), kernels.REFERENCE):
        ops.warm_up(9, 3, 64, torch.float32)
    assert shapes == [(9, 3, 64, torch.float32, torch.float32)]


@settings(max_examples=30)
@given(rows_=st.integers(1, 40), width=st.sampled_from([16, 48, 576, 1000]), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_norms_equal_the_reference(rows_: int, width: int, dtype: torch.dtype, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(*shape, generator=gen).to(dtype) for shape in ((rows_, width), (width,)))
    tolerance = 2e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(rows.rms_norm(x, weight, 1e-5), norm_reference.rms_norm(x, weight, 1e-5), atol=tolerance, rtol=tolerance)


@settings(max_examples=30)
@given(rows_=st.integers(1, 40), width=st.sampled_from([16, 48, 576, 1000]), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_silu_and_mul_equals_the_reference(rows_: int, width: int, dtype: torch.dtype, seed: int) -> None:
    x = (20 * torch.randn(rows_, 2 * width, generator=torch.Generator().manual_seed(seed))).to(dtype)
    x[0, 0], x[-1, 1] = -300.0, 300.0
    tolerance = 4e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(rows.silu_and_mul(x), activation_reference.silu_and_mul(x), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"normed": True}, {"gated": True, "normed": True}, {"added": True}])
def test_a_fused_linear_layer_equals_the_reference(dtype: torch.dtype, options: dict[str, bool]) -> None:
    gen = torch.Generator().manual_seed(0)
    x, weight, gain, residual = (torch.randn(*s, generator=gen).to(dtype) for s in ((5, 64), (96, 64), (64,), (5, 96)))
    packed, norm_of = linear_reference.pack_weight(weight * 0.1, dtype), (gain, 1e-5) if "normed" in options else None
    got, want = (backend.fused_linear(x, packed, norm=norm_of, gated="gated" in options,
                                      residual=residual.clone() if "added" in options else None)
                 for backend in (rows, linear_reference))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_nan_and_infinity_do_not_change_in_bfloat16() -> None:
    x = torch.randn(1, 32).to(torch.bfloat16)
    x[0, 16:20] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38])
    x[0, :16] = 80.0  # silu(80) is 80
    torch.testing.assert_close(rows.silu_and_mul(x), activation_reference.silu_and_mul(x), equal_nan=True, atol=0, rtol=8e-3)


def test_these_kernels_are_selected_for_a_cpu() -> None:
    ops = kernels.select(torch.device("cpu"))
    assert ops.self_attention is attention.self_attention and ops.fused_linear is rows.fused_linear


@pytest.mark.parametrize("error", [ImportError, OSError])  # not installed; LLVM's library does not load
def test_without_numba_the_pytorch_kernels_are_selected_and_the_log_says_so(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in sys.modules if name.startswith("minivllm.kernels.numba")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(kernels, "numba")

    class Missing:
        def find_spec(self, name: str, *args: object) -> None:
            if name == "minivllm.kernels.numba":
                raise error(name)

    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with caplog.at_level(logging.INFO):
        assert kernels.select(torch.device("cpu")) is kernels.REFERENCE
    assert "pip install numba" in caplog.text


ONCE = pytest.mark.parametrize("num_threads", [1], indirect=True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of Numba's cache during a test."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def compile_norm(half: int = 0) -> threads.Kernel:
    """A kernel that compiles fast, built as in a new process and run once."""
    kernel = rows.norm_kernel.__wrapped__(half)
    x = torch.ones(1, 16, dtype=DTYPES[half])
    assert rows._run(kernel, x, x.data_ptr(), 16, 0.0).sum() == 16
    return kernel


@ONCE
def test_code_is_kept_on_disk_and_the_log_says_when_it_is_compiled(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert compile_norm()._code.cache_hits == 0
        assert [record.getMessage() for record in caplog.records] == [
            "compiling RMSNorm in float32 for this CPU: once, since the code is kept on disk for the next start"]
        caplog.clear()
        assert compile_norm()._code.cache_hits == 1
        assert not caplog.records
    code = "from minivllm.kernels.numba import rows; print(rows.norm_kernel(0)._code.cache_hits)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
                          env={"NUMBA_CACHE_DIR": str(folder), "PATH": "", "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr[-2000:]


@ONCE
def test_kernels_for_different_sizes_are_in_different_files(folder: Path) -> None:
    """Numba reads, changes and writes the index of a function's files without a lock. If two processes compile different specializations of
    one function at the same time, both may write to the same file, and a third process then runs the wrong code."""
    compile_norm(0)
    first = {path.name for path in folder.rglob("*.nb?")}
    compile_norm(1)
    both = {path.name for path in folder.rglob("*.nb?")}
    assert len(first) == 2 and len(both) == 4 and first < both
    assert len({name.rsplit("-", 1)[0] for name in both}) == 2


@ONCE
@pytest.mark.parametrize("harm", ["no writable folder", "damaged", "full"])
def test_without_a_usable_cache_kernels_are_compiled_at_each_start(
    harm: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if harm == "no writable folder":
        monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
        monkeypatch.setattr(numba.config, "CACHE_LOCATOR_CLASSES", "")
    elif harm == "damaged":
        compile_norm()
        for path in folder.rglob("*.nbi"):
            path.write_bytes(b"")
    else:
        def no_room(*args: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(caching.IndexDataCacheFile, "_save_data", no_room)
    with caplog.at_level(logging.INFO):
        assert compile_norm()._code.cache_hits == 0
    assert "each start compiles them again" in caplog.text


def test_the_key_of_cached_code_depends_on_all_source_files_of_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "threads.py").write_text("a")
    (tmp_path / "vectors.py").write_text("b")
    monkeypatch.setattr(threads, "__file__", str(tmp_path / "threads.py"))
    before = threads.version.__wrapped__()
    (tmp_path / "vectors.py").write_text("c")
    after = threads.version.__wrapped__()
    assert after != before
    (tmp_path / "tuning.txt").write_text("d")
    monkeypatch.setattr(tuning, "__file__", str(tmp_path / "tuning.txt"))
    assert threads.version.__wrapped__() != after


@ONCE
def test_numba_has_the_internals_that_the_kernels_use(folder: Path) -> None:
    """With another version of Numba this test says what has changed. pyproject.toml limits the versions to tested ones."""
    from numba.core import cgutils
    from numba.core.compiler import Compiler

    for name in ("alloca_once", "for_range", "get_or_insert_function"):
        assert callable(getattr(cgutils, name, None)), f"kernels/numba/vectors.py uses numba.core.cgutils.{name}"
    assert callable(getattr(Compiler, "define_pipelines", None)), "kernels/numba/threads.py logs the start of a compilation in it"
    code = compile_norm()._code
    assert isinstance(code.address, int), "kernels/numba/threads.py calls the machine code at CFunc.address"
    for operation in (operator.add, operator.sub, operator.mul, operator.truediv):
        assert _of_vectors(operation) == operation(6.0, 3.0), f"kernels/numba/vectors.py defines {operation.__name__} of vectors"


def _of_vectors(operation: Callable[[Any, Any], Any]) -> float:
    """operation(6, 3) on vectors."""
    @numba.njit
    def function() -> float:
        return vectors.largest(operation(vectors.splat(np.float32(6.0), 4), vectors.splat(np.float32(3.0), 4)))

    return function()
