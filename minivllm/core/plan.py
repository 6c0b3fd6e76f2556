"""The bridge between control plane and data plane: a `StepPlan` goes to the worker, a `StepResult` comes back.

A plan is a few columns with one entry per scheduled sequence. It contains only what the worker does not have yet, so its size does
not grow with a sequence's history. The worker's row table can be rebuilt from plans alone, because the admission of a row carries
the whole sequence.

    request        a    b    c            a: a prompt chunk that does not reach the end of the prompt
    rows           4    0    2            b: a decode
    starts         0   57  912            c: a decode whose last token may not be sampled yet: the plan gives its position,
    num_tokens   256    1    1               and the worker reads the value from its own token table
    samples             b -> row 0, c -> row 2
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from minivllm.sampling_params import SamplingParams

BlockId: TypeAlias = int
DEVICE_DRAFT = -1  # in a plan's drafts: the draft that the worker itself proposed for this position
NULL_BLOCK: BlockId = 0  # never allocated: padded rows write here, and table entries outside a window point here


@dataclass(frozen=True, slots=True)
class RowAdmission:
    """The whole state of one row. Sent when a sequence gets a row, and again if the worker has lost its rows."""

    row: int
    request_id: str  # id of the sequence; children of one request have different ids (see core.request)
    token_ids: tuple[int, ...]  # prompt and outputs known so far
    num_prompt_tokens: int
    block_ids: tuple[tuple[BlockId, ...], ...]  # [G][blocks] logical -> physical, including this step's new blocks
    params: SamplingParams
    seed: int  # 64 bits; chosen by the engine if the user gave none
    child_index: int  # 0..n-1, or above for forks of a beam search; the second word of the noise counter
    prompt_logprobs_from: int | None = None  # first prompt position whose logprobs are still to be returned; None: none are
    adapter_slot: int = -1  # slot of its LoRA adapter, as long as it has this row; -1: the base model


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy-on-write: before the step writes anything, block `src` is copied to block `dst`, in all KV tensors.

    Entry `index` of this row's table for KV group `group` changes from `src` to `dst`.
    """

    src: BlockId
    dst: BlockId
    row: int
    group: int
    index: int


@dataclass(frozen=True, slots=True)
class BlockMove:
    """One block copied to or from host memory. Neither block is allocated again before the worker reports `move_id` as finished."""

    move_id: int
    device_block: BlockId
    host_block: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one engine step computes. Order inside a step: adapters, moves out, moves in, copy-on-write, KV writes.

    The worker updates its rows in this order: `admitted`, `freed_blocks`, `copies`, `new_blocks`. An admission carries the row's
    complete tables, so the row's `new_blocks` entry is empty. It replaces anything the row held before.
    A plan without sequences carries moves, or makes the worker wait until a pending move is finished.
    """

    step_id: int
    # One entry per scheduled sequence; [S] below.
    request_ids: tuple[str, ...]
    rows: tuple[int, ...]
    starts: tuple[int, ...]  # position of the first token computed; an upper bound while drafts of the sequence are unverified
    num_tokens: tuple[int, ...]  # >= 1; includes drafts
    new_blocks: tuple[tuple[tuple[BlockId, ...], ...], ...]  # [S][G] physical blocks appended to the row's tables
    drafts: tuple[tuple[int, ...], ...]  # [S] guesses after the last known token, to verify; usually (). DEVICE_DRAFT: the worker's own
    # One entry per token to sample: usually one per sequence whose last known token is computed in this step.
    sample_from: tuple[int, ...]  # index into the columns above: the token is sampled from the logits at its last position
    sample_rows: tuple[int, ...]  # the row that receives the token; several rows may sample from the same logits
    sample_ids: tuple[str, ...]  # the sequence in that row
    admitted: tuple[RowAdmission, ...] = ()
    freed_blocks: tuple[tuple[int, int, int], ...] = ()  # (row, group, logical index): outside the window, the entry becomes NULL_BLOCK
    copies: tuple[BlockCopy, ...] = ()
    moves_out: tuple[BlockMove, ...] = ()
    moves_in: tuple[BlockMove, ...] = ()
    adapter_loads: tuple[tuple[int, int], ...] = ()  # (slot, adapter): LoRA adapters to bring into slots
    proposes: bool = True  # False: no sequence needs drafts after this step, so a worker with a proposer makes none

    @property
    def total_tokens(self) -> int:
        return sum(self.num_tokens)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probabilities at one position: the token's own, its rank (1: most probable), and those of the top k tokens."""

    token_id: int
    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step produced. Sampled tokens are in the order of the plan's `sample_rows`."""

    step_id: int
    token_ids: tuple[tuple[int, ...], ...]  # one token per sample; more when drafts were accepted
    logprobs: tuple[tuple[TokenLogprobs, ...] | None, ...] = ()  # () if no sample needs any
    prompt_logprobs: tuple[tuple[int, int, tuple[TokenLogprobs, ...]], ...] = ()  # (column, position of the first, entries)
    # Of requests with pooling: (column, first position, number of positions, float32 sum of their final hidden states)
    pooled: tuple[tuple[int, int, int, bytes], ...] = ()
    finished_moves: tuple[int, ...] = ()
    # Per sample: tokens proposed for the next step. None: the sequence continues without proposals, and needs none after later steps. ():
    # there are none now
    drafts: tuple[tuple[int, ...] | None, ...] = ()
    error: str | None = None  # the step failed: none of its tokens may be confirmed
    failed: tuple[tuple[str, str], ...] = ()  # (sequence id, error): rows that could not be prepared; their tokens mean nothing


@dataclass(frozen=True, slots=True)
class Stop:
    """A stop that the engine found and the core cannot see. The sequence keeps `keep` of the sample's tokens and finishes.

    `matched` is the stop string. None: the output's grammar is complete.
    """

    keep: int
    matched: str | None
