"""CUDA graphs: a small step's hundreds of kernel launches, recorded once and replayed with one call.

At small batch sizes a step is a chain of kernels of a few microseconds each, and launching them from Python takes longer than
running them. A graph fixes everything that is not data: the numbers of tokens and sequences, the kernels' grids, the addresses.
So there is one per shape out of a short list, captured at start-up; a batch is padded to the next shape.

    shapes           decodes only: as many tokens as sequences;  mixed: prompt chunks and decodes

    batch of 5       a b c d e           one copy into the static inputs of size 8
    static inputs    a b c d e R R R     padding: the null row, whose one token at position 0 lies in the null block

A graph goes all the way from the token table and back: take in what changed in the block tables, gather the newest tokens, the
model, logits of each sequence's last token, a plain draw from them (greedy or with a temperature), the drawn tokens into the
table. So the next step can follow without the host knowing a token, and between two decode steps the host launches nothing
else. Where a row asks for more than a plain draw, the sampler draws again from the same logits.

What a graph needs to be told stays on the device (rows, positions, lengths, slots, block tables); grids depend on the shape
alone, since the attention is prepared for sequences of the greatest length. Few decodes have two graphs each, for short and for
long sequences, whose attention shares keys out differently; some sizes have one more, for sequences that begin with the same
blocks, which reads those once for all. Larger steps run eagerly: they are bound by arithmetic, and Python launches while the GPU
computes.

Graphs never run at once, so all share one pool of memory, and one place for logits: a step's are gone with the next step.
"""
from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minivllm.core.plan import NULL_BLOCK
from minivllm.families import ModelSpec, linear_specs
from minivllm.kernels.layout import SHARED_RUN, InputBatch
from minivllm.kernels.upload import StaticColumns
from minivllm.models.decoder import Decoder
from minivllm.worker.batch import LAST_ONLY, SHARERS, Columns, RowTable
from minivllm.worker.kv_cache import KVCache

log = logging.getLogger(__name__)

DECODES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
MIXED = ((64, 16), (128, 16), (128, 64), (256, 16), (256, 128), (512, 16), (512, 128), (512, 256))  # tokens, sequences
FEW, SHORT = 128, 512  # up to so many decodes of up to so many keys have graphs of their own: no more keys than attention's LONG
SHARING = (16, 32, 64, 96, 128, 192, 256)  # decodes that may share a prefix
WORTH_SHARING = 32 << 20  # bytes of keys and values of a layer that need not be read again, to be worth a kernel more in each layer
LARGE = (768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)  # tokens of mixed steps of small models
LAUNCH_FLOPS = 3e12  # what an H200 computes in the 5 to 10 ms that launching a step from Python takes
Array = np.ndarray[Any, Any]


def mixed_shapes(spec: ModelSpec, max_num_batched_tokens: int) -> tuple[tuple[int, int], ...]:
    """(tokens, sequences) of the mixed steps to capture: larger ones the smaller the model is."""
    weights = sum(sum(linear.rows) * linear.cols for name, linear in linear_specs(spec).items() if name.startswith("layers."))
    most = min(max_num_batched_tokens, LAUNCH_FLOPS / (2 * weights))
    return (*MIXED, *((tokens, DECODES[-1]) for tokens in LARGE if tokens <= most))


def sharing_sizes(max_num_seqs: int, max_model_len: int) -> tuple[int, ...]:
    """Numbers of decodes of the graphs that read a shared prefix once, if the model has layers that read all keys."""
    if max_num_seqs < SHARERS or max_model_len <= SHARED_RUN:
        return ()
    most = min(max_num_seqs, DECODES[-1])
    return (*(size for size in SHARING if size < most), most)


def graph_bytes(spec: ModelSpec, max_num_seqs: int, max_num_batched_tokens: int) -> int:
    """What to set aside for all graphs, in bytes; how much they took is in the log. They share the memory of the largest."""
    rows, tokens = min(max_num_seqs, DECODES[-1]), mixed_shapes(spec, max_num_batched_tokens)[-1][0]
    widest = max(layer.mlp.intermediate_size for layer in spec.layers)
    return (128 << 20) + rows * spec.vocab_size * 2 + tokens * (32 * spec.hidden_size + 8 * widest)


class Shape(NamedTuple):
    """What a graph fixes."""

    tokens: int  # T
    seqs: int  # B
    decodes: int  # the first so many sequences have one token each: all, or none in particular
    longest: int  # the most keys of a sequence, by which the attention decides how many programs share them
    sharing: bool = False  # the keys that all decodes have in common are read once


class Graph:
    """One shape: its static inputs, the recorded step, its static outputs."""

    def __init__(self, shape: Shape, model: Decoder, kv: KVCache, table: RowTable, pool: Any) -> None:
        self._model, self._kv, self._table, self.shape = model, kv, table, shape
        tokens, seqs, decodes = shape[:3]
        null, max_model_len = table.null_row, table.tokens.shape[1]
        by_token = [np.full(tokens, null * max_model_len), np.zeros(tokens, np.int64),
                    *(np.full(tokens, NULL_BLOCK * kv.layout.block_size) for _ in kv.layout.groups)]  # fmt: skip
        # Decodes are padded with one token each, mixed steps with sequences that have none: only the first, never padding, has one.
        query_start = np.minimum(np.arange(seqs + 1), max(decodes, 1)).astype(np.int32)
        by_seq = [np.full(seqs, null), np.diff(query_start), np.full(seqs, null * max_model_len + 1),
                  np.zeros(seqs, np.float32), np.zeros((seqs, 2), np.int32)]  # fmt: skip
        # Changes of block tables that a replay takes in: what decodes and prompts need, not a long row that is written anew.
        self.max_changes = (2 * seqs + tokens // kv.layout.block_size) * len(kv.layout.groups)
        changes = [np.full(self.max_changes, null * table.device_tables.shape[2]), np.full(self.max_changes, NULL_BLOCK, np.int32)]
        self._empty = [np.zeros(1, np.int32), query_start, *by_seq, *changes, *by_token]
        self._inputs = StaticColumns(self._empty, model.build.device)
        self._record(pool)

    def _record(self, pool: Any) -> None:
        self._step()  # compiles kernels and fills their caches, which a capture must not do
        torch.cuda.synchronize(self._model.build.device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            logits, self._drawn = self._step()  # [B, V] in the model's dtype, [B] int64
        self._logits = _unowned(logits)

    def _run(self) -> None:
        self._graph.replay()

    @property
    def pool(self) -> Any:
        """The memory that its intermediate values and its logits live in; graphs that never run at once may share it."""
        return self._graph.pool()

    def _step(self) -> tuple[Tensor, Tensor]:
        (shared, query_start, rows, seq_lens, sample_places, temperature, keys, changed, new_blocks, places, positions,
         *slots) = self._inputs.tensors
        shape = self.shape
        tokens = self._table.tokens.view(-1)
        self._table.device_tables.view(-1).index_copy_(0, changed, new_blocks)
        chunk = shape.tokens // shape.seqs
        lens = (chunk + shape.tokens % shape.seqs, *(chunk,) * (shape.seqs - 1))  # whatever they are: only their sum counts
        batch = InputBatch(
            tokens=tokens.index_select(0, places), positions=positions, query_start=query_start, seq_lens=seq_lens, slots=tuple(slots),
            block_tables=tuple(table.index_select(0, rows) for table in self._table.device_tables), logit_rows=rows,
            num_decodes=shape.decodes, query_lens_host=lens, seq_lens_host=(shape.longest,) * shape.seqs,
            last_only=shape.tokens - shape.seqs >= LAST_ONLY, shared=shared if shape.sharing else None,
        )
        hidden = self._model.forward(batch, self._kv.layers, self._kv.layout.block_size)
        if len(hidden) > shape.seqs:
            hidden = hidden.index_select(0, query_start[1:] - 1)
        logits = self._model.logits(hidden, dtype=None)
        drawn = self._model.build.ops.sample(logits, temperature, keys)
        tokens.index_copy_(0, sample_places, drawn.to(torch.int32))
        return logits, drawn

    def replay(self, c: Columns, changes: tuple[Array, Array], temperature: Array, keys: Array) -> tuple[Tensor, Tensor]:
        """Logits [n, V] in the model's dtype and drawn tokens [n] int64, valid until the next step. changes: see `RowTable`."""
        n = len(c.rows)
        sample_places = self._empty[4][:n].copy()
        sample_places[c.source] = c.sample_places
        by_seq = [c.rows, c.seq_lens, sample_places, temperature, keys]
        columns = [np.array([c.shared_keys]), c.query_start, *by_seq, *changes, c.places, c.positions, *c.slots]
        padded = []
        for column, empty in zip(columns, self._empty, strict=True):
            if len(column) < len(empty):
                whole = empty.copy()
                whole[: len(column)] = column
            else:
                whole = column.astype(empty.dtype, copy=False)
            padded.append(whole)
        if not self.shape.decodes:
            padded[1][n:] = c.query_start[-1]
        self._inputs.fill(padded)
        self._run()
        return self._logits[:n], self._drawn[:n]


class _Memory:
    """Device memory for `torch.as_tensor`, by the CUDA array interface."""

    def __init__(self, tensor: Tensor) -> None:
        kind = {2: "<i2", 4: "<i4"}[tensor.element_size()]  # the interface has no bfloat16
        self.__cuda_array_interface__ = {"shape": tuple(tensor.shape), "typestr": kind, "data": (tensor.data_ptr(), False), "version": 3}


def _unowned(tensor: Tensor) -> Tensor:
    """The same memory, which is free for others once `tensor` is gone: graphs that never run at once need only one place for logits.

    Whoever reads it must have asked the stream to before the next replay, and the graphs' pool must be alive."""
    same = torch.as_tensor(_Memory(tensor), device=tensor.device).view(tensor.dtype)
    assert tensor.is_contiguous() and same.data_ptr() == tensor.data_ptr()
    return same


class StepGraphs:
    """All graphs of a runner, captured largest first so that they share memory."""

    def __init__(self, model: Decoder, kv: KVCache, table: RowTable, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        most = min(max_num_seqs, DECODES[-1])
        sizes = [size for size in DECODES if size < most] + [most]
        mixed = mixed_shapes(model.spec, max_num_batched_tokens)
        whole = table.tokens.shape[1]
        shapes = [Shape(size, size, size, SHORT) for size in sizes if size <= FEW and whole > SHORT]
        shapes += [Shape(size, size, size, whole) for size in sizes]
        shapes += [Shape(size, size, size, whole, True) for size in sharing_sizes(most, whole) if table.sharing]
        shapes += [Shape(t, b, 0, whole) for t, b in sorted({(t, min(b, most)) for t, b in mixed})]
        graphs: dict[Shape, Graph] = {}
        pool = None
        free_before = torch.cuda.mem_get_info(model.build.device)[0]
        with torch.inference_mode():
            for shape in sorted(shapes, reverse=True):
                graphs[shape] = Graph(shape, model, kv, table, pool)
                pool = graphs[shape].pool
        by_size = [graphs[shape] for shape in sorted(shapes, key=lambda shape: (shape.seqs, shape.longest))]
        self._decodes = [graph for graph in by_size if graph.shape.decodes and not graph.shape.sharing]
        self._sharing = [graph for graph in by_size if graph.shape.sharing]
        self._mixed = [graphs[shape] for shape in shapes if not shape.decodes]
        self._key_bytes = kv.layout.token_bytes
        self.bytes_taken = free_before - torch.cuda.mem_get_info(model.build.device)[0]
        model.build.ops.before_replays(model.build.device)  # compiled now rather than while the first request waits
        log.info("captured %d CUDA graphs of up to %d decodes or %d tokens: %d MiB", len(graphs), most,
                 max((shape.tokens for shape in shapes if not shape.decodes), default=0), self.bytes_taken >> 20)

    def find(self, columns: Columns) -> Graph | None:
        """The smallest graph that a step fits into; None: it runs eagerly."""
        if not columns.simple:
            return None
        n, tokens, longest, graphs = len(columns.rows), len(columns.places), 0, self._mixed
        if columns.num_decodes == n:
            graphs, longest = self._decodes, int(columns.seq_lens.max())
            if (n - 1) * columns.shared_keys * self._key_bytes >= WORTH_SHARING:
                graphs = self._sharing
        return next((g for g in graphs if tokens <= g.shape.tokens and n <= g.shape.seqs and longest <= g.shape.longest), None)
