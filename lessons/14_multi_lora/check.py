"""Checks of lesson 14, for `minivllm course check 14`. A failed assert is the explanation that the learner reads."""
import torch
from torch.overrides import TorchFunctionMode


class Sizes(TorchFunctionMode):
    """Records the shape of every result."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.seen.append(tuple(result.shape))
        return result


def example(lesson):
    """Five rows: three of two adapters, two of the base model."""
    dice = torch.Generator().manual_seed(0)
    weight, x = torch.randn(7, 6, generator=dice), torch.randn(5, 6, generator=dice)
    adapters = [lesson.Adapter(torch.randn(2, 6, generator=dice), torch.randn(7, 2, generator=dice), 0.5 + i) for i in range(2)]
    return x, weight, torch.tensor([1, lesson.BASE, 0, 1, lesson.BASE]), adapters


def task_1_one_batch(lesson):
    x, weight, slots, adapters = example(lesson)
    right = lesson.by_merging(x, weight, slots, adapters)
    with Sizes() as sizes:
        got = lesson.in_one_batch(x, weight, slots, adapters)
    assert got.shape == right.shape, f"each of the 5 rows has 7 outputs: expected the shape [5, 7], got {list(got.shape)}"
    base = slots == lesson.BASE
    assert torch.allclose(got[base], right[base], atol=1e-5), (
        "rows of the base model were changed: their slot is -1, and adapters[-1] is the LAST adapter in Python")
    if not torch.allclose(got, right, atol=1e-5):
        unscaled = [lesson.Adapter(adapter.a, adapter.b, 1.0) for adapter in adapters]
        assert not torch.allclose(got, lesson.by_merging(x, weight, slots, unscaled), atol=1e-5), (
            "B (A x) must be multiplied by the adapter's scaling, alpha / rank")
        alone = torch.cat([x[i:i + 1] @ lesson.merged(weight, adapters[0]).T for i in range(5)])
        assert not torch.allclose(got[~base], alone[~base], atol=1e-5), "all rows got the same adapter. Each row has its own: slots[row]"
        raise AssertionError(f"the rows differ from x times the merged weights by up to {(got - right).abs().max():.3f}")
    assert tuple(weight.shape) not in sizes.seen, (
        "a matrix as large as the weight was computed (B A). Multiply x by A first: the result has only `rank` numbers per row")


def task_2_slots(lesson):
    slots = lesson.Slots(2)
    for adapter in (1, 2):
        slots.acquire(adapter)
    assert sorted(slots.slot_of.values()) == [0, 1], f"two adapters are in two different slots, 0 and 1: got {slots.slot_of}"
    assert slots.users == {1: 1, 2: 1}, f"one running request uses each adapter, got {slots.users}: count them, `fits` needs it"
    assert slots.loads == 2, f"two adapters were copied into slots, got loads = {slots.loads}"
    slots.acquire(1)
    assert slots.loads == 2, "adapter 1 was in a slot already: a second request with it needs no copy"
    assert slots.users.get(1) == 2, f"two running requests use adapter 1, got {slots.users.get(1)}"
    slots.release(1)
    slots.release(2)
    slots.acquire(3)
    assert 1 in slots.slot_of, "adapter 1 was removed while a running request uses it: its rows would get another adapter's weights"
    assert set(slots.slot_of) == {1, 3}, f"adapter 3 takes the slot of adapter 2, which no running request uses: got {slots.slot_of}"
    slots.release(1)
    slots.release(3)
    slots.acquire(1)
    slots.release(1)
    slots.acquire(4)
    assert set(slots.slot_of) == {1, 4}, (
        f"slots have {sorted(slots.slot_of)}, expected [1, 4]: adapter 3 was used longer ago than adapter 1, which has just been used "
        "again. Note each use in the order of `slot_of`")
    slots = lesson.Slots(2)
    for adapter in (1, 2):
        slots.acquire(adapter)
    slots.release(1)
    slots.acquire(3)
    assert 2 in slots.slot_of, "adapter 2 was removed while a running request uses it: its rows would get another adapter's weights"
    slots.release(3)
    slots.release(2)
    slots.acquire(4)
    assert set(slots.slot_of) == {2, 4}, (
        f"slots have {sorted(slots.slot_of)}, expected [2, 4]: the request of adapter 3 ended before that of adapter 2, and the end of a "
        "request is a use too")


def task_3_who_starts(lesson):
    """Two slots; a running request uses adapter 1, another one adapter 2."""
    slots, third = lesson.Slots(2), lesson.Request(3, 5)
    slots.acquire(1)
    slots.acquire(2)
    base, first = lesson.Request(0, 5), lesson.Request(1, 5)
    got = lesson.admit([third, base, first], slots, 8, 10)
    assert third not in got, "no slot is free for adapter 3: both are in use, so its request must wait"
    assert base in got, "the base model needs no slot, so its request does not wait for one"
    assert first in got, "adapter 1 is in a slot, so its request can start although an earlier request waits for a slot"
    assert slots.users == {1: 2, 2: 1}, f"a request that starts acquires its adapter: expected users {{1: 2, 2: 1}}, got {slots.users}"
    got = lesson.admit([lesson.Request(1, 5) for _ in range(5)], slots, 2, 10)
    assert len(got) == 2, f"two rows are free, so two requests start, got {len(got)}"
    third.passes, started = 0, 0
    for _ in range(30):  # adapters 1 and 2 are always in use
        started += len(lesson.admit([third, lesson.Request(2, 5)], slots, 1, 4))
    assert started < 30, (
        "a request waited while 30 later ones with adapters started: with a steady load its adapter never gets a slot. Count the passes "
        "in the request that is passed, and stop at max_passes")
    assert started == 4, f"with max_passes = 4 four later requests start first, got {started}"
    got = lesson.admit([third, lesson.Request(0, 5)], slots, 1, 4)
    assert len(got) == 1, "requests of the base model take no slot from the one that waits, so they may always pass it"
    for adapter in (1, 2):
        while slots.users.get(adapter):
            slots.release(adapter)
    got = lesson.admit([third, lesson.Request(2, 5)], slots, 8, 4)
    assert got[:1] == [third], "now a slot is idle: the request that has waited longest starts first"


def task_4_fewer_copies(lesson):
    results = []
    for num_slots, seed in ((2, 0), (3, 1), (4, 0)):
        requests = lesson.mixed_requests(seed=seed)
        steps, loads, longest = lesson.simulate(requests, num_slots, 8)
        assert longest <= 80, f"a request waited {longest} steps with {num_slots} slots: at most 80 are allowed"
        results.append((steps, loads, longest))
    steps, loads, longest = (list(values) for values in zip(*results, strict=True))
    return f"{sum(loads)} copies of adapters with 2, 3 and 4 slots ({loads}), longest waits {longest} steps, {sum(steps)} steps altogether"
