"""Everything the scheduler remembers between two calls: unfinished requests, rows, launched plans.

The methods move a sequence from one status to the next. Which sequence moves is decided elsewhere.

                 start_running            finish
    WAITING,  ────────────────> RUNNING ─────────> FINISHED        A PREEMPTED or FINISHED sequence keeps its row and blocks
    SWAPPED                        │                               while a launched plan includes it. Then `leave_row_if_idle`
       ^                           │ preempt                       takes the row, and frees the blocks or swaps them out.
       └──── leave row ─────── PREEMPTED
"""
from __future__ import annotations

from bisect import insort
from collections import deque

from minivllm.core.adapter_slots import AdapterSlots
from minivllm.core.fair_share import FairShare
from minivllm.core.kv_manager import KVManager
from minivllm.core.plan_builder import LaunchedPlan
from minivllm.core.request import NO_ROW, Request, Sequence, SequenceStatus
from minivllm.core.scheduler_config import SchedulerConfig
from minivllm.core.waiting_queue import WaitingQueue


class SchedulerState:
    """All unfinished requests and their sequences, by status."""

    __slots__ = (
        "_num_rowless",
        "adapters",
        "config",
        "free_rows",
        "kv",
        "launched",
        "next_arrival",
        "next_step_id",
        "num_preemptions",
        "num_swaps",
        "num_unproposed",
        "preempted_beams",
        "prefix_hits",
        "prefix_queries",
        "requests",
        "running",
        "share",
        "waiting",
    )

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.kv = KVManager(config)
        self.adapters = AdapterSlots(config.max_loras, max_passes=config.max_running)
        self.requests: dict[str, Request] = {}
        self.share = FairShare(config.max_running, config.num_blocks)
        self.waiting = WaitingQueue(self.share)
        self.running: list[Sequence] = []  # every sequence with a row, in priority order
        self.preempted_beams: list[Sequence] = []  # paused, without a row, and not in the queue
        self.free_rows = list(range(config.max_running - 1, -1, -1))
        self.launched: deque[LaunchedPlan] = deque()  # oldest first
        self.next_step_id = self.next_arrival = 0
        self.num_unproposed = 0  # steps since the last one after which the worker proposed drafts
        self.num_preemptions = self.num_swaps = self.prefix_queries = self.prefix_hits = 0
        self._num_rowless = 0  # entries of `running` that have left their row

    def new_sequence(self, request: Request, index: int, tokens: list[int], max_tokens_total: int) -> Sequence:
        sequence = Sequence(request, index, tokens, max_tokens_total, self.kv.empty_table())
        params = request.new.params
        # The worker's sampler reads these positions on the host, which knows them only if no draft is unverified.
        if self.config.num_device_drafts and (params.has_penalties or params.min_tokens or params.bad_words_token_ids):
            sequence.waits_for_result = True
        request.sequences.append(sequence)
        return sequence

    @property
    def has_proposals(self) -> bool:
        """Whether the worker proposes drafts after every launched plan."""
        return all(launched.plan.proposes for launched in self.launched)

    def start_running(self, sequence: Sequence) -> None:
        """Give the sequence a row. One must be free."""
        sequence.status = SequenceStatus.RUNNING
        sequence.row = self.free_rows.pop()
        sequence.must_readmit = True
        self.adapters.acquire(sequence.request.new.adapter_id)
        self.share.start(sequence)
        insort(self.running, sequence, key=_order)

    def may_fork(self, request: Request) -> bool:
        """Whether a fork of this request gets a row now. It does not while another owner or request waits that has a smaller share."""
        if not self.free_rows:
            return False
        first = self.waiting.first() if self.share.has_enough(request) or self.waiting.has_several_owners else None
        if first is None or first.request is request:
            return True
        owner, other = request.new.owner, first.request.new.owner
        return not self.share.has_enough(request) and (owner == other or self.share.turn(owner) < self.share.turn(other))

    def preempt(self, victim: Sequence) -> None:
        """Send a running sequence back to the queue: now, or with the update of the last launched plan that includes it."""
        self.num_preemptions += 1
        victim.num_preemptions += 1
        victim.status = SequenceStatus.PREEMPTED
        self.share.stop(victim)
        victim.leave_fast_path()
        self.leave_row_if_idle(victim)

    def finish(self, sequence: Sequence) -> None:
        """Make a sequence FINISHED, whatever its status is."""
        before, sequence.status = sequence.status, SequenceStatus.FINISHED
        sequence.leave_fast_path()
        if before is SequenceStatus.RUNNING:
            self.share.stop(sequence)
        if before in (SequenceStatus.RUNNING, SequenceStatus.PREEMPTED):
            self.leave_row_if_idle(sequence)
            return
        self.kv.offload.release(sequence)
        if sequence in self.preempted_beams:
            self.preempted_beams.remove(sequence)
        elif before is not SequenceStatus.FINISHED:
            self.waiting.discount(sequence)

    def leave_row_if_idle(self, sequence: Sequence) -> None:
        """Take the row of a preempted or finished sequence, unless a launched plan still includes it."""
        leaving = sequence.status in (SequenceStatus.PREEMPTED, SequenceStatus.FINISHED)
        if leaving and not sequence.num_in_flight and sequence.row != NO_ROW:
            self._leave_row(sequence)

    def _leave_row(self, sequence: Sequence) -> None:
        self.free_rows.append(sequence.row)
        sequence.row = NO_ROW
        self.adapters.release(sequence.request.new.adapter_id)
        self._num_rowless += 1
        if sequence.status is SequenceStatus.FINISHED:
            self.kv.free(sequence)
            return
        sequence.status = self.kv.swap_out_or_free(sequence)
        self.num_swaps += sequence.status is SequenceStatus.SWAPPED
        if sequence.paused:
            self.preempted_beams.append(sequence)
        else:
            self.waiting.push(sequence)

    def remove_rowless(self) -> None:
        """Remove sequences without a row from `running`. `_leave_row` cannot do this, because it runs during iterations over `running`."""
        if self._num_rowless:
            self.running = [s for s in self.running if s.row != NO_ROW]
            self._num_rowless = 0

    def remove_if_finished(self, request: Request) -> None:
        if request.finished and self.requests.get(request.new.request_id) is request:
            del self.requests[request.new.request_id]
            request.sequences = []  # a cycle of references would keep the request until the next full garbage collection

    def unfinished_sequences(self) -> list[Sequence]:
        """Every sequence that is waiting, running or preempted. Includes finished ones that still have a row."""
        return [*self.running, *self.preempted_beams, *self.waiting.sequences()]


def _order(sequence: Sequence) -> tuple[float, int, int]:
    return sequence.order
