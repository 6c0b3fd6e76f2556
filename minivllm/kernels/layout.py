"""The tensors that a forward pass reads: one layout for any mix of prompt chunks and decodes.

    tokens     | a a | b b | c c c | d d d d |     T tokens, sequence after sequence
    query_start  0     2     4       7         11  B + 1 offsets
    seq_lens     58    915   31      4             B: number of keys that each sequence's last query sees, its own key included

Decodes come first, so that kernels can treat sequences [0, num_decodes) separately. Each of them has `query_width` queries: a sequence's
newest token and its drafts (here one draft). Without drafts the width is 1.

A *slot* is the memory of one token in the cache: block_id * block_size + offset.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVLayer:
    """One layer's paged keys and values: [num_blocks, block_size, kv_heads, head_dim] each.

    Quantized ones (fp8 or int8) are multiplied by a scale per token and KV head.
    """

    k: Tensor
    v: Tensor
    # [num_blocks, block_size, kv_heads, 2] bfloat16: of the key, and of the value. A GPU copies both, four bytes, ahead of their use.
    scales: Tensor | None = None

    @property
    def k_scale(self) -> Tensor | None:
        """[num_blocks, block_size, kv_heads]"""
        return None if self.scales is None else self.scales[..., 0]

    @property
    def v_scale(self) -> Tensor | None:
        """[num_blocks, block_size, kv_heads]"""
        return None if self.scales is None else self.scales[..., 1]


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """One linear layer's LoRA weights in S slots: y += (x A^T) B^T, with an adapter's scaling inside B. Unused rows are zero."""

    a: Tensor  # [S, parts * R, K]: R rows for each part of a fused layer
    b: Tensor  # [S, N, R]: the outputs of a part use that part's R rows of A
    rows: tuple[int, ...]  # outputs of each part; their sum is N

    @property
    def rank(self) -> int:
        """R, the largest rank of an adapter."""
        return self.b.shape[2]


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The experts of one layer: E gated MLPs with I inner numbers."""

    gate_up: Tensor  # [E, 2 I, H]: rows | gate | up |
    down: Tensor  # [E, H, I]
    gate_up_bias: Tensor | None = None  # [E, 2 I]
    down_bias: Tensor | None = None  # [E, H]
    clamp: tuple[float, float] | None = None  # see `MoESpec`


@dataclass(frozen=True, slots=True)
class InputBatch:
    """Device tensors of one forward pass, and the host integers that choose kernels without waiting for the device."""

    tokens: Tensor  # [T] int32
    positions: Tensor  # [T] int64
    query_start: Tensor  # [B + 1] int32
    seq_lens: Tensor  # [B] int32
    slots: tuple[Tensor, ...]  # [G] of [T] int64: where each token's key and value are written
    block_tables: tuple[Tensor, ...]  # [G] of [B, M] int32; entries past a sequence's end are NULL_BLOCK
    logit_rows: Tensor  # [L] int64: rows of the hidden states from which logits are computed
    num_decodes: int  # the first num_decodes sequences have query_width queries each
    query_lens_host: tuple[int, ...]  # [B]
    seq_lens_host: tuple[int, ...]  # [B]
    last_only: bool = False  # hidden states are needed for the rows of `last_tokens` only
    shared: Tensor | None = None  # [1] int32, if all sequences are decodes: number of leading keys that they have in the same blocks
    query_width: int = 1  # queries of a decode: its newest token and its drafts
    captured: bool = False  # as part of a CUDA graph: of the host's integers only sums and maxima mean anything
    adapter_slots: Tensor | None = None  # [T] int32: the slot of each token's LoRA adapter, -1 for the base model. None: all are base

    @property
    def num_tokens(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_seqs(self) -> int:
        return len(self.seq_lens_host)

    @property
    def num_decode_tokens(self) -> int:
        """The first num_decode_tokens rows of the forward pass belong to decodes."""
        return self.num_decodes * self.query_width

    def last_tokens(self) -> tuple[Tensor, InputBatch]:
        """-> (rows of the T tokens that may have logits: [R], a batch of these tokens alone).

        These are all tokens of the decodes and the last token of each other sequence, in the order of the batch. With one query per
        decode, row b is the last token of sequence b, and every sequence of the new batch is a decode.
        """
        decode_tokens, device = self.num_decode_tokens, self.query_start.device
        rows = self.query_start[1:] - 1
        query_lens, start = (1,) * self.num_seqs, torch.arange(self.num_seqs + 1, dtype=torch.int32, device=device)
        if self.query_width > 1:
            rows = torch.cat((torch.arange(decode_tokens, dtype=torch.int32, device=device), rows[self.num_decodes :]))
            query_lens = ((self.query_width,) * self.num_decodes) + query_lens[self.num_decodes :]
            start = torch.cat((self.query_start[: self.num_decodes], start[: len(start) - self.num_decodes] + decode_tokens))
        return rows, replace(
            self, tokens=self.tokens.index_select(0, rows), positions=self.positions.index_select(0, rows), query_start=start,
            slots=tuple(slots.index_select(0, rows) for slots in self.slots), query_lens_host=query_lens,
            adapter_slots=None if self.adapter_slots is None else self.adapter_slots.index_select(0, rows),
            num_decodes=self.num_seqs if self.query_width == 1 else self.num_decodes)
