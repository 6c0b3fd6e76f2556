"""Which LoRA adapter is in which of the device's slots.

A running sequence keeps its adapter in a slot. So a step never needs more adapters than there are slots, and an adapter is not swapped
out while it is used. An adapter without running sequences stays until another one needs its slot: the least recently used one leaves first.

    slot        0        1        2
    adapter     sql      rhymes   -          running: 3 sequences use sql, 0 rhymes
    next one:   2 (empty), then 1 (rhymes is idle), then none until a sequence of sql has finished

A waiting sequence whose adapter finds no slot is passed by later ones that need none. So that it waits for a limited time, later sequences
with adapters pass it at most `max_passes` times altogether. After that only sequences without an adapter pass it, until a slot is idle.
"""
from __future__ import annotations

from minivllm.core.plan_builder import LaunchedPlan

NO_SLOT = -1


class AdapterSlots:
    """The slots, their adapters, and how many running sequences use each. Adapters are numbers above 0; 0 is the base model."""

    __slots__ = ("_free", "_loads", "_slot_of", "_users", "max_passes")

    def __init__(self, num_slots: int, max_passes: int) -> None:
        self._free = list(range(num_slots - 1, -1, -1))
        self._slot_of: dict[int, int] = {}  # adapter -> slot; the least recently used first
        self._users: dict[int, int] = {}  # adapter -> running sequences; no entry if there are none
        self._loads: list[tuple[int, int]] = []  # (slot, adapter) that the worker does not know yet
        self.max_passes = max_passes

    def fits(self, adapter: int) -> bool:
        """Whether a sequence with this adapter may start to run now."""
        return not adapter or adapter in self._slot_of or bool(self._free) or len(self._users) < len(self._slot_of)

    def slot(self, adapter: int) -> int:
        """The slot of an adapter that a running sequence uses; NO_SLOT for the base model."""
        return self._slot_of[adapter] if adapter else NO_SLOT

    def acquire(self, adapter: int) -> None:
        """A sequence starts to run. `fits` must hold."""
        if not adapter:
            return
        if adapter not in self._slot_of:
            slot = self._free.pop() if self._free else self._slot_of.pop(next(a for a in self._slot_of if a not in self._users))
            self._slot_of[adapter] = slot
            self._loads.append((slot, adapter))
        self._users[adapter] = self._users.get(adapter, 0) + 1
        self._use(adapter)

    def release(self, adapter: int) -> None:
        """A sequence has left its row."""
        if adapter:
            self._users[adapter] -= 1
            if not self._users[adapter]:
                del self._users[adapter]
            self._use(adapter)

    def _use(self, adapter: int) -> None:
        self._slot_of[adapter] = self._slot_of.pop(adapter)  # to the end: the most recently used

    def users(self, adapter: int) -> int:
        """Running sequences with this adapter."""
        return self._users.get(adapter, 0)

    def take_loads(self) -> tuple[tuple[int, int], ...]:
        """(slot, adapter): what the worker must bring into slots before the next step."""
        loads, self._loads = tuple(self._loads), []
        return loads

    def repeat_loads(self, failed: LaunchedPlan | None = None) -> None:
        """Bring in again what a failed plan, or (None) a worker that lost everything, may not have. Idle adapters just leave."""
        lost = list(self._slot_of.items()) if failed is None else [(adapter, slot) for slot, adapter in failed.plan.adapter_loads]
        for adapter, slot in lost:
            if self._slot_of.get(adapter) != slot:
                continue
            if self.users(adapter):
                self._loads.append((slot, adapter))
            else:
                del self._slot_of[adapter]
                self._free.append(slot)

    def check(self, running: dict[int, int]) -> None:
        """Assert that adapters of running sequences have slots, each another one. running: adapter -> running sequences."""
        assert running == self._users, f"adapters are used by {self._users}, and {running} sequences run with them"
        assert set(running) <= set(self._slot_of), "a running sequence's adapter has no slot"
        slots = [*self._slot_of.values(), *self._free]
        assert len(set(slots)) == len(slots), f"slots {slots} do not each occur once"
