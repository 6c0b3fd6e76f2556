"""The inputs of CUDA graphs, tested without a GPU: their steps run in Triton's interpreter instead of being captured.

The file is in this folder because `conftest.py` here chooses the interpreter. A "replay" runs the step again on the static inputs,
and writes its logits to the memory that all graphs share, as on a GPU.
"""
from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from minivllm.core.plan import StepPlan
from minivllm.kernels import REFERENCE, select, tuning, upload
from minivllm.kernels.triton import attention
from minivllm.layers.build import BuildContext
from minivllm.lora.adapter import Adapter, ModuleDelta
from minivllm.lora.layout import AdapterLayout
from minivllm.lora.slots import AdapterStore
from minivllm.models.loader import load_model
from minivllm.sampling_params import SamplingParams
from minivllm.worker import batch, cuda_graphs
from minivllm.worker.kv_cache import KVCache, KVLayout
from minivllm.worker.model_runner import LaunchedStep, ModelRunner
from tests.models.tiny import read_spec
from tests.worker.plans import GREEDY, Sequence
from tests.worker.test_drafts import decode, run_with_drafts
from tests.worker.test_model_runner import LENGTH, NUM_BLOCKS, ROWS, Tiny, run, run_from_one_prefix, sequences_of

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="emulates a GPU in Triton's interpreter, not chosen here: hide the GPU with CUDA_VISIBLE_DEVICES=")
CPU = torch.device("cpu")
LOGITS_MEMORY = torch.zeros(ROWS * 1000)  # of every graph's logits
PENALIZED = SamplingParams(temperature=1.1, presence_penalty=0.7, ignore_eos=True)


class Repeated(cuda_graphs.Graph):
    """Runs its step instead of replaying it."""

    replayed: ClassVar[list[cuda_graphs.GraphShape]] = []
    num_stores: ClassVar[list[int]] = []
    runs_first: ClassVar[bool] = False  # as before a capture
    max_captures: ClassVar[int | None] = None  # there is no memory for more
    shared_keys: int  # at the last replay
    pool = "pool"

    def _record(self, pool: Any) -> None:
        if self.max_captures is not None:
            if not self.max_captures:
                raise torch.OutOfMemoryError("CUDA out of memory")
            Repeated.max_captures -= 1
        if self.runs_first:
            self._step()
            if self._drafts is not None:
                self._propose()
            if self._stores:
                self._store()

    def _run(self) -> None:
        assert self.captured
        self.replayed.append(self.shape)
        self.shared_keys = int(self._inputs.tensors[0][0])
        start, lens = self._inputs.tensors[1].tolist(), self._inputs.tensors[3].tolist()
        if not self.shape.decodes:  # padding has no tokens, since programs find their tile by where sequences begin
            assert all(a == b for a, b, n in zip(start, start[1:], lens, strict=False) if n == 0)
        logits, self._sampled = self._step()
        self._logits = LOGITS_MEMORY[: logits.numel()].view_as(logits).copy_(logits)

    def _run_second(self) -> None:
        self._proposed = self._propose()

    def _run_third(self) -> None:
        self.num_stores.append(1)
        self._store()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_with_triton(tmp_path_factory.mktemp("plain"), False)


def tiny_with_triton(folder: Path, windows: bool) -> Tiny:
    tiny = Tiny(folder, windows, layers=1)  # the interpreter is slow
    ops = replace(select(torch.device("cuda")), fused_linear=REFERENCE.fused_linear)
    tiny.with_triton = load_model(read_spec(folder), folder, "auto", BuildContext(CPU, torch.float32, ops))
    return tiny


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def with_a_copy(self: batch.RowTable, *sizes: Any) -> None:
        made(self, *sizes)
        self._mirrored, self.device_tables = True, self.device_tables.clone()

    made = batch.RowTable.__init__
    monkeypatch.setattr(batch.RowTable, "__init__", with_a_copy)
    monkeypatch.setattr(cuda_graphs, "Graph", Repeated)
    small = dict(DECODE_GRAPHS=(1, 2, 4), MIXED_GRAPHS=((16, 3), (32, ROWS)), LARGE_MIXED_GRAPHS=(), SHORT_KEYS=16, SHARING_GRAPHS=(2,),
                 MIN_SKIPPED_TOKENS=20, MIN_SHARING_DECODES=2, SHARED_KEYS_MULTIPLE=8, MIN_SHARED_BYTES=1)
    for name, value in small.items():
        monkeypatch.setattr(tuning, name, value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (0, 0))
    pinned = torch.empty
    monkeypatch.setattr(upload.torch, "empty", lambda *size, pin_memory=False, **options: pinned(*size, **options))
    Repeated.replayed.clear()
    yield


def test_rows_with_adapters_are_replayed_and_give_the_tokens_of_eager_steps(tmp_path: Path) -> None:
    tiny, outputs = Tiny(tmp_path, False, layers=1), []
    layout = AdapterLayout.of(tiny.model.spec, 16)
    generator = torch.Generator().manual_seed(0)
    adapters = [Adapter({name: ModuleDelta(torch.randn(5, adapted.linear.cols, generator=generator),
                                           torch.randn(adapted.linear.rows[part], 5, generator=generator), 0.1)
                         for adapted in layout.layers.values() for part, name in enumerate(adapted.linear.checkpoint_names)})
                for _ in range(2)]
    on_gpu = replace(select(torch.device("cuda")), fused_linear=REFERENCE.fused_linear, pack_weight=lambda weight, dtype: weight)
    for ops, graph_tokens in ((on_gpu, 32), (REFERENCE, 0)):
        store = AdapterStore(layout, 2, torch.float32, CPU)
        for slot, adapter in enumerate(adapters):
            store.add(slot + 1, store.pack(adapter))
            store.load(slot, slot + 1)
        tiny.with_triton = load_model(read_spec(tmp_path), tmp_path, "auto", BuildContext(CPU, torch.float32, ops, adapters=store))
        runner = runner_of(tiny, 4, graph_tokens=graph_tokens)
        sequences = [Sequence(f"s{i}", i, tiny.prompts[i % 2], 2, adapter_slot=slot) for i, slot in enumerate((0, 1, -1))]
        for some in (sequences[:1], sequences[1:]):  # one row, then rows of another adapter and of the base model
            run(runner, tiny.planner(), some, random.Random(1))
        outputs.append([s.outputs for s in sequences])
    assert outputs[0] == outputs[1] and outputs[0][2] == tiny.expected[0][:2] != outputs[0][0]
    assert {shape.decodes > 0 for shape in Repeated.replayed if shape.adapters} == {True, False}  # decodes alone, and with a prompt


def runner_of(
    tiny: Tiny, block_size: int, query_widths: tuple[int, ...] = (1,), length: int = LENGTH, graph_tokens: int = 32,
    only_largest_graph: bool = False,
) -> ModelRunner:
    model = tiny.with_triton
    kv = KVCache(KVLayout.of(model.spec, block_size, torch.float32), NUM_BLOCKS, 0, CPU, model.build.ops)
    for layer in kv.layers:  # reading a slot that was never written gives NaN
        layer.k.fill_(torch.nan), layer.v.fill_(torch.nan)
    return ModelRunner(model, kv, max_num_seqs=ROWS, max_model_len=length, eos_token_ids=(3,), graph_tokens=graph_tokens,
                       query_widths=query_widths, only_largest_graph=only_largest_graph)


@pytest.mark.parametrize(("length", "block_size"), [(1, 1), (2, 4), (4, 4), (5, 4)])
def test_a_capture_stays_inside_all_tables_however_short_sequences_are(
    plain: Tiny, length: int, block_size: int, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Indices into the token table and the block tables are checked by PyTorch, those of attention here."""
    monkeypatch.setattr(Repeated, "runs_first", True)
    prepared = []
    forward = plain.with_triton.forward

    def checked(batch: Any, *caches: Any) -> Any:
        longest = max(batch.seq_lens_host)
        assert longest <= length <= batch.block_tables[0].shape[1] * block_size, "more keys than the block tables have entries for"
        assert int(batch.seq_lens.max()) <= length
        prepared.append(longest)
        return forward(batch, *caches)

    monkeypatch.setattr(plain.with_triton, "forward", checked)
    runner = runner_of(plain, block_size, (1, 3), length)
    assert set(prepared) == {length} and runner.rows.tokens.shape[1] == max(length, 2)
    last = runner.rows.tokens.numel() - 1
    for graph in (*runner._graphs._decodes, *runner._graphs._mixed, *runner._graphs._sharing):
        assert max(int(column.max()) for column in (graph._padding.sample_index, graph._padding.token_index)) <= last


@pytest.mark.parametrize(("windows", "block_size", "drop_after"), [(False, 3, -1), (True, 4, 3)], ids=["full attention", "two KV groups"])
def test_greedy_tokens_equal_transformers_and_the_device_has_all_block_table_entries(
    plain: Tiny, windows: bool, block_size: int, drop_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny = tiny_with_triton(tmp_path, True) if windows else plain
    runner, seed = runner_of(tiny, block_size), 1 + windows
    launch = runner.launch

    def launch_and_compare(plan: StepPlan) -> LaunchedStep:
        handle = launch(plan)
        there, here = runner.rows.device_tables.numpy(), runner.rows.block_tables
        assert (there[:, list(plan.rows)] == here[:, list(plan.rows)]).all()
        return handle

    monkeypatch.setattr(runner, "launch", launch_and_compare)
    sequences = sequences_of(tiny)
    run(runner, tiny.planner(block_size, seed), sequences, random.Random(seed), depth=1, drop_after=drop_after)
    assert [s.outputs for s in sequences] == tiny.expected
    assert {shape.decodes for shape in Repeated.replayed} >= {2, 4}
    assert {(16, 3), (32, 4)} <= {shape[:2] for shape in Repeated.replayed}  # mixed steps; larger ones run eagerly


def test_sequences_with_the_same_leading_blocks_read_them_once_and_tokens_do_not_change(
    plain: Tiny, monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner, launched, launch = runner_of(plain, 4), set(), attention.launch
    monkeypatch.setattr(attention, "launch", lambda kernel, *args, **options: (launched.add(kernel), launch(kernel, *args, **options)))
    sequences = run_from_one_prefix(runner, plain)
    assert [s.outputs for s in sequences] == [plain._generate(list(s.prompt)) for s in sequences]
    assert {graph.shared_keys for graph in runner._graphs._sharing} == {16}
    assert attention._shared_attention in launched
    assert {shape.seqs for shape in Repeated.replayed if shape.sharing} == {2, ROWS - 2}


def test_a_graph_runs_before_its_first_inputs(plain: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Repeated, "runs_first", True)
    runner = runner_of(plain, 4)  # an index out of bounds raises
    assert runner._graphs._mixed and runner._graphs._sharing and not Repeated.replayed


def test_graphs_are_captured_while_sequences_run_and_change_nothing_that_these_use(plain: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Repeated, "runs_first", True)
    runner, sequences = runner_of(plain, 4, only_largest_graph=True), sequences_of(plain)[:2]
    launch, count, missing = runner.launch, runner.graphs_missing, []

    def capture_and_launch(plan: StepPlan) -> LaunchedStep:
        missing.append(runner.graphs_missing)
        if len(missing) % 8 == 0:  # as in an idle loop, but sequences run
            runner.capture_next()
        return launch(plan)

    monkeypatch.setattr(runner, "launch", capture_and_launch)
    run(runner, plain.planner(4, 2), sequences, random.Random(1), depth=1)
    assert [s.outputs for s in sequences] == plain.expected[:2]
    assert missing[0] == count > missing[1] and len(set(Repeated.replayed)) > 2
    while runner.capture_next():
        pass
    assert not runner.graphs_missing and all(graph.captured for graph in (*runner._graphs._decodes, *runner._graphs._mixed))


def test_steps_without_memory_for_their_graph_run_in_a_larger_one_or_eagerly(
    plain: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Repeated, "max_captures", 2)
    runner, sequences = runner_of(plain, 4, only_largest_graph=True), sequences_of(plain)[:2]
    run(runner, plain.planner(4, 2), sequences, random.Random(1), depth=1)
    assert [s.outputs for s in sequences] == plain.expected[:2]
    assert 0 < len(set(Repeated.replayed)) <= 2
    assert not runner.graphs_missing and not runner.capture_next()
    assert [record.message.startswith("no memory for") for record in caplog.records if record.levelname == "WARNING"] == [True]


def test_without_memory_for_the_largest_graph_the_start_fails(plain: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Repeated, "max_captures", 0)
    with pytest.raises(torch.OutOfMemoryError):
        runner_of(plain, 4, only_largest_graph=True)


def test_changed_blocks_are_sent_before_a_graph_that_has_no_room_for_them(plain: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, planner = runner_of(plain, 4), plain.planner()
    for graph in (*runner._graphs._decodes, *runner._graphs._mixed):
        graph.max_changes = 0
    sequences = sequences_of(plain)
    run(runner, planner, sequences, random.Random(5))
    assert [s.outputs for s in sequences] == plain.expected
    assert Repeated.replayed


def test_rows_that_are_not_sampled_plainly_use_the_logits_of_the_graph(plain: Tiny) -> None:
    outputs = []
    for runner in (plain.runner(), runner_of(plain, 4)):  # the first has no graphs
        sequences = sequences_of(plain)
        for sequence, top_p in zip(sequences, (1.0, 0.5, 1.0, 0.8, 1.0), strict=True):
            sequence.params = SamplingParams(temperature=0.8, top_p=top_p, logprobs=2 if top_p == 0.8 else None, ignore_eos=True)
        results = run(runner, plain.planner(), sequences, random.Random(3), depth=1)
        outputs.append(([s.outputs for s in sequences],
                        [[(e.token_id, round(e.logprob, 3)) for e in entries] for r in results for entries in r.logprobs if entries]))
    assert outputs[0] == outputs[1] and outputs[0][1]
    assert Repeated.replayed


@pytest.mark.parametrize(("params", "right"), [(GREEDY, "all"), (PENALIZED, "none")], ids=["plain, all", "penalized, none"])
def test_decodes_with_drafts_are_captured_with_their_width(plain: Tiny, params: SamplingParams, right: str) -> None:
    expected, got = decode(sequences_of(plain), [params]), decode(sequences_of(plain), [params])
    run(plain.runner(), plain.planner(), expected, random.Random(1))
    answers = [s.outputs for s in expected]
    accepted = {"all": lambda n: n, "none": lambda n: 0}[right]
    run_with_drafts(runner_of(plain, 4, (1, 3)), plain.planner(), got, answers, accepted, random.Random(2), lambda: 2)
    assert [s.outputs for s in got] == answers
    assert {shape.query_width for shape in Repeated.replayed if shape.decodes} >= {3}


def columns(rows: int, tokens: int, longest: int, shared_keys: int = 0, adapters: bool = False) -> batch.Columns:
    decodes = rows if tokens == rows else 0
    return SimpleNamespace(simple=True, rows=range(rows), token_index=range(tokens), num_decodes=decodes, query_width=1,
                           query_lens=np.array([tokens]), seq_lens=np.array([longest]), shared_keys=shared_keys,
                           adapter_slots=np.zeros(rows * adapters))


def test_a_step_runs_in_the_smallest_graph_that_holds_its_rows_tokens_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    def graph(*shape: Any, adapters: bool = False) -> SimpleNamespace:
        return SimpleNamespace(shape=cuda_graphs.GraphShape(*shape, adapters=adapters))

    graphs = cuda_graphs.StepGraphs.__new__(cuda_graphs.StepGraphs)
    graphs._decodes = [graph(2, 2, 2, 16), graph(2, 2, 2, 64), graph(4, 4, 4, 64)]
    graphs._sharing = [graph(4, 4, 4, 64, True)]
    graphs._mixed = [graph(32, 3, 0, 64), graph(128, 6, 0, 64)]
    graphs._token_bytes = 1
    graphs._model = SimpleNamespace(spec=None)
    monkeypatch.setattr(tuning, "MIN_SHARED_BYTES", 32)
    flops = {60: tuning.LAUNCH_FLOPS}  # of the earlier keys of prompts, by the length of the sequence
    monkeypatch.setattr(cuda_graphs, "flops_of_earlier_keys", lambda spec, queries, lens: flops.get(int(lens[0]), 0))
    assert graphs.find(columns(1, 1, 16)) is graphs._decodes[0]
    assert graphs.find(columns(2, 2, 17)) is graphs._decodes[1]
    assert graphs.find(columns(3, 3, 16)) is graphs._decodes[2]
    assert graphs.find(columns(5, 5, 16)) is None
    assert graphs.find(columns(4, 4, 60, 11)) is graphs._sharing[0]  # the keys that three of four do not read again are worth it
    assert graphs.find(columns(4, 4, 60, 10)) is graphs._decodes[2]
    assert graphs.find(columns(2, 2, 64, 31)) is graphs._decodes[1]
    assert graphs.find(columns(3, 20, 20)) is graphs._mixed[0]
    assert graphs.find(columns(4, 20, 20)) is graphs._mixed[1]
    assert graphs.find(columns(4, 100, 40)) is graphs._mixed[1]  # more tokens in all than one sequence may have
    assert graphs.find(columns(4, 129, 40)) is None
    assert graphs.find(columns(3, 20, 60)) is None, "a captured step reads so many earlier keys slowly"
    assert graphs.find(columns(1, 1, 16, adapters=True)) is None
    graphs._decodes.append(graph(4, 4, 4, 64, adapters=True))
    assert graphs.find(columns(1, 1, 16, adapters=True)) is graphs._decodes[3]
