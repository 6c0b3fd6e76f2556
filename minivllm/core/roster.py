"""Everybody's place: in the queue, on a row, or gone. Who moves whom is the scheduler's business; moving is here.

         push                start_running                 end
    new ──────> WAITING ─────────────────────> RUNNING ────────────> FINISHED      a row is left, and its blocks freed or
                  ^  SWAPPED                      │                     │          put away, only when no launched plan
                  └───────── leave row <─── PREEMPTED                leave row     names the sequence any more: `settle`
"""
from __future__ import annotations

from bisect import insort

from minivllm.core.kv_manager import KVManager
from minivllm.core.request import NO_ROW, Request, Sequence, State
from minivllm.core.waiting_queue import WaitingQueue


class Roster:
    """All unfinished requests and their sequences, and the rows."""

    __slots__ = ("_kv", "_num_rowless", "free_rows", "num_preemptions", "num_swaps", "parked", "queue", "requests", "running")

    def __init__(self, kv: KVManager, num_rows: int) -> None:
        self._kv = kv
        self.requests: dict[str, Request] = {}  # unfinished ones
        self.queue = WaitingQueue()
        self.running: list[Sequence] = []  # everybody who has a row, in order
        self.parked: list[Sequence] = []  # paused beams that gave their row up
        self.free_rows = list(range(num_rows - 1, -1, -1))
        self.num_preemptions = self.num_swaps = self._num_rowless = 0

    # Coming.

    def new_sequence(self, request: Request, index: int, tokens: list[int], max_tokens_total: int) -> Sequence:
        sequence = Sequence(request, index, tokens, max_tokens_total, self._kv.empty_table())
        request.sequences.append(sequence)
        return sequence

    def start_running(self, sequence: Sequence) -> None:
        sequence.state = State.RUNNING
        sequence.row = self.free_rows.pop()
        sequence.must_readmit = True
        insort(self.running, sequence, key=_order)

    def fork(self, parent: Sequence, index: int, tokens: list[int]) -> Sequence:
        """A sequence that shares the parent's blocks, if there is a row for it; else one that waits, and finds what is cached."""
        child = self.new_sequence(parent.request, index, tokens, parent.max_tokens_total)
        child.digests = parent.digests.copy()
        if parent.state is not State.RUNNING or not self.free_rows:
            self.queue.push(child)
            return child
        self._kv.fork(parent, child)
        child.inherit_report(parent)
        parent.plan_freely_until = 0
        self.start_running(child)
        return child

    def resume(self, beam: Sequence) -> None:
        """A paused beam was chosen."""
        beam.must_readmit = True  # its newest token may be another than the one the worker sampled
        beam.plan_freely_until = 0
        if beam.paused and beam.row == NO_ROW:
            self.parked.remove(beam)
            self.queue.push(beam)
        beam.paused = False

    # Going.

    def give_way(self, victim: Sequence) -> None:
        """Back to the queue: at once if no launched plan names it (the one being written included), else with its last update."""
        self.num_preemptions += 1
        victim.num_preemptions += 1
        victim.state = State.PREEMPTED
        victim.plan_freely_until = victim.confirm_freely_until = 0
        self.settle(victim)

    def park_a_beam(self) -> bool:
        """Take row and blocks from the last paused beam, if there is one."""
        paused = next((s for s in reversed(self.running) if s.paused and s.state is State.RUNNING), None)
        if paused is None:
            return False
        self.give_way(paused)
        self.tidy()
        return True

    def end(self, sequence: Sequence) -> None:
        """FINISHED, wherever it was."""
        before, sequence.state = sequence.state, State.FINISHED
        sequence.plan_freely_until = sequence.confirm_freely_until = 0
        if before in (State.RUNNING, State.PREEMPTED):
            self.settle(sequence)
            return
        self._kv.host.release(sequence)
        if sequence in self.parked:
            self.parked.remove(sequence)
        elif before is not State.FINISHED:
            self.queue.count_out(sequence)

    def settle(self, sequence: Sequence) -> None:
        """Let a sequence that is to leave its row do so, if no launched plan names it any more."""
        if sequence.state in (State.PREEMPTED, State.FINISHED) and not sequence.num_in_flight and sequence.row != NO_ROW:
            self._leave_row(sequence)

    def _leave_row(self, sequence: Sequence) -> None:
        self.free_rows.append(sequence.row)
        sequence.row = NO_ROW
        self._num_rowless += 1
        if sequence.state is State.FINISHED:
            self._kv.give_back(sequence)
            return
        sequence.state = self._kv.put_away(sequence)
        self.num_swaps += sequence.state is State.SWAPPED
        if sequence.paused:
            self.parked.append(sequence)
        else:
            self.queue.push(sequence)

    def tidy(self) -> None:
        """Take who left from `running`. Not done on leaving, since that may be in the middle of an iteration."""
        if self._num_rowless:
            self.running = [s for s in self.running if s.row != NO_ROW]
            self._num_rowless = 0

    def forget_if_finished(self, request: Request) -> None:
        if request.finished and self.requests.get(request.new.request_id) is request:
            del self.requests[request.new.request_id]


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.order
