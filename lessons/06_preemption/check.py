"""Checks of lesson 6, for `minivllm course check 06`. A failed assert is the explanation that the learner reads."""
import math


def task_1_blocks_for_a_running_request(lesson):
    engine, (a, b) = _engine(lesson, free=3, blocks=[2, 2])
    assert engine.make_room(a, 8) is True and a.blocks == 2, "8 tokens fit into the 2 blocks of 4 that the request has: take none"
    assert engine.make_room(a, 9) is True and (a.blocks, engine.free) == (3, 2), (
        f"9 tokens need 3 blocks of 4, and it has 2, so it takes one of 3 free blocks. It has {a.blocks}, {engine.free} are free")
    assert not engine.short, "`short` says that blocks were missing, and they were not"
    assert engine.make_room(a, 20) is True and (a.blocks, engine.free) == (5, 0), "20 tokens need 5 blocks, so 2 more: all free blocks"
    assert engine.running == [a, b], "there were enough free blocks, so nothing should be preempted"


def task_1_the_newest_pays(lesson):
    engine, (a, b, _) = _engine(lesson, free=0, blocks=[2, 2, 1])
    assert engine.make_room(a, 9) is True, "no block is free, but c, the newest request, can be preempted for a"
    assert engine.short, "blocks were missing: set `short`, so that this step admits no new request (it would be preempted next)"
    assert engine.running == [a, b] and (a.blocks, engine.free) == (3, 0), (
        f"c had one block, which a needed: running are {[r.name for r in engine.running]}, and {engine.free} blocks are free")
    engine, (a, *_) = _engine(lesson, free=0, blocks=[2, 2, 1])
    assert engine.make_room(a, 16) is True and engine.running == [a], "a needs 2 blocks and c has 1: continue until there are enough"


def task_1_a_victim_keeps_its_blocks_and_waits(lesson):
    engine, (a, b) = _engine(lesson, free=0, blocks=[2, 2])
    assert engine.make_room(b, 9) is False, "b is the newest request itself. It must not take blocks from a: it waits in this step"
    assert b.blocks == 2 and engine.running == [a, b], (
        "b waits for others to finish, but keeps what it has: if it gave up its blocks, its tokens would be computed again for nothing")


def task_2_what_a_preempted_request_loses(lesson):
    engine, (a, b, c) = _engine(lesson, free=1, blocks=[2, 2, 3])
    late = lesson.Request("late", 9.0, 5, 5)
    engine.waiting = [late]
    computed, made = c.computed, len(c.times)
    engine.preempt(c)
    assert engine.free == 4 and c.blocks == 0, f"c had 3 blocks and 1 was free: 4 must be free now, got {engine.free} (c has {c.blocks})"
    assert c.computed == 0, "c's keys and values are gone with its blocks, so none of its tokens is computed: `computed` is 0"
    assert len(c.times) == made, "c keeps its output tokens: the user has them already. Only keys and values must be computed again"
    assert engine.running == [a, b], f"c must not be in `running` any more: {[r.name for r in engine.running]}"
    assert engine.waiting != [late, c], (
        "c was put behind a request that arrived after it. Under load it would lose its place again and again, and never finish")
    assert engine.waiting == [c, late], f"c waits first, then late: {[r.name for r in engine.waiting]}"
    assert engine.recomputed == computed, f"count the lost tokens in `recomputed`: {computed}, got {engine.recomputed}"
    early, = (r for r in _engine(lesson, 1, [2])[1])
    early.arrival = 0.5
    engine.preempt(b)
    assert engine.waiting == [b, c, late], "requests wait in the order of their arrival"


def task_2_a_swapped_request_loses_nothing(lesson):
    engine, (a,) = _engine(lesson, free=0, blocks=[500])
    engine.swap, computed, compare = True, a.computed, lesson.swap_is_cheaper
    lesson.swap_is_cheaper = lambda tokens: True
    try:
        engine.preempt(a)
    finally:
        lesson.swap_is_cheaper = compare
    assert a.computed == computed, "a swapped request loses its blocks, but its keys and values are kept in host memory: `computed` stays"
    assert (engine.moved, engine.swapped, engine.recomputed) == (computed, computed, 0), (
        "its tokens are copied: count them in `moved` and `swapped`, not in `recomputed`")


def task_3_two_prices(lesson):
    assert not lesson.swap_is_cheaper(10, fixed_ms=1.0), "10 tokens are computed in 0.04 ms: a copy that starts with 1 ms cannot be cheaper"
    assert lesson.swap_is_cheaper(10_000, fixed_ms=1.0), "10,000 tokens: 1 + 2 x 10 ms to copy, 40 ms to compute. Swapping is cheaper"
    first = next((n for n in range(5000) if lesson.swap_is_cheaper(n, fixed_ms=1.0)), math.inf)
    assert first != 334, "this counts one copy. The tokens are copied twice: out now, and in again when the request resumes"
    assert first == 501, (
        f"1 ms + 2 x n x {lesson.SWAP_TOKEN_MS} ms is below n x {lesson.TOKEN_MS} ms from n = 501 on, and here from {first} on")


def task_4_a_better_victim(lesson):
    """A function `my_victim(running)` at the top level, or one of the three that the lesson has."""
    victim = getattr(lesson, "my_victim", lesson.newest)
    requests = lesson.chat_requests(150, per_second=40, seed=2)
    engine = lesson.Engine(500, 16, victim)
    assert engine.serve(requests) < math.inf, (
        "the engine is stuck: a victim must be a running request, and not always the one that needs a block")
    assert all(len(request.times) == request.output for request in requests), "every request must get all of its tokens"
    latencies = [request.times[-1] - request.arrival for request in requests]
    return (f"{engine.recomputed:,} tokens computed again; latency: mean {sum(latencies) / len(latencies):.0f} ms, "
            f"longest {max(latencies):.0f} ms; one request was preempted {max(request.preempted for request in requests)} times")


def _engine(lesson, free, blocks):
    """Running requests a, b, ... that fill this many blocks of 4 slots."""
    engine = lesson.Engine(free + sum(blocks), 4, lambda running: running[-1])
    engine.free = free
    engine.running = [lesson.Request("abc"[i], float(i), 3, 99, computed=4 * count, blocks=count, times=[0.0] * (4 * count - 2))
                      for i, count in enumerate(blocks)]
    return engine, list(engine.running)
