"""Which LoRA adapter is in which slot, and which sequence may start: no thrash, and every request gets its turn."""
from __future__ import annotations

import random

from minivllm.core.scheduler import SchedulerConfig
from minivllm.sampling_params import SamplingParams
from tests.core.harness import Harness


def make(max_loras: int = 2, **settings: int) -> Harness:
    return Harness(SchedulerConfig(**{"num_blocks": 200, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 64,  # type: ignore[arg-type]
                                      "max_model_len": 64, "max_loras": max_loras, **settings}))


def ask(h: Harness, name: str, adapter: int, tokens: int = 4) -> None:
    h.add((1, 2, 3), SamplingParams(max_tokens=tokens, ignore_eos=True), name, adapter_id=adapter)


def started(h: Harness) -> list[str]:
    """Requests in the order of their admission."""
    return [admission.request_id for plan in h.plans for admission in plan.admitted]


def loads(h: Harness) -> list[int]:
    return [adapter for plan in h.plans for _, adapter in plan.adapter_loads]


def test_a_step_has_at_most_max_loras_adapters_and_a_running_adapter_stays() -> None:
    h = make()
    for i, adapter in enumerate((1, 2, 3, 1, 0)):
        ask(h, f"r{i}", adapter, tokens=4 + i)
    h.launch()
    assert started(h) == ["r0", "r1", "r3", "r4"]  # r2 has no slot; what has one, or needs none, passes it
    h.run()
    h.check_answers()
    assert started(h)[-1] == "r2" and loads(h) == [1, 2, 3]


def test_the_least_recently_used_idle_adapter_leaves_and_a_resident_one_is_not_loaded_again() -> None:
    h = make()
    for i, adapter in enumerate((1, 2, 1, 3, 1, 2)):
        ask(h, f"r{i}", adapter)
        h.run()
    h.check_answers()
    assert loads(h) == [1, 2, 3, 2]  # 3 replaces 2, which was used before 1


def test_requests_that_keep_arriving_for_a_resident_adapter_do_not_starve_another() -> None:
    h = make(max_loras=1)
    ask(h, "first", 1)
    h.step()
    ask(h, "other", 2)
    for i in range(100):
        ask(h, f"more{i}", 1, tokens=random.Random(i).randint(1, 9))
        h.step()
        if "other" in started(h):
            break
    passed = started(h).index("other") - 1
    assert 0 < passed <= h.config.max_running
    h.run()
    h.check_answers()


def test_requests_in_turns_for_more_adapters_than_slots_do_not_thrash() -> None:
    h = make(max_loras=2)
    for i in range(24):
        ask(h, f"r{i}", 1 + i % 4)
    h.run()
    h.check_answers()
    assert len(loads(h)) <= 14  # with an exchange for every request it would be 24


def test_a_sequence_without_a_slot_does_not_hold_up_the_base_model() -> None:
    h = make(max_loras=1, max_num_seqs=3)
    ask(h, "a", 1, tokens=20)
    h.step()
    ask(h, "b", 2)
    for i in range(30):
        ask(h, f"base{i}", 0, tokens=2)
    for _ in range(12):
        h.step()
    assert "base9" in started(h) and "b" not in started(h)
    h.run()
    h.check_answers()


def test_a_failed_plan_and_lost_rows_bring_adapters_in_again() -> None:
    h = make(max_loras=2)
    ask(h, "a", 1, tokens=8)
    ask(h, "b", 2, tokens=8)
    h.step()
    h.scheduler.readmit_all()
    h.scheduler.check()
    h.launch()
    assert loads(h) == [1, 2, 1, 2]
    h.finish()
    ask(h, "c", 1)
    h.launch(fails=True)  # all three end; the adapters are idle
    h.finish()
    ask(h, "d", 2)
    h.run()
    assert h.answers["d", 0].finish_reason == "length"


def test_an_adapter_is_in_use_until_the_last_plan_with_it_is_updated() -> None:
    h = make(planning_depth=1)
    ask(h, "a", 1)
    assert h.scheduler.uses_adapter(1) and not h.scheduler.uses_adapter(2)
    h.launch()
    h.launch()
    h.abort("a")
    assert h.scheduler.uses_adapter(1)
    while h.in_flight:
        h.finish()
    assert not h.scheduler.uses_adapter(1)
