"""CUDA graphs: a small step's hundreds of kernel launches, recorded once and replayed with one call.

At small batch sizes a step is a chain of kernels of a few microseconds each, and launching them from Python takes longer than
running them. A graph fixes everything that is not data: the numbers of tokens and sequences, the kernels' grids, the addresses.
So there is one graph per shape out of a short list, and a batch is padded to the next shape.

    shapes           decodes only: sequences of query_width tokens each;  mixed: prompt chunks and decodes

    batch of 5       a b c d e           one copy into the static inputs of size 8
    static inputs    a b c d e R R R     padding: the null row, whose tokens are at position 0, in the null block

A graph contains a whole step: it applies the changed block-table entries, writes drafts to the token table, gathers the newest
tokens, runs the model, computes logits of each sequence's last token (for decodes with drafts: of every token), samples without
filters (greedy or with a temperature), and writes the sampled tokens to the table. So the next step can follow without the host knowing
a token, and between two decode steps the host launches nothing else. Where a row needs more than a plain sample, the sampler
samples again from the same logits.

The inputs of a replay (rows, positions, lengths, slots, block tables) are device tensors. Grids depend on the shape alone, since the
attention is prepared for the maximum sequence length. Small batches of decodes have two graphs each, for short and for long
sequences, because attention splits the keys differently. Some sizes have one more, for sequences with the same leading blocks: it reads
the shared keys once. Larger steps run eagerly: arithmetic bounds them, and Python launches the next kernels while the GPU computes.

Graphs never run at the same time, so all share one memory pool and one tensor for logits: the next step overwrites them.

A start captures the largest graph, which sets the size of the pool. With `cuda_graph_capture="background"` the others follow while the
engine is idle, from the largest to the smallest, and a step that needs a graph captures it first. So every step runs in the same graph as
if all had been captured at the start: it may come later, but its tokens are the same. Capturing changes nothing that a sequence uses: the
step that it runs has padding alone, which is the null row and the null block, and the stream orders it after the steps before it.
"""
from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minivllm.core.plan import NULL_BLOCK
from minivllm.families import ModelSpec, MoESpec, active_weights
from minivllm.kernels import tuning
from minivllm.kernels.layout import InputBatch
from minivllm.kernels.reference.drafts import PlannedStep
from minivllm.kernels.upload import StaticColumns
from minivllm.models.decoder import LanguageModel
from minivllm.sampling.sampler import MAX_LOGITS_ROWS, Sampler
from minivllm.speculative.base import ProposalInput
from minivllm.worker.batch import Columns, RowTable
from minivllm.worker.drafts import DraftRunner
from minivllm.worker.kv_cache import KVCache, KVLayout

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
_NOTHING = np.empty(0, np.int64)


def can_capture(spec: ModelSpec, layout: KVLayout) -> bool:
    """Whether graphs can record a model's steps: not those of Transformers' code, nor latent attention, which has no kernel for a GPU."""
    return not spec.parameters and not any(group.latent for group in layout.groups)


def mixed_shapes(spec: ModelSpec, max_num_batched_tokens: int) -> tuple[tuple[int, int], ...]:
    """(tokens, sequences) of the mixed steps to capture. The smaller the model, the larger the steps."""
    weights = active_weights(spec, "layers.")
    most = min(max_num_batched_tokens, tuning.LAUNCH_FLOPS / (2 * weights))
    return (*tuning.MIXED_GRAPHS, *((tokens, tuning.DECODE_GRAPHS[-1]) for tokens in tuning.LARGE_MIXED_GRAPHS if tokens <= most))


def flops_of_earlier_keys(spec: ModelSpec, query_lens: Array, seq_lens: Array) -> float:
    """Of the attention of prompt chunks to keys of earlier steps. [B] each."""
    pairs = query_lens * (seq_lens - query_lens).astype(np.float64)
    visible = {window: pairs.sum() if window is None else np.minimum(pairs, query_lens * float(window)).sum()
               for window in {layer.attention.window for layer in spec.layers}}
    return float(sum(4 * layer.attention.q_size * visible[layer.attention.window] for layer in spec.layers))


def sharing_sizes(max_num_seqs: int, max_model_len: int) -> tuple[int, ...]:
    """Numbers of decodes of the graphs that read a shared prefix once, for models with full attention."""
    if max_num_seqs < tuning.MIN_SHARING_DECODES or max_model_len <= tuning.SHARED_KEYS_MULTIPLE:
        return ()
    most = min(max_num_seqs, tuning.DECODE_GRAPHS[-1])
    return (*(size for size in tuning.SHARING_GRAPHS if size < most), most)


def graph_bytes(spec: ModelSpec, max_num_seqs: int, max_num_batched_tokens: int, adapters: bool = False) -> int:
    """Bytes to set aside for all graphs; the log says how much they took. They share the memory of the largest one."""
    rows, tokens = min(max_num_seqs, tuning.DECODE_GRAPHS[-1]), mixed_shapes(spec, max_num_batched_tokens)[-1][0]
    widest = max(layer.mlp.intermediate_size * (layer.mlp.top_k if isinstance(layer.mlp, MoESpec) else 1) for layer in spec.layers)
    return (256 << 20 if adapters else 128 << 20) + rows * spec.vocab_size * 2 + tokens * (32 * spec.hidden_size + 8 * widest)


class GraphShape(NamedTuple):
    """What a graph fixes."""

    tokens: int  # T
    seqs: int  # B
    decodes: int  # B if all sequences are decodes, else 0
    longest: int  # maximum number of keys of a sequence; it sets the number of programs that share them
    sharing: bool = False  # keys that all decodes share are read once
    adapters: bool = False  # some tokens have LoRA adapters

    @property
    def query_width(self) -> int:
        """Tokens of each decode."""
        return self.tokens // self.seqs if self.decodes else 1

    @property
    def logits_rows(self) -> int:
        """R: every token of a decode, the last token of each sequence of a mixed step."""
        return self.tokens if self.decodes else self.seqs


class Inputs(NamedTuple):
    """The static inputs of a graph, as numpy columns on the host and as tensors on the device."""

    shared_keys: Any  # [1]
    query_start: Any  # [B + 1]
    rows: Any  # [B] of the row table
    seq_lens: Any  # [B]
    sample_index: Any  # [R] where sampled tokens go, in the flat token table
    temperature: Any  # [R]
    keys: Any  # [R, 2] of the noise
    draft_index: Any  # [R - B] where drafts go, in the flat token table; none in mixed steps
    drafts: Any  # [R - B]
    changed: Any  # [C] changed entries of the flat block tables
    new_blocks: Any  # [C] their values
    token_index: Any  # [T] of the tokens, in the flat token table
    positions: Any  # [T]
    adapter_slots: Any  # [T] int32; [0] without adapters
    # Of a worker with a proposer, else [0]:
    known_ends: Any  # [B] number of known tokens by the plan; -1: no sample
    streams: Any  # [R] of the noise
    token_source: Any  # [T] the sequence of each token
    is_token: Any  # [T] bool: no padding
    has_draft: Any  # [R - B] bool: after each token of a decode but the last, whether a draft follows
    slots: Any  # [G] of [T]

    @classmethod
    def of(cls, columns: Sequence[Any]) -> Inputs:
        """From a flat list, in which the slots of all groups come last."""
        return cls._make([*columns[:19], tuple(columns[19:])])

    def flat(self) -> list[Any]:
        return [*self[:-1], *self.slots]


class Graph:
    """One shape: its static inputs and, once it is captured, the recorded step and its static outputs."""

    def __init__(self, shape: GraphShape, model: LanguageModel, kv: KVCache, table: RowTable, drafts: DraftRunner | None = None) -> None:
        """drafts: also verify drafts and propose new ones."""
        self.captured = False
        self._model, self._kv, self._table, self.shape, self._drafts = model, kv, table, shape, drafts
        tokens, seqs, decodes = shape[:3]
        null_index, rows = table.null_row * table.tokens.shape[1], shape.logits_rows
        # Padding decodes have query_width tokens each, all of the null row. Padding sequences of mixed steps have none. (The first
        # sequence of an empty mixed graph, which is never padding, has one.)
        query_start = np.minimum(np.arange(seqs + 1) * shape.query_width, tokens if decodes else 1).astype(np.int32)
        # Changed block-table entries that a replay applies: enough for decodes and prompts, not for a whole long row.
        self.max_changes = (2 * seqs + tokens // kv.layout.block_size) * len(kv.layout.groups)
        num_drafts = rows - seqs if decodes else 0
        self._padding = Inputs(
            shared_keys=np.zeros(1, np.int32), query_start=query_start, rows=np.full(seqs, table.null_row), seq_lens=np.diff(query_start),
            sample_index=np.full(rows, null_index + 1), temperature=np.zeros(rows, np.float32), keys=np.zeros((rows, 2), np.int32),
            draft_index=np.full(num_drafts, null_index + 1), drafts=np.zeros(num_drafts, np.int32),
            changed=np.full(self.max_changes, table.null_row * table.device_tables.shape[2]),
            new_blocks=np.full(self.max_changes, NULL_BLOCK, np.int32),
            token_index=np.full(tokens, null_index), positions=np.zeros(tokens, np.int64),
            adapter_slots=np.full(tokens if shape.adapters else 0, -1, np.int32),
            known_ends=np.full(seqs if drafts else 0, -1), streams=np.zeros(rows if drafts else 0, np.int64),
            token_source=np.zeros(tokens if drafts else 0, np.int64), is_token=np.zeros(tokens if drafts else 0, np.bool_),
            has_draft=np.zeros(num_drafts if drafts else 0, np.bool_),
            slots=tuple(np.full(tokens, NULL_BLOCK * kv.layout.block_size) for _ in kv.layout.groups))
        self._null_sample = null_index + 1
        self._before_first = torch.from_numpy(query_start[:-1] - 1).to(model.build.device, torch.int64)  # of each decode's tokens
        self._inputs = StaticColumns(self._padding.flat(), model.build.device)

    def capture(self, pool: Any) -> None:
        """Record the step. pool: the memory of graphs captured before; None: this is the first one. Later steps on the stream may
        already be planned, but not launched."""
        self._record(pool)
        self.captured = True

    def _record(self, pool: Any) -> None:
        self._step()  # compiles kernels and fills their caches, which a capture must not do
        if self._drafts is not None:
            self._propose()
        torch.cuda.synchronize(self._model.build.device)
        self._graph = torch.cuda.CUDAGraph()
        mode = "thread_local"  # other threads may use the GPU: NCCL's watchdog queries events, LoRA adapters are read into pinned memory
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode=mode):
            logits, self._sampled = self._step()  # [R, V] in the model's dtype, [R] int64
        self._logits = _unowned(logits)
        if self._drafts is not None:  # a separate graph: a step may be sampled again before it
            self._second = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._second, pool=self._graph.pool(), capture_error_mode=mode):
                self._proposed = self._propose()  # [B, k] int64
        if self._stores:
            self._third = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._third, pool=self._graph.pool(), capture_error_mode=mode):
                self._store()

    def _run(self) -> None:
        self._graph.replay()

    def _run_second(self) -> None:
        self._second.replay()

    def _run_third(self) -> None:
        self._third.replay()

    @property
    def pool(self) -> Any:
        """The memory of its intermediate values and logits; graphs that never run at the same time may share it."""
        return self._graph.pool()

    def _step(self) -> tuple[Tensor, Tensor]:
        x, shape = Inputs.of(self._inputs.tensors), self.shape
        tokens = self._table.tokens.view(-1)
        self._table.device_tables.view(-1).index_copy_(0, x.changed, x.new_blocks)
        if len(x.drafts):
            tokens.index_copy_(0, x.draft_index, x.drafts)
        tables = tuple(table.index_select(0, x.rows) for table in self._table.device_tables)
        if self._drafts is None:
            newest = tokens.index_select(0, x.token_index)
        else:
            x, newest = self._corrected(x)
        chunk = shape.tokens // shape.seqs
        lens = (chunk + shape.tokens % shape.seqs, *(chunk,) * (shape.seqs - 1))  # mixed steps use only the sum
        batch = InputBatch(
            tokens=newest, positions=x.positions, query_start=x.query_start, seq_lens=x.seq_lens,
            slots=x.slots, block_tables=tables, logit_rows=x.rows,
            num_decodes=shape.decodes, query_lens_host=lens, seq_lens_host=(shape.longest,) * shape.seqs,
            last_only=not shape.decodes and shape.tokens - shape.seqs >= tuning.MIN_SKIPPED_TOKENS and not self._keeps_hidden,
            shared=x.shared_keys if shape.sharing else None,
            query_width=shape.query_width, captured=True, adapter_slots=x.adapter_slots if shape.adapters else None,
        )
        hidden = all_hidden = self._model.forward(batch, self._kv.layers, self._kv.layout.block_size)
        if len(hidden) > shape.logits_rows:
            hidden = hidden.index_select(0, x.query_start[1:] - 1)
        logits = self._model.logits(hidden, dtype=None)
        sampled = self._model.build.ops.sample(logits, x.temperature, x.keys)
        if self._drafts is None:
            tokens.index_copy_(0, x.sample_index, sampled.to(torch.int32))
        else:
            self._kept, self._before = self._model.build.ops.accept_drafts(
                self._table.tokens, self._table.lengths, x.rows, x.known_ends, x.seq_lens, x.sample_index, sampled, x.has_draft)
            self._batch, self._hidden = batch, all_hidden
        self._model.settle()
        return logits, sampled

    @property
    def _stores(self) -> bool:
        """Whether a step of this shape may be followed by `_store`: only plain decodes need no drafts."""
        return self._drafts is not None and self._drafts.proposer.stores and self.shape.decodes > 0 and self.shape.query_width == 1

    @property
    def _keeps_hidden(self) -> bool:
        return self._drafts is not None and self._drafts.proposer.needs_hidden

    def _corrected(self, x: Inputs) -> tuple[Inputs, Tensor]:
        """The inputs with exact positions, because a plan may be ahead of them (see `worker/batch.py`), and the tokens [T]."""
        plan, table = PlannedStep(*(getattr(x, name) for name in PlannedStep._fields)), self._table
        exact = self._model.build.ops.exact_step(plan, table.tokens, table.lengths, table.device_tables, self._kv.layout.block_size,
                                                 self._null_sample, every_token=self.shape.decodes > 0)
        self._behind = exact.behind
        return x._replace(seq_lens=exact.seq_lens, positions=exact.positions, slots=tuple(exact.slots), sample_index=exact.sample_index,
                          keys=exact.keys), exact.tokens

    def _propose(self) -> Tensor:
        """The proposer's part of the step."""
        assert self._drafts is not None
        return self._drafts.propose_on_device(self._proposal_input(self._drafts), Inputs.of(self._inputs.tensors).known_ends)

    def _store(self) -> None:
        """The proposer's part of a step after which no drafts are needed."""
        assert self._drafts is not None
        self._drafts.proposer.store(self._proposal_input(self._drafts))

    def _proposal_input(self, drafts: DraftRunner) -> ProposalInput:
        x, batch, shape = Inputs.of(self._inputs.tensors), self._batch, self.shape
        every = shape.query_width if shape.decodes else 1
        last = self._kept + self._before_first if shape.decodes else (batch.query_start[1:].long() - 1).clamp_min(0)
        return drafts.proposal_input(batch, self._hidden, x.rows, x.token_source, last, x.temperature[::every], x.streams[::every])

    def verified(self, num_seqs: int) -> VerifiedStep:
        """What the last replay verified, of its first `num_seqs` sequences."""
        rows = num_seqs * self.shape.query_width if self.shape.decodes else num_seqs

        def propose() -> Tensor:
            self._run_second()
            return self._proposed[:num_seqs]

        def store() -> None:
            if self._drafts is not None and self._drafts.proposer.stores:
                assert self._stores
                self._run_third()

        return VerifiedStep(self._kept[:num_seqs], self._before[:rows], self._behind[:num_seqs], propose, store)

    def replay(self, c: Columns, changes: tuple[Array, Array], sampler: Sampler) -> tuple[Tensor, Tensor, Array | None]:
        """Returns logits [R, V] in the model's dtype, sampled tokens [R] int64, and for each logits row of `c` its index among the R
        rows (None: the order is the same). Valid until the next replay. changes: see `RowTable.changes`."""
        if self.shape.decodes:
            count, order = len(c.token_index), c.logits_rows
            rows, positions = np.repeat(c.rows, c.query_width), c.positions + 1  # of the tokens that the R rows sample
        else:
            count, order = len(c.rows), c.source
            rows, positions = c.rows, c.seq_lens
        temperature, keys = sampler.plain_columns(rows, positions)
        sample_index = self._padding.sample_index[:count].copy()
        sample_index[order] = c.sample_index
        drafting = self._drafting(c, rows, sampler)
        filled = Inputs(np.array([c.shared_keys]), c.query_start, c.rows, c.seq_lens, sample_index, temperature, keys, c.draft_index,
                        c.drafts, *changes, c.token_index, c.positions, c.adapter_slots, *drafting,
                        tuple(c.slots))
        padded = [_pad(column, padding) for column, padding in zip(filled.flat(), self._padding.flat(), strict=True)]
        if not self.shape.decodes:
            padded[1][len(c.rows) :] = c.query_start[-1]
        self._inputs.fill(padded)
        self._run()
        in_order = len(order) == count and bool((order[1:] > order[:-1]).all())
        return self._logits[:count], self._sampled[:count], None if in_order else order


    def _drafting(self, c: Columns, rows: Array, sampler: Sampler) -> tuple[Array, Array, Array, Array, Array]:
        """The inputs of a worker with a proposer, from `known_ends` to `has_draft`. rows [R]: of the row table."""
        d, null_index = c.drafting, self._null_sample - 1
        if self._drafts is None or d is None:
            return (_NOTHING,) * 2 + (_NOTHING, _NOTHING.astype(np.bool_), _NOTHING.astype(np.bool_))
        has_draft = np.arange(c.query_width - 1)[None, :] < d.num_drafts[:, None] if self.shape.decodes else _NOTHING.astype(np.bool_)
        is_token = np.ones(len(c.token_index), np.bool_) if not c.padded else c.token_index != null_index
        return d.known_ends, sampler.streams(rows), d.token_source, is_token, has_draft.reshape(-1)


def _pad(column: Array, padding: Array) -> Array:
    """The column, lengthened by the end of `padding`."""
    if len(column) == len(padding):
        return column.astype(padding.dtype, copy=False)
    whole = padding.copy()
    whole[: len(column)] = column
    return whole


class _DeviceMemory:
    """Device memory for `torch.as_tensor`, by the CUDA array interface."""

    def __init__(self, tensor: Tensor) -> None:
        kind = {2: "<i2", 4: "<i4"}[tensor.element_size()]  # the interface has no bfloat16
        self.__cuda_array_interface__ = {"shape": tuple(tensor.shape), "typestr": kind, "data": (tensor.data_ptr(), False), "version": 3}


def _unowned(tensor: Tensor) -> Tensor:
    """A view that does not keep the memory of `tensor` allocated, so that the next graph's logits can use it.

    The graphs' pool must stay alive. Enqueue any read of this tensor on the same stream before the next replay."""
    same = torch.as_tensor(_DeviceMemory(tensor), device=tensor.device).view(tensor.dtype)
    assert tensor.is_contiguous() and same.data_ptr() == tensor.data_ptr()
    return same


@dataclass(frozen=True, slots=True)
class VerifiedStep:
    """What a replay of B sequences and R logits rows verified, on the device. Valid until the next replay."""

    kept: Tensor  # [B] int64: tokens that count. After other tokens were sampled, write the new counts here before `propose`
    before: Tensor  # [R] int32: drafts at the positions of the sampled tokens
    behind: Tensor  # [B] int64: by how much the plan was ahead
    propose: Callable[[], Tensor]  # runs the proposer: [B, k] int64
    store: Callable[[], None]  # in place of `propose`, if no drafts are needed


class StepGraphs:
    """All graphs of a runner. The largest is captured first, so that the others share its memory."""

    def __init__(self, model: LanguageModel, kv: KVCache, table: RowTable, max_num_seqs: int, max_num_batched_tokens: int,
                 query_widths: Sequence[int] = (1,), drafts: DraftRunner | None = None, *, only_largest: bool = False) -> None:
        """query_widths: tokens per captured decode, which is 1 plus its number of drafts. drafts: of a worker with a proposer.
        only_largest: `capture` and `capture_next` capture the others."""
        self._widths, self._table, self._model = sorted(query_widths), table, model
        shapes = list(graph_shapes(model.spec, table, max_num_seqs, max_num_batched_tokens, query_widths))
        if model.build.adapters is not None:  # a batch without adapters runs the graphs of an engine without them
            shapes += [shape._replace(adapters=True) for shape in shapes if not shape.sharing]
        self._free_before = self._free()
        graphs = {shape: Graph(shape, model, kv, table, drafts) for shape in sorted(shapes, reverse=True)}
        self._missing, self._pool = list(graphs.values()), None  # the graphs to capture, largest first
        by_size = [graphs[shape] for shape in sorted(shapes, key=lambda shape: (shape.seqs, shape.longest))]
        self._decodes = [graph for graph in by_size if graph.shape.decodes and not graph.shape.sharing]
        self._sharing = [graph for graph in by_size if graph.shape.sharing]
        self._mixed = [graphs[shape] for shape in shapes if not shape.decodes]
        self._token_bytes = kv.layout.token_bytes
        self._summary = (f"{len(graphs)} CUDA graphs of up to {max(s.decodes for s in shapes)} decodes or "
                         f"{max((shape.tokens for shape in shapes if not shape.decodes), default=0)} tokens")
        model.build.ops.before_replays(model.build.device)  # compiles it now, before the first request waits for it
        while self.capture_next() and not only_largest:
            pass

    def _free(self) -> int:
        return torch.cuda.mem_get_info(self._model.build.device)[0]

    @property
    def num_missing(self) -> int:
        return len(self._missing)

    def capture_next(self) -> bool:
        """Capture the largest graph that is missing. False: no other one is missing."""
        if self._missing:
            self.capture(self._missing[0])
        return bool(self._missing)

    def capture(self, graph: Graph) -> bool:
        """Capture a graph if it is missing. False: there is no memory for it, and all graphs that are missing are given up."""
        if graph.captured:
            return True
        try:
            with torch.inference_mode():
                graph.capture(self._pool)
        except torch.OutOfMemoryError as error:
            if self._pool is None or self._model.build.group.size > 1:  # the first one; other ranks have captured this one
                raise
            log.warning("no memory for %d of %s (%s): such steps run in larger graphs or eagerly, and slower", len(self._missing),
                        self._summary, error)
            self._missing = []
            for graphs in (self._decodes, self._sharing, self._mixed):
                graphs[:] = [graph for graph in graphs if graph.captured]
            return False
        self._pool = graph.pool
        self._missing.remove(graph)
        self.bytes_taken = self._free_before - self._free()
        if not self._missing:
            log.info("captured %s: %d MiB", self._summary, self.bytes_taken >> 20)
        return True

    def widened(self, c: Columns) -> Columns:
        """Decodes with different numbers of drafts, lengthened to one captured width. Other columns are returned as they are."""
        if not c.has_drafts or c.prompt_spans or c.pool_spans:
            return c
        longest = int(c.query_lens.max())
        width = next((width for width in self._widths if width >= longest), None)
        only_decodes = len(c.source) == len(c.token_index) and bool((c.rows[c.source] == c.sample_rows).all())
        first = c.positions[c.query_start[:-1]]
        if width is None or not only_decodes or (c.query_lens == width).all() or int(first.max()) + width > self._table.max_model_len:
            return c
        return c.widened(width, self._table.null_row * self._table.tokens.shape[1])

    def find(self, columns: Columns) -> Graph | None:
        """The smallest graph that holds a step; None: it runs eagerly."""
        if not columns.simple:
            return None
        n, tokens, longest, width, graphs = len(columns.rows), len(columns.token_index), 0, 1, self._mixed
        adapters = len(columns.adapter_slots) > 0
        if columns.num_decodes == n:
            graphs, longest, width = self._decodes, int(columns.seq_lens.max()), columns.query_width
            if not adapters and (n - 1) * columns.shared_keys * self._token_bytes >= tuning.MIN_SHARED_BYTES:
                graphs = self._sharing
        else:
            chunks = slice(columns.num_decodes, None)
            if flops_of_earlier_keys(self._model.spec, columns.query_lens[chunks], columns.seq_lens[chunks]) > tuning.LAUNCH_FLOPS / 2:
                return None  # a captured step reads earlier keys with a slower kernel, at half the speed of products at most
        return next((g for g in graphs if tokens <= g.shape.tokens and n <= g.shape.seqs and longest <= g.shape.longest
                     and width == g.shape.query_width and adapters == g.shape.adapters), None)


def graph_shapes(
    spec: ModelSpec, table: RowTable, max_num_seqs: int, max_num_batched_tokens: int, query_widths: Sequence[int],
) -> Iterator[GraphShape]:
    """The shapes to capture; mixed ones from the smallest to the largest. No shape has more than MAX_LOGITS_ROWS logits rows."""
    most, whole = min(max_num_seqs, tuning.DECODE_GRAPHS[-1]), table.max_model_len
    for width in (width for width in query_widths if width <= whole):  # no sequence is longer
        widest = min(most, MAX_LOGITS_ROWS // width)
        sizes = [size for size in tuning.DECODE_GRAPHS if size < widest] + [widest]
        for size in sizes:
            if size <= tuning.MAX_SHORT_DECODES and whole > tuning.SHORT_KEYS:
                yield GraphShape(size * width, size, size, tuning.SHORT_KEYS)
            yield GraphShape(size * width, size, size, whole)
        for size in sharing_sizes(widest, whole) if table.sharing else ():
            yield GraphShape(size * width, size, size, whole, True)
    for tokens, seqs in sorted({(tokens, min(seqs, most)) for tokens, seqs in mixed_shapes(spec, max_num_batched_tokens)}):
        yield GraphShape(tokens, seqs, 0, whole)
