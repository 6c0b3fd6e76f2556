"""A request as it comes in, the sequences it becomes, and what `Scheduler.update` says about them.

A request with n = 3 becomes three sequences. The first computes the prompt; the others appear when the prompt's last token is
planned, as forks that share its blocks. Each has the counters that replace "prefill" and "decode":

    position   0 1 2 3 4 5 6 7 8 9 . . .
               [---tokens------]             known values: prompt and outputs
                               [p]           placeholders: launched plans will sample them
                                 [d d]       drafts: guesses to verify
               [computed ]                   keys and values confirmed by `update`
                          [in flight]        what launched plans will confirm
               [planned             ]        = computed + in flight
                                    [--]     left to plan = known + drafts - planned, where known = tokens + placeholders

A new prompt has much left to plan, a decode one token, a request whose next token is being sampled and that must see its value
first nothing; the scheduler asks no other question.
"""
from __future__ import annotations

import enum
from typing import NamedTuple

from minivllm.core.block_table import BlockTable
from minivllm.core.stopping import StopRule
from minivllm.engine_request import EngineRequest
from minivllm.outputs import FinishReason

NO_ROW = -1


class Progress(NamedTuple):
    """What one update did to one sequence: tokens it keeps, or how it ended, or both."""

    request_id: str
    index: int  # type: ignore[assignment]  # child, 0..n-1; forks of a beam search count on (hides tuple.index)
    sequence_id: str
    sample_index: int | None  # position in the plan's sample columns; None if it ended without a token
    token_ids: tuple[int, ...]  # kept tokens: what follows a stop is dropped
    finish_reason: FinishReason | None
    stop_reason: int | str | None  # the stop token id or the matched stop string; None for EOS
    num_cached_tokens: int  # prompt tokens that were found in the prefix cache
    num_preemptions: int
    first_scheduled_time: float | None


class State(enum.Enum):
    """Where a sequence is. Only RUNNING ones are planned; PREEMPTED and FINISHED ones hold their row until no plan names it."""

    WAITING = "waiting"  # in the queue, with no blocks
    SWAPPED = "swapped"  # in the queue, with its blocks in host memory
    RUNNING = "running"  # has a row and blocks
    PREEMPTED = "preempted"  # chosen to give way; goes back to the queue once its launched plans are updated
    FINISHED = "finished"


def sequence_id(request_id: str, index: int, n: int) -> str:
    """The name of one sequence of a request."""
    return request_id if n == 1 else f"{request_id}#{index}"


class Request:
    """A request under way: its sequences, and how many of its n are still to be forked."""

    __slots__ = ("new", "next_index", "num_unforked", "order", "root", "seed", "sequences", "stop_rule")

    def __init__(self, new: EngineRequest, seed: int, stop_rule: StopRule, order: tuple[int, int], root: bytes) -> None:
        self.new = new
        self.seed = seed  # 64 bits
        self.stop_rule = stop_rule
        self.order = order  # (priority or 0, arrival number)
        self.root = root  # parent digest of its first block
        self.sequences: list[Sequence] = []
        self.num_unforked = new.params.n - 1
        self.next_index = new.params.n  # for forks of a beam search

    @property
    def finished(self) -> bool:
        return self.num_unforked == 0 and all(s.state is State.FINISHED for s in self.sequences)


class Sequence:
    """One growing list of tokens. Mutated by the scheduler alone.

    Two thresholds keep the common case, one more token of a decode, down to a comparison each in `schedule` and `update`:
    below `plan_freely_until` (a position) the next token needs no block, no copy and no waiting; below `confirm_freely_until`
    (a count of computed tokens) its confirmation fills no block and reaches no limit. Whatever makes a sequence uncommon sets
    them to 0, which sends it through the functions that consider everything.
    """

    __slots__ = (
        "commits",
        "compute_limit",
        "confirm_freely_until",
        "digests",
        "drafts",
        "dropped",
        "first_scheduled_time",
        "host_blocks",
        "id",
        "index",
        "logprobs_owed_from",
        "max_tokens_total",
        "must_readmit",
        "num_cached_tokens",
        "num_committed",
        "num_computed",
        "num_known",
        "num_moves",
        "num_planned",
        "num_preemptions",
        "num_prompt_tokens",
        "order",
        "paused",
        "plan_freely_until",
        "request",
        "request_id",
        "row",
        "shares_tail",
        "state",
        "stop_ids",
        "table",
        "tokens",
        "waits_for_result",
    )

    def __init__(self, request: Request, index: int, tokens: list[int], max_tokens_total: int, table: BlockTable) -> None:
        new = request.new
        self.request = request
        self.request_id = new.request_id
        self.index = index
        self.id = sequence_id(new.request_id, index, max(new.params.n, index + 1))
        self.order = (*request.order, index)  # who goes first; a preempted sequence keeps its place
        self.tokens = tokens  # prompt and outputs
        self.num_prompt_tokens = len(new.prompt_token_ids)
        self.max_tokens_total = max_tokens_total  # it ends with this many tokens
        # The last token is never computed: nothing is sampled after it. (With max_tokens = 0 the prompt itself is the work.)
        self.compute_limit = max(max_tokens_total - 1, self.num_prompt_tokens)
        self.stop_ids = request.stop_rule.stop_ids

        self.num_computed = 0
        self.num_planned = 0
        self.num_known = len(tokens)
        self.drafts: tuple[int, ...] = ()

        self.state = State.WAITING
        self.row = NO_ROW
        self.table = table
        self.digests: list[bytes] = []  # of full blocks of tokens, as far as they were asked for
        self.num_committed = 0  # full blocks that were offered to the prefix cache
        self.commits = True  # False after the cache was reset under it
        self.shares_tail = False  # forked: its partly filled last block may have other owners
        self.dropped: list[tuple[int, int]] = []  # (group, logical index) that left the window; the worker is yet to be told
        self.host_blocks: list[list[int]] = []  # [G][blocks] while SWAPPED
        self.num_moves = 0  # moves out that it must wait for before it can come back
        self.must_readmit = False  # the worker's row is missing or wrong
        self.waits_for_result = new.params.structured_outputs is not None or new.beam_search
        self.paused = False  # a beam that has its token and waits for the choice
        wants_logprobs = new.params.prompt_logprobs is not None and index == 0
        self.logprobs_owed_from: int | None = 1 if wants_logprobs else None  # the first token has no predecessor

        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.first_scheduled_time: float | None = None
        self.plan_freely_until = 0
        self.confirm_freely_until = 0

    @property
    def num_in_flight(self) -> int:
        """Tokens that launched plans compute."""
        return self.num_planned - self.num_computed

    @property
    def num_placeholders(self) -> int:
        """Tokens that launched plans sample."""
        return self.num_known - len(self.tokens)

    @property
    def num_left_to_plan(self) -> int:
        """The one counter: how many tokens a plan could compute now."""
        return min(self.num_known + len(self.drafts), self.compute_limit) - self.num_planned

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    def reset_computed(self, num_computed: int) -> None:
        """Start again from here, with nothing in flight."""
        self.num_computed = self.num_planned = num_computed
        self.num_known = len(self.tokens)
        self.drafts = ()
        self.dropped.clear()
        self.shares_tail = False
        self.plan_freely_until = self.confirm_freely_until = 0

    def inherit_report(self, parent: Sequence) -> None:
        """A fork reports the prompt as its parent does."""
        self.num_cached_tokens, self.first_scheduled_time = parent.num_cached_tokens, parent.first_scheduled_time

    def progress(
        self, sample_index: int | None, token_ids: tuple[int, ...], finish_reason: FinishReason | None, stop_reason: int | str | None,
    ) -> Progress:
        return Progress(self.request_id, self.index, self.id, sample_index, token_ids, finish_reason, stop_reason,
                        self.num_cached_tokens, self.num_preemptions, self.first_scheduled_time)
