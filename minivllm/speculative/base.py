"""The interface of a proposer that runs on the device: a draft model or a learned head.

    target's step ─▶ tokens sampled, drafts verified ─▶ propose(ProposalInput) ─▶ DraftTokens ─▶ the token table, after the newest token

Everything stays on the device: the host does not know yet how many drafts were accepted. So `propose` reads no value on the host, and all
shapes follow from the shapes of its input. Then it can be captured into a CUDA graph.

A draft's keys and values are extra layers of the target's KV cache, in the same blocks. Every step passes all its tokens, to `propose` or,
while drafts do not pay, to `store`. So these layers are filled wherever the target's are. Prefix cache, preemption, copy-on-write and
offload then work without further code.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from minivllm.kernels.layout import InputBatch, KVLayer


@dataclass(frozen=True, slots=True)
class ProposalInput:
    """A step of the target after its tokens were sampled: B sequences, T tokens, in the batch's order."""

    batch: InputBatch  # with exact positions, lengths and slots on the device. Its host integers are upper bounds
    next_tokens: Tensor  # [T] int64: the token after each of the T tokens; undefined after a rejected draft
    last: Tensor  # [B] int64: index among the T tokens of each sequence's last token that was kept
    newest: Tensor  # [B] int64: the token after it, which this step sampled (or the prompt's next token, after a chunk)
    lengths: Tensor  # [B] int64: number of known tokens, the newest included. The first draft has this position
    hidden: Tensor | None  # [T, hidden] of the target before its final norm; None unless `needs_hidden`
    kv: Sequence[KVLayer]  # all layers of the KV cache: the target's, then the draft's
    block_size: int
    temperature: Tensor  # [B] float32; 0: greedy
    streams: Tensor  # [B] int64: of the noise
    text: Tensor  # [N, S] int32: the token table, which has the known tokens of every row
    rows: Tensor  # [B] int64: each sequence's row of it


@dataclass(frozen=True, slots=True)
class DraftTokens:
    """Proposals for the tokens after the newest one."""

    tokens: Tensor  # [B, k] int64; -1: no draft, nor any after it
    probs: Tensor | None = None  # [B, k, V] float32: the distributions that they were sampled from. None: they are the most probable tokens


class DeviceProposer(Protocol):
    """Proposes drafts on the device. Proposals for a sequence whose prompt is not computed yet are ignored."""

    num_drafts: int  # k
    needs_hidden: bool  # whether it reads the target's hidden states
    stores: bool  # whether it has keys and values, which every step must store

    def propose(self, x: ProposalInput) -> DraftTokens: ...
    def store(self, x: ProposalInput) -> None:
        """The keys and values of a step after which no drafts are needed, as `propose` stores them."""
