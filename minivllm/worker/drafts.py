"""The proposer of a worker: after each step it gets the step's tokens, and its drafts go into the token table. Nothing waits for the host.

    sampled tokens ─▶ kept: how many of each sample's tokens count ─▶ lengths of the rows ─▶ ProposalInput ─▶ drafts ─▶ token table

The host plans the next step as if all drafts were accepted. `RowTable.lengths` says by how much a plan is ahead (`worker/batch.py`).
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivllm.kernels.upload import upload
from minivllm.sampling.sampler import Sampler
from minivllm.speculative.base import DeviceProposer, ProposalInput
from minivllm.worker.batch import Columns, Packed, RowTable
from minivllm.worker.kv_cache import KVCache

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Proposals:
    """What a step's verification and the proposer gave, on the device."""

    kept: Tensor  # [S] int64: number of tokens of each sample that count, at least 1
    drafts: Tensor  # [B, k] int64: proposals for each sequence of the batch
    own_sample: Array  # [B] the sample that they belong to; -1: none


class DraftRunner:
    """Calls a proposer after each step."""

    def __init__(self, proposer: DeviceProposer, kv: KVCache, rows: RowTable, sampler: Sampler) -> None:
        self.proposer = proposer
        self._kv, self._rows, self._sampler = kv, rows, sampler

    def verify(self, c: Columns, before: Tensor, sampled: Tensor, shift: Tensor) -> Tensor:
        """How many tokens of each sample count, and the rows' new lengths: before, sampled [L], the drafts and the tokens at their
        positions; shift [L] -> [S]."""
        d = c.drafting
        assert d is not None
        has_draft, sample_of_row, first, positions, rows = upload(
            [d.has_draft, d.sample_of_row, d.first_row, c.sample_positions[d.first_row], c.sample_rows[d.first_row]], sampled.device)
        wrong = (~(has_draft & (before == sampled))).long()
        earlier = wrong.cumsum(0) - wrong
        counts = (earlier == earlier[first][sample_of_row]).long()
        kept = torch.zeros_like(first).index_add_(0, sample_of_row, counts)
        self._rows.lengths.index_copy_(0, rows, positions - shift[first] + kept)
        return kept

    def propose(self, packed: Packed, hidden: Tensor, kept: Tensor) -> Proposals:
        """Drafts for the sequences of a step, also written to the token table."""
        c, batch, table = packed.columns, packed.batch, self._rows
        d = c.drafting
        assert d is not None
        rows, own, num_drafts, streams, temperature = upload(
            [c.rows, d.own_sample, d.num_drafts, self._sampler.streams(c.rows), self._sampler.temperatures(c.rows)], kept.device)
        has_sample = own >= 0
        count = torch.where(has_sample, kept[own.clamp_min(0)], 1) if len(kept) else torch.ones_like(own)
        last = batch.query_start[1:].long() - 1 - num_drafts + count - 1
        flat = table.tokens.view(-1)
        tokens_of = batch.query_start.diff()
        source = torch.repeat_interleave(torch.arange(len(tokens_of), device=kept.device), tokens_of, output_size=batch.num_tokens)
        after = (rows[source] * table.tokens.shape[1] + batch.positions + 1).clamp_max(len(flat) - 1)
        next_tokens = flat[after].long()
        lengths = batch.positions[last] + 2
        found = self.proposer.propose(ProposalInput(
            batch, next_tokens, last, next_tokens[last], lengths, hidden if self.proposer.needs_hidden else None, self._kv.layers,
            self._kv.layout.block_size, temperature, streams))
        table.write_drafts(torch.where(has_sample, rows, table.null_row), lengths, found.tokens)
        if found.probs is not None and self._sampler.draft_probs is not None:
            probabilities = self._sampler.draft_probs
            probabilities.store(torch.where(has_sample, rows, probabilities.num_rows), lengths, found.probs)
        return Proposals(kept, found.tokens, d.own_sample)


def drafts_of_samples(proposed: list[list[int]], own_sample: Array, num_samples: int) -> tuple[tuple[int, ...], ...]:
    """The drafts of each sample; () for a fork, whose row has none yet."""
    drafts: list[tuple[int, ...]] = [()] * num_samples
    for tokens, sample in zip(proposed, own_sample.tolist(), strict=True):
        if sample >= 0:
            drafts[sample] = tuple(tokens)
    return tuple(drafts)
