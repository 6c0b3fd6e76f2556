"""The proposer of a worker: after each step it gets the step's tokens, and its drafts go into the token table. Nothing waits for the host.

    sampled tokens ─▶ kept: how many of each sample's tokens count ─▶ lengths of the rows ─▶ ProposalInput ─▶ drafts ─▶ token table

The host plans the next step as if all drafts were accepted. `RowTable.lengths` says by how much a plan is ahead (`worker/batch.py`).
"""
from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivllm.kernels import Ops
from minivllm.kernels.layout import InputBatch
from minivllm.kernels.upload import upload
from minivllm.sampling.sampler import Sampler
from minivllm.speculative.base import DeviceProposer, ProposalInput
from minivllm.worker.batch import Columns, Packed, RowTable
from minivllm.worker.kv_cache import KVCache

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Proposals:
    """What a step's verification and the proposer gave, on the device."""

    kept: Tensor  # [B] int64: number of tokens of each sequence's own sample that count, at least 1
    drafts: Tensor  # [B, k] int64: proposals for each sequence of the batch; -1: none
    own_sample: Array  # [B] the sample that they belong to; -1: none

    def on_host(self, kept: list[int], drafts: list[list[int]], num_samples: int) -> tuple[list[int], tuple[tuple[int, ...], ...]]:
        """(number of tokens of each sample that count, drafts of each sample), from copies of the tensors. A fork has no drafts yet."""
        counts = [1] * num_samples
        found: list[tuple[int, ...]] = [()] * num_samples
        for sample, count, tokens in zip(self.own_sample.tolist(), kept, drafts, strict=True):
            if sample >= 0:
                counts[sample], found[sample] = count, tuple(takewhile(lambda token: token >= 0, tokens))
        return counts, tuple(found)


class DraftRunner:
    """Calls a proposer after each step."""

    def __init__(self, proposer: DeviceProposer, kv: KVCache, rows: RowTable, sampler: Sampler, ops: Ops, most_seqs: int) -> None:
        """most_seqs: in larger steps nothing is proposed. The proposer's keys and values of their tokens are missing later, so drafts
        of these sequences are worse then."""
        self.proposer, self._most_seqs = proposer, most_seqs
        self._kv, self._rows, self._sampler, self._ops = kv, rows, sampler, ops

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

    def count(self, c: Columns, kept: Tensor) -> Tensor:
        """kept [S] -> the same by sequence: [B] int64; 1 for a sequence that does not sample."""
        assert c.drafting is not None
        (own,) = upload([c.drafting.own_sample], kept.device)
        return torch.where(own >= 0, kept[own.clamp_min(0)], 1) if len(kept) else torch.ones_like(own)

    def proposes(self, num_seqs: int) -> bool:
        """Whether the proposer runs after a step of so many sequences."""
        return num_seqs <= self._most_seqs

    def propose(self, packed: Packed, hidden: Tensor, kept: Tensor, proposes: bool) -> Proposals:
        """Drafts for the sequences of a step. hidden: of all T tokens, if the proposer needs them; kept [B]; proposes: of the plan."""
        c, batch = packed.columns, packed.batch
        d = c.drafting
        assert d is not None
        if not self.proposes(len(c.rows)) or not (proposes or self.proposer.stores):
            return Proposals(kept, kept.new_empty((len(kept), 0)), d.own_sample)
        rows, known_ends, num_drafts, streams, temperature = upload(
            [c.rows, d.known_ends, d.num_drafts, self._sampler.streams(c.rows), self._sampler.temperatures(c.rows)], kept.device)
        last = batch.query_start[1:].long() - 1 - num_drafts + kept - 1
        (token_source,) = upload([d.token_source], kept.device)
        x = self.proposal_input(batch, hidden, rows, token_source, last, temperature, streams)
        if not proposes:
            self.proposer.store(x)
            return Proposals(kept, kept.new_empty((len(kept), 0)), d.own_sample)
        return Proposals(kept, self.propose_on_device(x, known_ends), d.own_sample)

    def proposal_input(self, batch: InputBatch, hidden: Tensor, rows: Tensor, token_source: Tensor, last: Tensor, temperature: Tensor,
                       streams: Tensor) -> ProposalInput:
        """It can be captured. rows [B]; token_source [T]: the sequence of each token; see `ProposalInput` for the other arguments."""
        text = self._rows.tokens
        next_tokens, newest, lengths = self._ops.proposer_inputs(text, rows, token_source, batch.positions, last)
        return ProposalInput(
            batch, next_tokens, last, newest, lengths, hidden if self.proposer.needs_hidden else None, self._kv.layers,
            self._kv.layout.block_size, temperature, streams, text, rows)

    def propose_on_device(self, x: ProposalInput, known_ends: Tensor) -> Tensor:
        """The drafts [B, k], also written to the token table. It can be captured.

        known_ends [B]: -1 for a sequence without a sample, which keeps its prompt.
        """
        found = self.proposer.propose(x)
        self._ops.write_drafts(x.text, x.rows, known_ends, x.lengths, found.tokens, self._rows.max_model_len)
        probabilities = self._sampler.draft_probs
        if found.probs is not None and probabilities is not None:
            probabilities.store(torch.where(known_ends >= 0, x.rows, probabilities.num_rows), x.lengths, found.probs)
        return found.tokens
