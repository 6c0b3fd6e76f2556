"""CUDA graphs: a decode step's hundreds of kernel launches, recorded once and replayed with one call.

At small batch sizes a decode step is a chain of kernels of a few microseconds each, and launching them from Python takes longer
than running them. A graph fixes everything that is not data: the number of sequences, the kernels' grids, the addresses.
So there is one per batch size out of a short list, captured at start-up; a batch is padded to the next size.

    batch of 5       a b c d e           copied into the static tensors of size 8
    static tensors   a b c d e . . .     padding: one query at position 0, whose key goes to the null block

What a graph needs to be told stays on the device (tokens, positions, lengths, slots, block tables); grids depend on the size
alone, since the attention is prepared for sequences of the greatest length. Steps with prompt chunks run eagerly: they have
tokens enough to keep the GPU busy while Python launches.
"""
from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minivllm.core.plan import NULL_BLOCK
from minivllm.kernels.layout import InputBatch
from minivllm.models.decoder import Decoder
from minivllm.worker.kv_cache import KVCache

log = logging.getLogger(__name__)

GRAPH_BYTES = 256 << 20  # set aside for all of them; how much they took is in the log
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)


class Graph:
    """One batch size: its static inputs, the recorded step, its static output."""

    def __init__(self, size: int, model: Decoder, kv: KVCache, max_model_len: int, pool: Any) -> None:
        device, groups, block_size = model.build.device, len(kv.shape.groups), kv.shape.block_size

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        width = -(-max_model_len // block_size)
        self._batch = InputBatch(
            tokens=zeros(size),
            positions=zeros(size, dtype=torch.int64),
            query_start=torch.arange(size + 1, dtype=torch.int32, device=device),
            seq_lens=torch.ones(size, dtype=torch.int32, device=device),
            slots=tuple(zeros(size, dtype=torch.int64) for _ in range(groups)),
            block_tables=tuple(zeros(size, width) for _ in range(groups)),
            logit_rows=zeros(0, dtype=torch.int64),
            num_decodes=size,
            query_lens_host=(1,) * size,
            seq_lens_host=(max_model_len,) * size,
        )
        self._filled = 0  # leading entries that hold sequences
        self._model, self._kv = model, kv
        self._step()  # compiles kernels and fills their caches, which a capture must not do
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self.hidden = self._step()  # [size, hidden]

    @property
    def pool(self) -> Any:
        """The memory that its intermediate values live in; graphs that never run at once may share it."""
        return self._graph.pool()

    def _step(self) -> Tensor:
        return self._model.forward(self._batch, self._kv.layers, self._kv.shape.block_size)

    def replay(self, batch: InputBatch) -> Tensor:
        """-> hidden states [n, hidden], valid until the next replay of this size."""
        n, static = batch.num_seqs, self._batch
        static.tokens[:n] = batch.tokens
        static.positions[:n] = batch.positions
        static.seq_lens[:n] = batch.seq_lens
        for mine, theirs in zip(static.slots, batch.slots, strict=True):
            mine[:n] = theirs
        for mine, theirs in zip(static.block_tables, batch.block_tables, strict=True):
            mine[:n, : theirs.shape[1]] = theirs  # what lies beyond a sequence's end is never read
        if n < self._filled:  # what an earlier, larger batch left must not be written through
            static.positions[n : self._filled] = 0
            static.seq_lens[n : self._filled] = 1
            for mine in (*static.slots, *(table[:, :1] for table in static.block_tables)):
                mine[n : self._filled] = NULL_BLOCK
        self._filled = n
        self._graph.replay()
        return self.hidden[:n]


class DecodeGraphs:
    """Graphs for batches of decodes of up to `max_num_seqs` sequences, captured largest first so that they share memory."""

    def __init__(self, model: Decoder, kv: KVCache, max_num_seqs: int, max_model_len: int, sizes: Sequence[int] = SIZES) -> None:
        self._sizes = [size for size in sizes if size < max_num_seqs] + [min(max_num_seqs, max(sizes))]
        self._graphs: dict[int, Graph] = {}
        pool = None
        free_before = torch.cuda.mem_get_info(model.build.device)[0]
        with torch.inference_mode():
            for size in reversed(self._sizes):
                self._graphs[size] = Graph(size, model, kv, max_model_len, pool)
                pool = self._graphs[size].pool
        taken = free_before - torch.cuda.mem_get_info(model.build.device)[0]
        log.info("captured %d CUDA graphs for up to %d decodes: %d MiB", len(self._graphs), self._sizes[-1], taken >> 20)

    def covers(self, batch: InputBatch) -> bool:
        return batch.num_decodes == batch.num_seqs <= self._sizes[-1]

    def forward(self, batch: InputBatch) -> Tensor:
        """-> hidden states [n, hidden] of a batch that `covers` says yes to; valid until the next call."""
        return self._graphs[self._sizes[bisect_left(self._sizes, batch.num_seqs)]].replay(batch)
