"""Lesson 4: its continuous batching and minivllm's scheduler give every token at the same time."""
from __future__ import annotations

from types import ModuleType

import pytest

from minivllm.core.scheduler import SchedulerConfig
from minivllm.core.simulate import StepCost, simulate, synthetic_requests
from tests.lessons.loading import Mistake

COMPUTED = "        computed = sum(request.tokens_to_compute() for request in running)\n"
LEAVING = "            running = [other for other in running if other is not request]\n"
MISTAKES = [
    Mistake(1, "return max_running - len(running)", "return 0 if running else max_running", "that is static batching"),
    Mistake(1, "return max_running - len(running)", "return max_running", "3 rows are in use"),
    Mistake(1, "return [request for request in running if request.finished]",
            "return running if all(request.finished for request in running) else []", "must leave now"),
    Mistake(2, COMPUTED, "        computed = len(running)\n", "not one per row"),
    Mistake(2, COMPUTED, "        computed = 0\n", "does not depend on its tokens"),
    Mistake(2, "            now = coming[0].arrival\n", "            now += 100\n", "starts at once"),
    Mistake(2, "            if not request.finished:\n", "            if not request.finished and len(steps) > 1:\n",
            "also makes the first token"),
    Mistake(2, "            if not request.finished:\n", "            if True:\n", "keeps its row gets no more tokens"),
    Mistake(2, LEAVING, "            running.remove(request)\n", "while you iterate over it"),
    Mistake(2, "        now = steps[-1].end\n        for request in running:\n            if not request.finished:\n"
               "                request.times.append(now)\n",
            "        for request in running:\n            if not request.finished:\n                request.times.append(now)\n"
            "        now = steps[-1].end\n", "the step ENDS, 1.620 ms; yours has 0.000"),
    Mistake(3, "request.times[0] - request.arrival for", "request.times[0] for", "counts from the request's arrival"),
    Mistake(3, "for a, b in zip(request.times, request.times[1:]", "for a, b in zip([request.arrival, *request.times], request.times",
            "different causes"),
    Mistake(4, "    return 0\n", "    return len(waiting)\n", "must return an index"),
]


@pytest.mark.parametrize(("max_running", "per_second"), [(1, 3), (4, 20), (32, 100)])
def test_lesson_and_scheduler_give_every_token_at_the_same_time(lesson: ModuleType, max_running: int, per_second: float) -> None:
    requests = lesson.chat_requests(40, per_second)
    lesson.serve(lesson.ContinuousBatching(), requests, max_running)
    config = SchedulerConfig(num_blocks=10_000, max_num_seqs=max_running, max_num_batched_tokens=100_000, enable_prefix_caching=False)
    work = synthetic_requests([(request.prompt, request.output) for request in requests], [request.arrival for request in requests])
    result = simulate(config, work, StepCost(lesson.STEP_MS, lesson.TOKEN_MS, 0.0))
    for i, request in enumerate(requests):
        assert request.times == pytest.approx(result.token_times[f"r{i}", 0])
    assert lesson.report(requests).mean_ttft == pytest.approx(sum(result.times_to_first_token()) / len(requests))


def test_twice_as_many_rows_give_the_throughput_of_answer_2(lesson: ModuleType) -> None:
    rate = []
    for rows in (32, 64):
        requests = lesson.chat_requests(200, per_second=1000)
        lesson.serve(lesson.ContinuousBatching(), requests, rows)
        rate.append(round(lesson.report(requests).tokens_per_second, -2))
    assert rate == [15700, 23700]
