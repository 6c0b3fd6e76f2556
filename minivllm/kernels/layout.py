"""One layout for all work: the tensors that a forward pass reads, whatever mix of prefill and decode it holds.

    tokens     | a a a a a a | b | c c c | d |      T tokens, sequence after sequence
    query_start  0             6   7       10  11    B + 1 offsets
    seq_lens     6             58  915     31        B: keys visible to each sequence's last query

The packer puts sequences with a single query (decodes) first, so kernels may treat [0, num_decodes) specially.
A *slot* is one token's place in the cache: block_id * block_size + offset.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SHARED_RUN = 128  # keys: a prefix that decodes share counts in whole runs


@dataclass(frozen=True, slots=True)
class KVLayer:
    """One layer's paged keys and values: [num_blocks, block_size, kv_heads, head_dim] each."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


@dataclass(frozen=True, slots=True)
class InputBatch:
    """Device tensors of one forward pass, and the few host integers that choose kernels without waiting for the device."""

    tokens: Tensor  # [T] int32
    positions: Tensor  # [T] int64
    query_start: Tensor  # [B + 1] int32
    seq_lens: Tensor  # [B] int32
    slots: tuple[Tensor, ...]  # [G] of [T] int64: where each token's key and value go
    block_tables: tuple[Tensor, ...]  # [G] of [B, M] int32; entries past a sequence's end are NULL_BLOCK
    logit_rows: Tensor  # [L] int64: which rows of the forward pass's result are projected to the vocabulary
    num_decodes: int  # the first this-many sequences have exactly one query
    query_lens_host: tuple[int, ...]  # [B]
    seq_lens_host: tuple[int, ...]  # [B]
    last_only: bool = False  # the result is wanted for each sequence's last token alone: [B, hidden] instead of [T, hidden]
    shared: Tensor | None = None  # [1] int32, for decodes only: so many leading keys of all sequences lie in the same blocks
    query_width: int = 1  # queries of a decode: its newest token and its drafts

    @property
    def num_tokens(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_seqs(self) -> int:
        return len(self.seq_lens_host)

    def last_tokens(self) -> tuple[Tensor, InputBatch]:
        """-> (which of the T rows are a sequence's last token: [B], a batch in which these are the only new ones)."""
        count, rows = self.num_seqs, self.query_start[1:] - 1
        start = torch.arange(count + 1, dtype=torch.int32, device=rows.device)
        return rows, replace(
            self, tokens=self.tokens.index_select(0, rows), positions=self.positions.index_select(0, rows), query_start=start,
            slots=tuple(slots.index_select(0, rows) for slots in self.slots), num_decodes=count, query_lens_host=(1,) * count)
