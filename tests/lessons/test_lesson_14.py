"""Lesson 14: its batch, its reading of adapters, its slots and its order of admission are those of minivllm."""
from __future__ import annotations

import random
from types import ModuleType

import pytest
import torch

from minivllm.core.adapter_slots import AdapterSlots
from minivllm.core.scheduler import SchedulerConfig
from minivllm.kernels.layout import AdapterWeights
from minivllm.kernels.reference.lora import lora_expand, lora_shrink, prepare_lora
from minivllm.lora.peft_config import PeftConfig
from minivllm.sampling_params import SamplingParams
from tests.core.harness import Harness
from tests.lessons.loading import Mistake, lesson_folder

PART = "y[rows] += adapter.scaling * ((x[rows] @ adapter.a.T) @ adapter.b.T)"
LEAVES = "next(other for other in self.slot_of if not self.users.get(other))"
MISTAKES = [
    Mistake(1, PART, PART.replace("adapter.scaling * ", ""), "by the adapter's scaling"),
    Mistake(1, PART, "y[rows] += adapter.scaling * (x[rows] @ (adapter.b @ adapter.a).T)", "Multiply x by A first"),
    Mistake(1, "if slot != BASE:\n            rows, adapter", "if True:\n            rows, adapter", "rows of the base model were changed"),
    Mistake(1, "rows, adapter = slots == slot, adapters[slot]", "rows, adapter = slots == slot, adapters[0]", "Each row has its own"),
    Mistake(2, LEAVES, "next(iter(self.slot_of))", "while a running request uses it"),
    Mistake(2, LEAVES, "list(self.slot_of)[-1]", "used longer ago"),
    Mistake(2, "        self.slot_of[adapter] = self.slot_of.pop(adapter)  # to the end\n", "", "Note each use"),
    Mistake(2, "            self.loads += 1\n", "        self.loads += 1\n", "needs no copy"),
    Mistake(3, " and (not passed or passed[0].passes < max_passes)", "", "never gets a slot"),
    Mistake(3, "            passed.append(request)\n            continue\n", "            break\n", "the base model needs no slot"),
    Mistake(3, "        if request.adapter and not (", "        if not (", "may always pass it"),
    Mistake(3, "        slots.acquire(request.adapter)\n        started", "        started", "acquires its adapter"),
    Mistake(4, "    return waiting\n", "    return waiting[::-1]\n", "at most 80 are allowed"),
]


def test_lesson_and_kernels_compute_the_same_batch(lesson: ModuleType) -> None:
    dice, rank, inputs, outputs = torch.Generator().manual_seed(0), 4, 24, 32
    adapters = [lesson.Adapter(torch.randn(rank, inputs, generator=dice), torch.randn(outputs, rank, generator=dice), 0.5 * i)
                for i in range(1, 4)]
    x, weight = torch.randn(10, inputs, generator=dice), torch.randn(outputs, inputs, generator=dice)
    slots = torch.tensor([2, 0, -1, 2, 1, -1, 0, 0, 2, -1])
    weights = AdapterWeights(torch.stack([a.a for a in adapters]), torch.stack([a.b * a.scaling for a in adapters]), (outputs,))
    groups = prepare_lora(slots, torch.full((3,), rank))
    theirs = lora_expand(x @ weight.T, lora_shrink(x, weights, groups), weights, groups)
    torch.testing.assert_close(lesson.in_one_batch(x, weight, slots, adapters), theirs)


@pytest.mark.parametrize("name", ["sql", "pirate"])
def test_lesson_and_package_read_the_same_adapter(lesson: ModuleType, name: str) -> None:
    layers, config = lesson.read_adapter(lesson_folder("14") / name), PeftConfig.read(lesson_folder("14") / name)
    assert len(layers) == 60
    assert {(len(adapter.a), adapter.scaling) for adapter in layers.values()} == {config.of_module(layer) for layer in layers}


def test_lesson_and_scheduler_choose_the_same_slots(lesson: ModuleType) -> None:
    dice, ours, theirs, running = random.Random(0), lesson.Slots(3), AdapterSlots(3, 8), []
    for _ in range(500):
        adapter = dice.randrange(7)
        assert ours.fits(adapter) == theirs.fits(adapter)
        if ours.fits(adapter):
            ours.acquire(adapter)
            theirs.acquire(adapter)
            running.append(adapter)
        while running and (dice.random() < 0.4 or len(running) > 6):
            adapter = running.pop(dice.randrange(len(running)))
            ours.release(adapter)
            theirs.release(adapter)
        assert ours.slot_of == theirs._slot_of
    assert ours.loads == len(theirs.take_loads())


@pytest.mark.parametrize("seed", range(6))
def test_lesson_and_scheduler_start_requests_in_the_same_order(lesson: ModuleType, seed: int) -> None:
    """All requests arrive first. A step of the scheduler that computes a whole prompt samples the first token, too."""
    dice, rows = random.Random(seed), 3
    requests = [lesson.Request(dice.randrange(5), dice.randint(1, 6), i) for i in range(30)]
    h = Harness(SchedulerConfig(num_blocks=200, block_size=4, max_num_seqs=rows, max_num_batched_tokens=64, max_model_len=64, max_loras=2))
    for request in requests:
        h.add((1, 2, 3), SamplingParams(max_tokens=request.steps, ignore_eos=True), str(request.arrived), adapter_id=request.adapter)
    h.run()
    theirs = [int(admission.request_id) for plan in h.plans for admission in plan.admitted]
    ours, slots, waiting, running = [], lesson.Slots(2), list(requests), []
    while waiting or running:
        started = lesson.admit(waiting, slots, rows - len(running), rows)
        ours += [request.arrived for request in started]
        waiting = [request for request in waiting if request not in started]
        running = [[request, left - 1] for request, left in [*running, *([request, request.steps] for request in started)]]
        for request, left in running:
            if not left:
                slots.release(request.adapter)
        running = [entry for entry in running if entry[1]]
    assert ours == theirs
