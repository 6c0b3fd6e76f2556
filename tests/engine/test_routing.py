"""The choice of a replica: properties of any sequence of requests, and the cases that the formula is for."""
from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.engine.routing import DECODE_TOKENS, Router

BLOCK = 4
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=24).map(tuple)  # few different tokens, so that beginnings repeat


def held(router: Router, replica: int, tokens: tuple[int, ...]) -> int:
    """Leading blocks of a prompt that the router expects in a replica, found through the cost of a request that ends at once."""
    before = router.load(replica)
    router.choose("probe", tokens, [replica])
    missing = router.load(replica) - before - DECODE_TOKENS
    router.ended("probe")
    return (len(tokens) - missing) // BLOCK


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(PROMPTS, st.sets(st.integers(0, 2), min_size=1), st.integers(0, 3)), max_size=30))
def test_any_sequence_of_requests_keeps_the_bounds(steps: list[tuple[tuple[int, ...], set[int], int]]) -> None:
    router, unfinished = Router(3, BLOCK, num_blocks=5), list[str]()
    for number, (prompt, live, event) in enumerate(steps):
        before = {index: router.load(index) for index in range(3)}
        chosen = router.choose(str(number), prompt, live)
        unfinished.append(str(number))
        assert chosen in live
        assert before[chosen] <= min(before[index] for index in live) + len(prompt), "more work than any prefix can save"
        assert before[chosen] < router.load(chosen) <= before[chosen] + len(prompt) + DECODE_TOKENS
        assert all(router.load(index) == before[index] for index in before if index != chosen)
        assert all(len(state.held) <= 5 for state in router._replicas)
        if event == 1:
            router.begun(unfinished[0])
        elif event == 2:
            router.ended(unfinished.pop(0))
        elif event == 3:
            router.forget(chosen)
            assert not router._replicas[chosen].held
    for request_id in unfinished:
        router.ended(request_id)
    assert [router.load(index) for index in range(3)] == [0, 0, 0] and not router._requests


@settings(max_examples=40, deadline=None)
@given(PROMPTS, st.integers(0, 2), PROMPTS)
def test_idle_replicas_get_what_they_hold(prompt: tuple[int, ...], holder: int, other: tuple[int, ...]) -> None:
    router = Router(3, BLOCK, num_blocks=100)
    router.choose("first", prompt, [holder])
    router.choose("other", other, [(holder + 1) % 3])
    router.ended("first")
    router.ended("other")
    wants = prompt + (7,) * BLOCK  # tokens that no other prompt has
    shared = next((i for i, (a, b) in enumerate(zip(wants, other, strict=False)) if a != b), min(len(wants), len(other))) // BLOCK
    chosen = router.choose("again", wants, range(3))
    if len(prompt) // BLOCK > shared:
        assert chosen == holder
    elif shared > len(prompt) // BLOCK:
        assert chosen == (holder + 1) % 3


def test_a_popular_prefix_goes_to_another_replica_once_the_queue_costs_more_than_the_prefix() -> None:
    router, prefix = Router(2, BLOCK, num_blocks=1000), tuple(range(10 * DECODE_TOKENS))
    chosen = []
    for i in range(60):
        chosen.append(router.choose(str(i), (*prefix, 1000 + i), [0, 1]))
        router.begun(str(i))
    assert chosen[:11] == [0] * 10 + [1], "the prefix saves the work of ten requests"
    assert (chosen.count(0), chosen.count(1)) == (30, 30)
    assert held(router, 0, prefix) == held(router, 1, prefix) == len(prefix) // BLOCK


def test_without_a_shared_prefix_requests_are_spread_evenly() -> None:
    router = Router(4, BLOCK, num_blocks=1000)
    chosen = [router.choose(str(i), (i,) * 8, range(4)) for i in range(40)]
    assert [chosen.count(index) for index in range(4)] == [10, 10, 10, 10]


def test_idle_replicas_share_the_prefixes() -> None:
    """One request at a time has no queue to avoid. The replica that holds the least gets a new prefix."""
    router, chosen = Router(3, BLOCK, num_blocks=1000), []
    for i in range(9):
        chosen.append(router.choose("r", (i,) * 8, range(3)))
        router.ended("r")
    assert chosen == [0, 1, 2] * 3


def test_another_adapter_or_cache_salt_is_another_prefix() -> None:
    router, prompt = Router(2, BLOCK, num_blocks=1000), tuple(range(32))
    for namespace in ((None, "a"), (None, "b")):
        router.choose("r", prompt, [0], namespace=namespace)
        router.ended("r")
    assert router.choose("r", prompt, [0, 1], namespace=(None, "a")) == 0
    router.ended("r")
    assert router.choose("r", prompt, [0, 1], namespace=("sql", "a")) == 1


def test_what_was_used_last_is_remembered_and_a_shared_beginning_longest() -> None:
    router = Router(1, BLOCK, num_blocks=4)
    shared, first, second = (1,) * BLOCK, (2,) * (2 * BLOCK), (3,) * (2 * BLOCK)
    for tail in (first, second):
        router.choose("r", shared + tail, [0])
        router.ended("r")
    assert held(router, 0, shared + second) == 3
    assert held(router, 0, shared + first) == 2, "only its last block was forgotten"


def test_what_is_no_token_id_is_routed_and_left_to_the_engine_to_refuse() -> None:
    router = Router(2, BLOCK, num_blocks=10)
    for tokens in ((2**70,) * 8, ("a",) * 8):
        assert router.choose("r", tokens, [1]) == 1  # type: ignore[arg-type]
        router.ended("r")
