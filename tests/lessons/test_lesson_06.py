"""Lesson 6: its engine and minivllm's scheduler preempt the same requests at the same time."""
from __future__ import annotations

from types import ModuleType

import pytest

from minivllm.core.scheduler import SchedulerConfig
from minivllm.core.simulate import StepCost, simulate, synthetic_requests
from tests.lessons.loading import Mistake

WAIT = "        self.waiting = sorted([request, *self.waiting], key=lambda other: other.arrival)\n"
SWAPPED = """        if swapped:
            self.moved += request.computed
            self.swapped += request.computed
        else:
            self.recomputed += request.computed
            request.computed = 0
"""
MISTAKES = [
    Mistake(1, "needed = math.ceil(tokens / self.block_size) - request.blocks", "needed = math.ceil(tokens / 4)", "take none"),
    Mistake(1, "        while needed > self.free:", "        if needed > self.free:", "continue until there are enough"),
    Mistake(1, "            if victim is request:  # it has", "            if False:  # it has", "It must not take blocks from a"),
    Mistake(1, "                return False\n            self.preempt(victim)",
            "                self.preempt(request)\n                return False\n            self.preempt(victim)", "keeps what it has"),
    Mistake(2, WAIT, "        self.waiting.append(request)\n", "lose its place again and again"),
    Mistake(2, "            request.computed = 0\n", "            pass\n", "gone with its blocks"),
    Mistake(2, "        request.blocks = 0\n        self.running", "        request.times, request.blocks = [], 0\n        self.running",
            "keeps its output tokens"),
    Mistake(2, SWAPPED, "        self.recomputed += request.computed\n        request.computed = 0\n", "`computed` stays"),
    Mistake(3, "fixed_ms + 2 * tokens * SWAP_TOKEN_MS", "fixed_ms + tokens * SWAP_TOKEN_MS", "copied twice"),
    Mistake(3, "fixed_ms + 2 * tokens", "2 * tokens", "a copy that starts with 1 ms"),
    Mistake(4, "    return running[-1]\n", "    return None\n", "raises AttributeError"),
    Mistake(4, "self.running.remove(request)\n        return now", "self.running.clear()\n        return now", "is stuck"),
]


@pytest.mark.parametrize(("num_blocks", "block_size"), [(80, 16), (90, 16), (98, 13)])
def test_lesson_and_scheduler_preempt_alike(lesson: ModuleType, num_blocks: int, block_size: int) -> None:
    requests = lesson.chat_requests(30, per_second=60, seed=3)
    end = lesson.Engine(num_blocks, block_size, lesson.newest).serve(requests)
    config = SchedulerConfig(num_blocks=num_blocks + 1, block_size=block_size, max_num_batched_tokens=100_000, enable_prefix_caching=False)
    work = synthetic_requests([(request.prompt, request.output) for request in requests], [request.arrival for request in requests])
    result = simulate(config, work, StepCost(lesson.STEP_MS, lesson.TOKEN_MS, 0.0))
    assert result.refused == () and result.num_preemptions == sum(request.preempted for request in requests) > 10
    assert end == pytest.approx(max(times[-1] for times in result.token_times.values()))
    for i, request in enumerate(requests):
        assert request.times == pytest.approx(result.token_times[f"r{i}", 0])


def test_both_decide_by_the_same_two_prices(lesson: ModuleType) -> None:
    """The unit of cost is the computation of one token there, and milliseconds here."""
    config = SchedulerConfig(num_blocks=10, block_size=1, swap_fixed_cost=0.13 / lesson.TOKEN_MS,
                             swap_cost_per_token=2 * lesson.SWAP_TOKEN_MS / lesson.TOKEN_MS)
    assert [lesson.swap_is_cheaper(n) for n in range(200)] == [config.swap_is_cheaper(n, n) for n in range(200)]
