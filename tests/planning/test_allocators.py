"""The allocator laboratory: slots are owned once, waste is counted where it is, and paging's promise holds."""
from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from bench import waste
from minivllm.errors import InvalidInput
from minivllm.planning.allocator_replay import replay, sharegpt_like, with_system_prompt
from minivllm.planning.allocators import Allocator, BuddyAllocator, ContiguousAllocator, PagedAllocator, RequestLengths

LIMIT = 40
MAKERS: dict[str, Callable[[], Allocator]] = {
    "contiguous": lambda: ContiguousAllocator(128, LIMIT),
    "oracle": lambda: ContiguousAllocator(128, LIMIT, oracle=True),
    "buddy": lambda: BuddyAllocator(128, smallest=4),
    "paged1": lambda: PagedAllocator(128, 1),
    "paged4": lambda: PagedAllocator(130, 4),
    "shared4": lambda: PagedAllocator(128, 4, sharing=True),
}

PREFIX = {"a": 9, "b": 24, None: 0}  # tokens that jobs of a group have in common


@st.composite
def job_lists(draw: st.DrawFn) -> list[RequestLengths]:
    return [draw(any_job()) for _ in range(draw(st.integers(1, 12)))]


@st.composite
def any_job(draw: st.DrawFn) -> RequestLengths:
    group = draw(st.sampled_from([None, "a", "b"]))
    prompt = draw(st.integers(PREFIX[group] + 1, LIMIT - 1))
    return RequestLengths(prompt, draw(st.integers(1, LIMIT - prompt)), group, PREFIX[group])


def distinct_tokens(allocator: Allocator, jobs: dict[int, RequestLengths]) -> int:
    """What `used` means, by brute force: tokens that cannot be shared, and full blocks of each group's prefix once."""
    block = allocator.block_size if isinstance(allocator, PagedAllocator) and allocator.sharing else None
    places = set()
    for key, length in allocator.lengths.items():
        shared = jobs[key].shared // block * block if block else 0
        places |= {(jobs[key].group, i) if i < shared else (key, i) for i in range(length)}
    return len(places)


class AllocatorMachine(RuleBasedStateMachine):
    """Any order of admit, grow and release."""

    maker: Callable[[], Allocator]

    def __init__(self) -> None:
        super().__init__()
        self.allocator = type(self).maker()
        self.jobs: dict[int, RequestLengths] = {}
        self.keys = 0

    @rule(job=any_job())
    def admit(self, job: RequestLengths) -> None:
        need, reserved = self.allocator.need(job), self.allocator.reserved
        if self.allocator.try_admit(self.keys, job):
            assert self.allocator.reserved == reserved + need
            self.jobs[self.keys] = job
            self.keys += 1
        else:
            assert self.allocator.reserved == reserved
            if isinstance(self.allocator, PagedAllocator):
                assert need > self.allocator.capacity - reserved, "paging never refuses what there is room for"

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), times=st.integers(1, 20))
    def grow(self, data: st.DataObject, times: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.jobs)))
        for _ in range(times):
            length = self.allocator.lengths[key]
            if length == self.jobs[key].total:
                break
            grew = self.allocator.try_grow(key)
            assert self.allocator.lengths[key] == length + grew
            assert grew or not isinstance(self.allocator, ContiguousAllocator), "a reservation is a promise"

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.jobs)))
        del self.jobs[key]
        self.allocator.release(key)

    @invariant()
    def accounts_balance(self) -> None:
        self.allocator.check()
        assert self.allocator.lengths.keys() == self.jobs.keys()
        assert self.allocator.used == distinct_tokens(self.allocator, self.jobs)
        if not self.jobs:
            assert self.allocator.reserved == 0
        if isinstance(self.allocator, PagedAllocator):
            assert self.allocator.reserved - self.allocator.used <= len(self.jobs) * (self.allocator.block_size - 1)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_in_any_order_slots_are_owned_once_and_counted_right(name: str) -> None:
    machine = type(name, (AllocatorMachine,), {"maker": staticmethod(MAKERS[name])})
    run_state_machine_as_test(machine, settings=settings(max_examples=20, stateful_step_count=40, deadline=None))


@pytest.mark.parametrize("name", sorted(MAKERS))
@given(jobs=job_lists())
@settings(max_examples=25, deadline=None)
def test_every_job_is_served_and_nothing_stays_reserved(name: str, jobs: list[RequestLengths]) -> None:
    allocator = MAKERS[name]()
    run = replay(allocator, jobs)
    allocator.check()
    assert allocator.reserved == allocator.used == 0
    steps_of_growth = sum(m.running for m in run.steps)
    assert steps_of_growth == sum(job.output for job in jobs), "each running job gains one token in each step, lost ones included"
    assert run.steps[-1].waiting == 0
    if isinstance(allocator, ContiguousAllocator):
        assert run.preemptions == run.lost == 0


@given(jobs=job_lists())
@settings(max_examples=40, deadline=None)
def test_paging_has_no_external_waste(jobs: list[RequestLengths]) -> None:
    for name in ("paged1", "paged4", "shared4"):
        assert replay(MAKERS[name](), jobs).external == 0.0


def test_holes_between_intervals_are_external_waste() -> None:
    allocator = ContiguousAllocator(10, limit=10, oracle=True)
    # Four slots each for a and b, two left. When a ends there are six free slots, but in pieces of four and two: c must wait.
    run = replay(allocator, [RequestLengths(3, 1), RequestLengths(1, 3), RequestLengths(4, 1)])
    assert [m.external for m in run.steps] == [0, 6, 6, 0]
    assert [m.running for m in run.steps] == [2, 1, 1, 1]


def test_a_buddy_doubles_in_place_if_it_can_and_moves_if_it_must() -> None:
    allocator = BuddyAllocator(16, smallest=4)
    assert allocator.try_admit(0, RequestLengths(3, 10)) and allocator.chunks[0] == (0, 4)
    assert allocator.try_grow(0) and allocator.try_grow(0)  # the fifth token: chunk (4, 4) above it is free
    assert allocator.chunks[0] == (0, 8) and allocator.moved == 0
    assert allocator.try_admit(1, RequestLengths(2, 10)) and allocator.chunks[1] == (8, 4)
    allocator.release(0)
    assert allocator.try_admit(2, RequestLengths(2, 10)) and allocator.chunks[2] == (12, 4)
    assert all(allocator.try_grow(1) for _ in range(3))  # its buddy is taken: to (0, 8), four tokens carried along
    assert allocator.chunks[1] == (0, 8) and allocator.moved == 4
    allocator.check()


def test_a_shared_prefix_is_stored_once_and_freed_with_its_last_user() -> None:
    allocator = PagedAllocator(64, block_size=4, sharing=True)
    job = RequestLengths(prompt=10, output=5, group="system", shared=9)  # blocks 0 and 1 are shared; the third is partly private
    assert allocator.try_admit(0, job) and allocator.reserved == 12
    assert allocator.need(job) == 4
    assert allocator.try_admit(1, job) and allocator.reserved == 16
    assert allocator.tables[0][:2] == allocator.tables[1][:2] and allocator.tables[0][2] != allocator.tables[1][2]
    assert (allocator.held, allocator.used) == (20, 12)
    allocator.release(0)
    assert allocator.reserved == 12 and allocator.need(job) == 4
    allocator.release(1)
    assert allocator.reserved == 0 and allocator.need(job) == 12


def test_contiguous_reservation_wastes_60_to_80_percent_and_paging_below_4() -> None:
    jobs = sharegpt_like(300)
    assert all(job.total <= 2048 for job in jobs)
    contiguous = replay(ContiguousAllocator(16_384, 2048), jobs)
    paged = replay(PagedAllocator(16_384, 16), jobs)
    assert 0.60 < contiguous.waste < 0.80
    assert paged.waste < 0.04
    assert paged.mean("running") > 2.5 * contiguous.mean("running")


def test_waste_grows_with_the_block_size() -> None:
    jobs = sharegpt_like(60)
    wastes = [replay(PagedAllocator(8192, size), jobs).waste for size in (1, 4, 16, 64, 256)]
    assert wastes[0] == 0.0 and wastes == sorted(wastes)


def test_sharing_a_system_prompt_lets_more_requests_run() -> None:
    jobs = with_system_prompt(sharegpt_like(60), 300)
    alone, shared = (replay(PagedAllocator(8192, 16, sharing=sharing), jobs) for sharing in (False, True))
    assert shared.mean("running") > 1.2 * alone.mean("running")
    assert len(shared.steps) < len(alone.steps)


def test_lengths_depend_on_the_seed_alone() -> None:
    assert sharegpt_like(50, seed=3) == sharegpt_like(50, seed=3) != sharegpt_like(50, seed=4)


@pytest.mark.parametrize(("make", "param"), [
    (lambda: RequestLengths(0, 1), "prompt"),
    (lambda: RequestLengths(4, 1, "a", 5), "shared"),
    (lambda: RequestLengths(4, 1, None, 2), "shared"),
    (lambda: ContiguousAllocator(10, 11), "limit"),
    (lambda: BuddyAllocator(100), "capacity"),
    (lambda: PagedAllocator(10, 11), "block_size"),
    (lambda: PagedAllocator(0, 1), "capacity"),
    (lambda: replay(PagedAllocator(10, 4), [RequestLengths(8, 1)]), "requests"),
])
def test_what_can_never_fit_is_refused_by_name(make: Callable[[], object], param: str) -> None:
    with pytest.raises(InvalidInput) as error:
        make()
    assert error.value.param == param


def test_the_bench_prints_a_table_and_a_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    waste.main(["--num-jobs", "20"])
    *table, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    assert len(table) == 1 + len(figures["rows"])
    assert figures["rows"]["paged, block 1"]["waste"] == 0.0 < figures["rows"]["paged, block 16"]["waste"] < 0.04
