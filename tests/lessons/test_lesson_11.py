"""Lesson 11: its two timelines are those of minivllm's scheduler, with and without planning ahead."""
from __future__ import annotations

from types import ModuleType

import pytest

from minivllm.core.scheduler import SchedulerConfig
from minivllm.core.simulate import SimulatedRequest, StepCost, simulate
from minivllm.engine_request import EngineRequest
from minivllm.sampling_params import SamplingParams
from tests.lessons.loading import Mistake

FILL = "        self.tokens[:len(tokens)] = tokens\n"
MISTAKES = [
    Mistake(1, "if size >= rows), None)", "if size > rows), None)", "got [2, 4, 8, None]"),
    Mistake(1, "return next((size for size in sizes if size >= rows), None)", "return max(sizes) if sizes and rows <= max(sizes) else None",
            "Take the smallest"),
    Mistake(2, FILL, "        self.tokens = tokens\n", "copy INTO it"),
    Mistake(2, FILL, "", "before the replay"),
    Mistake(2, "return self.out[:len(tokens)].clone()", "return self.out[:len(tokens)]", "Return a copy"),
    Mistake(2, "return self.out[:len(tokens)].clone()", "return self.out[:size].clone()", "leave the padding out"),
    Mistake(3, "while len(launched) <= depth:", "while not launched:", "depth 1 makes no difference"),
    Mistake(3, "start = max(now, device_free)", "start = now", "at the same time"),
    Mistake(4, "return (*sizes[:-1], max(sizes[-1], max(rows)))", "return tuple(range(1, max(rows) + 1))", "at most 8 graphs"),
]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(("host", "device"), [(100.0, 300.0), (500.0, 300.0)])
def test_lesson_and_scheduler_have_the_same_timeline(lesson: ModuleType, depth: int, host: float, device: float) -> None:
    line = lesson.decode(20, depth, host, device)
    # The request may have 100 tokens, but its 20th ends it, which only its value tells.
    request = EngineRequest("r", (1,), SamplingParams(max_tokens=100, ignore_eos=True), arrival_time=0.0)
    config = SchedulerConfig(num_blocks=50, planning_depth=depth, enable_prefix_caching=False)
    result = simulate(config, [SimulatedRequest(request, (tuple(range(20)),))], StepCost(device, 0.0, 0.0, host=host))
    assert line.times == pytest.approx(result.token_times["r", 0])
    assert len(result.steps) == 20 + line.surplus
    assert [start for start, _ in line.device] == pytest.approx([step.start for step in result.steps])
