"""Lesson 5: its steps and those of minivllm's scheduler are the same, token for token."""
from __future__ import annotations

from types import ModuleType

import pytest

from minivllm.core.scheduler import SchedulerConfig
from minivllm.core.simulate import StepCost, simulate, synthetic_requests
from tests.lessons.loading import Mistake

FORMULA = "return min(request.known - request.computed, budget)"
ORDER = "for request in decodes + prompts:"
MISTAKES = [
    Mistake(1, FORMULA, "return min(request.prompt, budget) if not request.times else 1", "would be computed again"),
    Mistake(1, FORMULA, "return min(request.prompt - request.computed, budget)", "Count output tokens too"),
    Mistake(1, FORMULA, "return request.known - request.computed", "more than the budget"),
    Mistake(2, ORDER, "for request in running:", "Plan decodes first"),
    Mistake(2, "            budget -= step[request.name]\n", "", "take each request's tokens off the budget"),
    Mistake(2, "while budget and waiting and len(running) < max_running:", "while budget and waiting:", "w must wait"),
    Mistake(3, "    if request.computed == request.known:  # the newest", "    if True:  # the newest", "middle of the prompt"),
    Mistake(3, "        request.times.append(now)\n", "        request.times.append(now)\n        request.computed += 1\n",
            "in the NEXT step"),
    Mistake(4, "running = [request for request in running if not request.finished]", "running = []", "must get all of its tokens"),
]


@pytest.mark.parametrize(("max_running", "max_tokens"), [(8, 32), (64, 100), (64, 512), (64, 8192)])
def test_lesson_and_scheduler_plan_the_same_steps(lesson: ModuleType, max_running: int, max_tokens: int) -> None:
    requests = lesson.mixed_requests(40, per_second=60)
    steps = lesson.serve(requests, max_running, max_tokens)
    config = SchedulerConfig(num_blocks=10_000, max_num_seqs=max_running, max_num_batched_tokens=max_tokens, max_model_len=8192,
                             enable_prefix_caching=False)
    work = synthetic_requests([(request.prompt, request.output) for request in requests], [request.arrival for request in requests])
    result = simulate(config, work, StepCost(lesson.STEP_MS, lesson.TOKEN_MS, 0.0))
    assert [sum(step.values()) for _, step in steps] == [step.plan.total_tokens for step in result.steps]
    for i, request in enumerate(requests):
        assert request.times == pytest.approx(result.token_times[f"r{i}", 0])
