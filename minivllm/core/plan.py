"""The bridge between the planes: a `StepPlan` goes down, a `StepResult` comes up, and nothing else crosses.

A plan is a few columns, one entry per scheduled request, so its cost does not grow with a request's history: what a worker
already knows is never sent again. Everything a worker holds (its row table) can be rebuilt from plans alone, because a
(re)admission carries the whole request.

    request        a    b    c            a: a prompt chunk, not at its end yet
    rows           4    0    2            b: a decode
    starts         0   57  912            c: a decode whose last token the GPU has only just sampled: the plan names
    num_tokens   256    1    1               its position, the worker takes the value from its own token table
    samples             b -> row 0, c -> row 2
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from minivllm.sampling_params import SamplingParams

BlockId: TypeAlias = int
NULL_BLOCK: BlockId = 0  # never allocated: padded rows write here, and freed window blocks point here


@dataclass(frozen=True, slots=True)
class RowAdmission:
    """Everything a worker must know about a request, sent when it takes a row: once, and again after each preemption."""

    row: int
    request_id: str  # of this sequence; children of one request differ (see core.request)
    token_ids: tuple[int, ...]  # prompt and outputs known so far
    num_prompt_tokens: int
    block_ids: tuple[tuple[BlockId, ...], ...]  # [G][blocks] logical -> physical, this step's included
    params: SamplingParams
    seed: int  # 64 bits; drawn by the engine when the user gave none
    child_index: int  # 0..n-1, the second word of the noise counter
    prompt_logprobs_from: int | None = None  # first prompt position whose logprobs are still owed; None: none are


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy-on-write: before anything is written, block `dst` becomes a copy of block `src`, in all its tensors.

    The copy is made for one row that is about to write: entry `index` of that row's table of group `group` now names `dst`.
    """

    src: BlockId
    dst: BlockId
    row: int
    group: int
    index: int


@dataclass(frozen=True, slots=True)
class BlockMove:
    """One block to or from host memory. The device (or host) side is reusable only once `move_id` is reported finished."""

    move_id: int
    device_block: BlockId
    host_block: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one engine step computes. Order inside a step: copy out, copy in, copy-on-write, KV write.

    Rows are told about in this order: `admitted` (whose tables are complete, so their `new_blocks` are empty), `freed_blocks`,
    `copies`, `new_blocks`. A row that is admitted again while it is held starts afresh from what the admission says.
    A plan may hold no request at all: then it only carries moves, or, with no moves either, waits for one to finish.
    """

    step_id: int
    # One entry per scheduled request; [S] below.
    request_ids: tuple[str, ...]
    rows: tuple[int, ...]
    starts: tuple[int, ...]  # position of the first token computed
    num_tokens: tuple[int, ...]  # >= 1; includes drafts
    new_blocks: tuple[tuple[tuple[BlockId, ...], ...], ...]  # [S][G] physical blocks appended to the row's tables
    drafts: tuple[tuple[int, ...], ...]  # [S] tokens guessed past the last known one, to verify; () for most
    # One entry per token to sample; usually one per request whose last known token is computed in this step.
    sample_from: tuple[int, ...]  # index into the columns above: whose last position's logits
    sample_rows: tuple[int, ...]  # the row that receives the token; several rows may draw from one request's logits
    sample_ids: tuple[str, ...]  # the sequence that row belongs to
    admitted: tuple[RowAdmission, ...] = ()  # applied before anything else
    freed_blocks: tuple[tuple[int, int, int], ...] = ()  # (row, group, logical index): now outside the window, entry is NULL_BLOCK
    copies: tuple[BlockCopy, ...] = ()
    moves_out: tuple[BlockMove, ...] = ()
    moves_in: tuple[BlockMove, ...] = ()

    @property
    def total_tokens(self) -> int:
        return sum(self.num_tokens)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: the chosen token's, its rank (1 = most probable), and the top k."""

    token_id: int
    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step produced, in the order of the plan's `sample_rows`."""

    step_id: int
    token_ids: tuple[tuple[int, ...], ...]  # one token per sample; more when drafts were accepted
    logprobs: tuple[tuple[TokenLogprobs, ...] | None, ...] = ()  # () when no sample asked for any
    prompt_logprobs: tuple[tuple[int, int, tuple[TokenLogprobs, ...]], ...] = ()  # (index of request, position of the first, entries)
    finished_moves: tuple[int, ...] = ()
    drafts: tuple[tuple[int, ...], ...] = ()  # per sample: tokens proposed for the next step
    error: str | None = None  # the step failed: nothing in it may be confirmed


@dataclass(frozen=True, slots=True)
class Stop:
    """The engine's verdict on one sample: it ends with this many of the result's tokens, because of what the core cannot see.

    `matched` is the stop string that was found; None: the output's grammar is complete.
    """

    keep: int
    matched: str | None
