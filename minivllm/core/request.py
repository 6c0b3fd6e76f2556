"""A request as it arrives, the sequences it becomes, and what `Scheduler.update` reports about them.

A request with n = 3 becomes three sequences. The first one computes the prompt. The others are forked from it, sharing its blocks,
when the prompt's last token is planned. Counters replace the phases "prefill" and "decode":

    position   0 1 2 3 4 5 6 7 8 9 . . .
               [---tokens------]             known values: prompt and outputs
                               [p p p]       placeholders: tokens that launched plans will sample, if all their drafts are accepted
                                     [d d]   drafts: guesses to verify
               [computed ]                   keys and values confirmed by `update`
                          [in flight]        what launched plans compute
               [planned             ]        = computed + in flight
                                    [--]     left to plan = known + drafts - planned, where known = tokens + placeholders

A launched plan with k drafts counts as if all were accepted: it will sample 1 + k tokens. Its result says how many it sampled, and the
counts of planned and known tokens fall by the difference. A plan that was launched in between named later positions than it computed:
the worker knows the true ones (see `worker/batch.py`).

A new prompt has many tokens left to plan, and a decode has one. A sequence that needs the value of its next token before it continues
has 0 tokens left while that token is sampled. The scheduler needs no other distinction.
"""
from __future__ import annotations

import enum
from typing import NamedTuple

from minivllm.core.block_table import BlockTable
from minivllm.core.stopping import StopRule
from minivllm.engine_request import EngineRequest
from minivllm.outputs import FinishReason

NO_ROW = -1


class SequenceUpdate(NamedTuple):
    """What one step's result changed for one sequence: tokens it keeps, how it finished, or both."""

    request_id: str
    index: int  # type: ignore[assignment]  # child, 0..n-1; forks of a beam search continue the count (hides tuple.index)
    sequence_id: str
    sample_index: int | None  # position in the plan's sample columns; None if it finished without a token
    token_ids: tuple[int, ...]  # tokens that are kept: those after a stop are dropped
    finish_reason: FinishReason | None
    stop_reason: int | str | None  # the stop token id or the matched stop string; None for EOS
    num_cached_tokens: int  # prompt tokens found in the prefix cache
    num_preemptions: int
    first_scheduled_time: float | None


class SequenceStatus(enum.Enum):
    """Only RUNNING sequences are planned. PREEMPTED and FINISHED ones keep their row while a launched plan includes them."""

    WAITING = "waiting"  # in the queue, without blocks
    SWAPPED = "swapped"  # in the queue, with blocks in host memory
    RUNNING = "running"  # has a row and blocks
    PREEMPTED = "preempted"  # returns to the queue when the launched plans that include it are updated
    FINISHED = "finished"


def sequence_id(request_id: str, index: int, n: int) -> str:
    """The id of one sequence of a request."""
    return request_id if n == 1 else f"{request_id}#{index}"


class Request:
    """An unfinished request: its sequences, and how many of its n children are not forked yet."""

    __slots__ = (
        "new", "next_index", "num_rows", "num_unforked", "num_waiting", "order", "root_hash", "seed", "sequences", "stop_rule",
        "waiting",
    )

    def __init__(self, new: EngineRequest, seed: int, stop_rule: StopRule, order: tuple[float, int], root_hash: bytes) -> None:
        self.new = new
        self.seed = seed  # 64 bits
        self.stop_rule = stop_rule
        self.order = order  # (rank, arrival number)
        self.root_hash = root_hash  # parent hash of its first block
        self.sequences: list[Sequence] = []
        self.num_unforked = new.params.n - 1
        self.next_index = new.params.n  # for forks of a beam search
        self.num_rows = 0  # RUNNING sequences (`FairShare`)
        self.num_waiting = 0  # sequences in the waiting queue
        self.waiting: list[tuple[int, Sequence]] = []  # these as a heap, by child index

    @property
    def finished(self) -> bool:
        return self.num_unforked == 0 and all(s.status is SequenceStatus.FINISHED for s in self.sequences)


class Sequence:
    """One growing list of tokens. Only the scheduler changes it.

    Two limits keep the common case, one more token of a decode, down to one comparison each in `schedule` and `update`. A planned
    position below `fast_plan_limit` needs no block, no copy and no wait for a result. A computed count below `fast_confirm_limit`
    fills no block and reaches no length limit. Anything unusual about a sequence sets both to 0, which sends it through the
    functions that check everything.
    """

    __slots__ = (
        "awaits_drafts",
        "block_hashes",
        "cacheable",
        "compute_limit",
        "drafts",
        "dropped_entries",
        "fast_confirm_limit",
        "fast_plan_limit",
        "first_scheduled_time",
        "host_blocks",
        "id",
        "index",
        "max_tokens_total",
        "must_readmit",
        "num_cached_blocks",
        "num_cached_tokens",
        "num_computed",
        "num_guesses",
        "num_known",
        "num_moves_out",
        "num_passes",
        "num_planned",
        "num_preemptions",
        "num_prompt_tokens",
        "order",
        "paused",
        "prompt_logprobs_from",
        "request",
        "request_id",
        "row",
        "shares_last_block",
        "status",
        "stop_ids",
        "table",
        "tokens",
        "waits_for_result",
        "wants_drafts",
    )

    def __init__(self, request: Request, index: int, tokens: list[int], max_tokens_total: int, table: BlockTable) -> None:
        new = request.new
        self.request = request
        self.request_id = new.request_id
        self.index = index
        self.id = sequence_id(new.request_id, index, max(new.params.n, index + 1))
        self.order = (*request.order, index)  # priority order: the lowest first. Preemption does not change it
        self.tokens = tokens  # prompt and outputs
        self.num_prompt_tokens = len(new.prompt_token_ids)
        self.max_tokens_total = max_tokens_total  # at this number of tokens it finishes
        # The last token is never computed, since nothing is sampled after it. With max_tokens = 0 the whole prompt is computed.
        self.compute_limit = max(max_tokens_total - 1, self.num_prompt_tokens)
        self.stop_ids = request.stop_rule.stop_ids

        self.num_computed = 0
        self.num_planned = 0
        self.num_known = len(tokens)
        self.drafts: tuple[int, ...] = ()
        self.num_guesses = 0  # drafts of the worker that its next steps verify without waiting for their values
        self.wants_drafts = True  # whether the worker should propose drafts after its steps; as the newest result says

        self.status = SequenceStatus.WAITING
        self.row = NO_ROW
        self.table = table
        self.block_hashes: list[bytes] = []  # of full blocks of tokens, as far as they were needed
        self.num_cached_blocks = 0  # full blocks that were added to the prefix cache
        self.cacheable = True  # False: the prefix cache was reset after some of its blocks were computed
        self.shares_last_block = False  # after a fork: the partly filled last block may have other owners
        self.dropped_entries: list[tuple[int, int]] = []  # (group, logical index) outside the window; the next plan tells the worker
        self.host_blocks: list[list[int]] = []  # [G][blocks] while SWAPPED
        self.num_passes = 0  # later sequences with adapters that started before it, because its adapter had no slot
        self.num_moves_out = 0  # pending moves out: it resumes after the last one
        self.must_readmit = False  # the worker's row is missing or wrong: the next plan carries the whole row
        self.waits_for_result = new.params.structured_outputs is not None or new.beam_search
        self.awaits_drafts = False  # the newest result had proposals for it: the next step waits for those of the next result
        self.paused = False  # a beam that has its token and waits for `choose_beams`
        wants_logprobs = new.params.prompt_logprobs is not None and index == 0
        # First prompt position whose logprobs are still to be returned; None: not requested. Position 0 has no predecessor, so no logprob.
        self.prompt_logprobs_from: int | None = 1 if wants_logprobs else None

        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.first_scheduled_time: float | None = None
        self.fast_plan_limit = 0
        self.fast_confirm_limit = 0

    @property
    def needs_values(self) -> bool:
        """Whether its next step must wait until the values of all its tokens are known."""
        return self.waits_for_result or self.awaits_drafts

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
        """How many tokens the next plan could compute."""
        return min(self.num_known + len(self.drafts), self.compute_limit) - self.num_planned

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    def reset_computed(self, num_computed: int) -> None:
        """Continue after `num_computed` computed tokens, with nothing in flight."""
        self.num_computed = self.num_planned = num_computed
        self.num_known = len(self.tokens)
        self.drafts = ()
        self.dropped_entries.clear()
        self.shares_last_block = False
        self.leave_fast_path()

    def leave_fast_path(self) -> None:
        """Let the next plan and the next update check everything about this sequence."""
        self.fast_plan_limit = self.fast_confirm_limit = 0

    def inherit_prompt_report(self, parent: Sequence) -> None:
        """A fork reports the same prompt statistics as its parent."""
        self.num_cached_tokens, self.first_scheduled_time = parent.num_cached_tokens, parent.first_scheduled_time

    def report(
        self, sample_index: int | None, token_ids: tuple[int, ...], finish_reason: FinishReason | None, stop_reason: int | str | None,
    ) -> SequenceUpdate:
        return SequenceUpdate(self.request_id, self.index, self.id, sample_index, token_ids, finish_reason, stop_reason,
                              self.num_cached_tokens, self.num_preemptions, self.first_scheduled_time)
