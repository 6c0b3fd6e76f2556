"""Allocators and their replay: each slot has one owner, waste is counted correctly, and paging wastes less than 4%."""
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

PREFIX = {"a": 9, "b": 24, None: 0}  # tokens shared by all requests of a group


@st.composite
def request_lists(draw: st.DrawFn) -> list[RequestLengths]:
    return [draw(any_request()) for _ in range(draw(st.integers(1, 12)))]


@st.composite
def any_request(draw: st.DrawFn) -> RequestLengths:
    group = draw(st.sampled_from([None, "a", "b"]))
    prompt = draw(st.integers(PREFIX[group] + 1, LIMIT - 1))
    return RequestLengths(prompt, draw(st.integers(1, LIMIT - prompt)), group, PREFIX[group])


def distinct_tokens(allocator: Allocator, requests: dict[int, RequestLengths]) -> int:
    """`used` by brute force: all tokens, where the shared full blocks of each group count once."""
    block = allocator.block_size if isinstance(allocator, PagedAllocator) and allocator.sharing else None
    places = set()
    for key, length in allocator.lengths.items():
        shared = requests[key].shared // block * block if block else 0
        places |= {(requests[key].group, i) if i < shared else (key, i) for i in range(length)}
    return len(places)


class AllocatorMachine(RuleBasedStateMachine):
    """Requests are admitted, grow and are released in any order."""

    maker: Callable[[], Allocator]

    def __init__(self) -> None:
        super().__init__()
        self.allocator = type(self).maker()
        self.requests: dict[int, RequestLengths] = {}
        self.keys = 0

    @rule(request=any_request())
    def admit(self, request: RequestLengths) -> None:
        need, reserved = self.allocator.need(request), self.allocator.reserved
        if self.allocator.try_admit(self.keys, request):
            assert self.allocator.reserved == reserved + need
            self.requests[self.keys] = request
            self.keys += 1
        else:
            assert self.allocator.reserved == reserved
            if isinstance(self.allocator, PagedAllocator):
                assert need > self.allocator.capacity - reserved, "paging refuses a request only without room"

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), times=st.integers(1, 20))
    def grow(self, data: st.DataObject, times: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.requests)))
        for _ in range(times):
            length = self.allocator.lengths[key]
            if length == self.requests[key].total:
                break
            grew = self.allocator.try_grow(key)
            assert self.allocator.lengths[key] == length + grew
            assert grew or not isinstance(self.allocator, ContiguousAllocator), "a reservation always has room"

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.requests)))
        del self.requests[key]
        self.allocator.release(key)

    @invariant()
    def accounts_balance(self) -> None:
        self.allocator.check()
        assert self.allocator.lengths.keys() == self.requests.keys()
        assert self.allocator.used == distinct_tokens(self.allocator, self.requests)
        if not self.requests:
            assert self.allocator.reserved == 0
        if isinstance(self.allocator, PagedAllocator):
            assert self.allocator.reserved - self.allocator.used <= len(self.requests) * (self.allocator.block_size - 1)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_in_any_order_slots_have_one_owner_and_are_counted_correctly(name: str) -> None:
    machine = type(name, (AllocatorMachine,), {"maker": staticmethod(MAKERS[name])})
    run_state_machine_as_test(machine, settings=settings(max_examples=20, stateful_step_count=40, deadline=None))


@pytest.mark.parametrize("name", sorted(MAKERS))
@given(requests=request_lists())
@settings(max_examples=25, deadline=None)
def test_every_request_is_served_and_nothing_stays_reserved(name: str, requests: list[RequestLengths]) -> None:
    allocator = MAKERS[name]()
    seen: list[tuple[int, int]] = []
    run = replay(allocator, requests, watch=lambda a: seen.append((a.reserved, a.used)))
    allocator.check()
    assert allocator.reserved == allocator.used == 0
    assert seen == [(m.reserved, m.used) for m in run.steps]
    steps_of_growth = sum(m.running for m in run.steps)
    assert steps_of_growth == sum(request.output for request in requests), "each running request gains one token per step"
    assert run.steps[-1].waiting == 0
    if isinstance(allocator, ContiguousAllocator):
        assert run.preemptions == run.lost == 0


@given(requests=request_lists())
@settings(max_examples=40, deadline=None)
def test_paging_has_no_external_waste(requests: list[RequestLengths]) -> None:
    for name in ("paged1", "paged4", "shared4"):
        assert replay(MAKERS[name](), requests).external == 0.0


def test_holes_between_intervals_are_external_waste() -> None:
    allocator = ContiguousAllocator(10, limit=10, oracle=True)
    # Four slots each for the first two requests, two are left. When the first finishes, six slots are free in pieces of four and two, so
    # the third request, which needs five, must wait.
    run = replay(allocator, [RequestLengths(3, 1), RequestLengths(1, 3), RequestLengths(4, 1)])
    assert [m.external for m in run.steps] == [0, 6, 6, 0]
    assert [m.running for m in run.steps] == [2, 1, 1, 1]


def test_a_full_chunk_joins_its_free_buddy_or_moves() -> None:
    allocator = BuddyAllocator(16, smallest=4)
    assert allocator.try_admit(0, RequestLengths(3, 10)) and allocator.chunks[0] == (0, 4)
    assert allocator.try_grow(0) and allocator.try_grow(0)  # the fifth token: its buddy, chunk (4, 4), is free
    assert allocator.chunks[0] == (0, 8) and allocator.moved == 0
    assert allocator.try_admit(1, RequestLengths(2, 10)) and allocator.chunks[1] == (8, 4)
    allocator.release(0)
    assert allocator.try_admit(2, RequestLengths(2, 10)) and allocator.chunks[2] == (12, 4)
    assert all(allocator.try_grow(1) for _ in range(3))  # its buddy is in use: its four tokens move to (0, 8)
    assert allocator.chunks[1] == (0, 8) and allocator.moved == 4
    allocator.check()


def test_a_shared_prefix_is_stored_once_and_freed_with_its_last_request() -> None:
    allocator = PagedAllocator(64, block_size=4, sharing=True)
    request = RequestLengths(prompt=10, output=5, group="system", shared=9)  # blocks 0 and 1 are shared; the third block is not
    assert allocator.try_admit(0, request) and allocator.reserved == 12
    assert allocator.need(request) == 4
    assert allocator.try_admit(1, request) and allocator.reserved == 16
    assert allocator.tables[0][:2] == allocator.tables[1][:2] and allocator.tables[0][2] != allocator.tables[1][2]
    assert (allocator.held, allocator.used) == (20, 12)
    allocator.release(0)
    assert allocator.reserved == 12 and allocator.need(request) == 4
    allocator.release(1)
    assert allocator.reserved == 0 and allocator.need(request) == 12


def test_contiguous_reservation_wastes_60_to_80_percent_and_paging_below_4() -> None:
    requests = sharegpt_like(300)
    assert all(request.total <= 2048 for request in requests)
    contiguous = replay(ContiguousAllocator(16_384, 2048), requests)
    paged = replay(PagedAllocator(16_384, 16), requests)
    assert 0.60 < contiguous.waste < 0.80
    assert paged.waste < 0.04
    assert paged.mean("running") > 2.5 * contiguous.mean("running")


def test_waste_grows_with_the_block_size() -> None:
    requests = sharegpt_like(60)
    wastes = [replay(PagedAllocator(8192, size), requests).waste for size in (1, 4, 16, 64, 256)]
    assert wastes[0] == 0.0 and wastes == sorted(wastes)


def test_sharing_a_system_prompt_lets_more_requests_run() -> None:
    requests = with_system_prompt(sharegpt_like(60), 300)
    alone, shared = (replay(PagedAllocator(8192, 16, sharing=sharing), requests) for sharing in (False, True))
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
def test_a_wrong_argument_is_refused_by_name(make: Callable[[], object], param: str) -> None:
    with pytest.raises(InvalidInput) as error:
        make()
    assert error.value.param == param


def test_the_bench_prints_a_table_and_a_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    waste.main(["--num-requests", "20"])
    *table, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    assert len(table) == 1 + len(figures["rows"])
    assert figures["rows"]["paged, block 1"]["waste"] == 0.0 < figures["rows"]["paged, block 16"]["waste"] < 0.04
