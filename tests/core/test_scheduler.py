"""The behavior of the scheduler, one fact per test. Random sequences of calls are in test_scheduler_machine."""
from __future__ import annotations

from typing import Any

import pytest

from minivllm.core.plan import DEVICE_DRAFT, StepPlan, StepResult
from minivllm.core.scheduler import QueueFull, SchedulerConfig, sequence_id
from minivllm.core.step_planner import PROBE_STEPS
from minivllm.errors import InvalidInput
from minivllm.sampling_params import SamplingParams
from tests.core.fake_executor import Model
from tests.core.harness import GRAMMAR, Harness


def make(**settings: Any) -> Harness:
    defaults: dict[str, Any] = {"num_blocks": 200, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32, "max_model_len": 64}
    return Harness(SchedulerConfig(**{**defaults, **settings}))


def prompt(length: int, first: int = 0) -> tuple[int, ...]:
    return tuple((first + i * i) % 23 for i in range(length))


def greedy(max_tokens: int | None = 4, **settings: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **settings)


def launch(harness: Harness) -> StepPlan:
    plan = harness.launch()
    assert plan is not None
    return plan


def tokens_by_request(plan: StepPlan) -> dict[str, int]:
    return dict(zip(plan.request_ids, plan.num_tokens, strict=True))


# One counter, one budget.


def test_a_step_mixes_decodes_and_prompt_chunks_within_the_budget() -> None:
    h = make(max_num_batched_tokens=10)
    h.add(prompt(4), greedy(20), "a")
    h.step()
    h.add(prompt(25, 3), greedy(), "b")
    assert [tokens_by_request(launch(h)) for _ in range(1)] == [{"a": 1, "b": 9}]
    h.finish()
    assert tokens_by_request(launch(h)) == {"a": 1, "b": 9}


def test_decodes_come_first_in_the_plans_columns() -> None:
    h = make()
    h.add(prompt(40, 1), greedy(), "long")
    h.step()
    h.add(prompt(3), greedy(9), "short")
    h.step()
    h.add(prompt(40, 7), greedy(), "later")
    plan = launch(h)
    assert plan.request_ids[-1] == "later"
    assert plan.num_tokens[:-1] == (1,) * (len(plan.rows) - 1)


def test_a_decode_gets_its_token_in_every_step_beside_a_long_prompt() -> None:
    """The guarantee in the scheduler's docstring."""
    h = make(max_num_batched_tokens=8, max_num_seqs=8, max_model_len=400)
    for i in range(3):
        h.add(prompt(2, i), greedy(60), f"decode {i}")
    h.step()
    for i in range(2):
        h.add(prompt(300, i), greedy(2), f"long {i}")
    for _ in range(50):
        plan = launch(h)
        assert set(plan.request_ids) >= {"decode 0", "decode 1", "decode 2"}
        assert plan.total_tokens == 8, "the rest of the budget goes to the prompt"
        h.finish()


def test_there_are_never_more_rows_than_the_budget_has_tokens() -> None:
    h = make(max_num_seqs=8, max_num_batched_tokens=3)
    for i in range(6):
        h.add(prompt(1, i), greedy(10), f"r{i}")
    for _ in range(8):
        plan = launch(h)
        h.finish()
    assert len(plan.rows) == 3
    h.run()
    h.check_answers()


def test_a_long_prompt_takes_at_most_the_threshold_per_step() -> None:
    h = make(long_prefill_token_threshold=5)
    h.add(prompt(12), greedy(), "long")
    h.add(prompt(12, 5), greedy(), "other")
    assert tokens_by_request(launch(h)) == {"long": 5, "other": 5}


def test_prompts_get_the_rest_of_the_budget_in_priority_order() -> None:
    h = make(long_prefill_token_threshold=5, max_num_batched_tokens=8, max_num_seqs=3)
    h.add(prompt(1), greedy(9), "decode")
    h.step()
    h.add(prompt(20), greedy(), "first")
    h.add(prompt(20, 5), greedy(), "second")
    for _ in range(3):
        assert tokens_by_request(launch(h)) == {"decode": 1, "first": 5, "second": 2}
        h.finish()


def test_without_chunked_prefill_a_prompt_waits_until_it_fits_one_step() -> None:
    h = make(enable_chunked_prefill=False, max_num_batched_tokens=64)
    h.add(prompt(40), greedy(3), "a")
    h.add(prompt(40, 5), greedy(3), "b")
    assert tokens_by_request(launch(h)) == {"a": 40}
    h.finish()
    assert tokens_by_request(launch(h)) == {"a": 1, "b": 40}
    h.finish()
    h.run()
    h.check_answers()


def test_the_last_token_is_sampled_and_never_computed() -> None:
    h = make()
    h.add(prompt(5), greedy(3), "a")
    h.run()
    assert sum(plan.total_tokens for plan in h.plans) == 5 + 3 - 1


def test_with_max_tokens_0_only_the_prompt_is_computed() -> None:
    h = make()
    h.add(prompt(9), SamplingParams(max_tokens=0, prompt_logprobs=0, n=2), "a")
    progress = h.step()
    assert h.plans[0].sample_rows == ()
    assert sorted((p.index, p.token_ids, p.finish_reason, p.sample_index) for p in progress) == [
        (0, (), "length", None), (1, (), "length", None)]
    h.check_idle()


# Priority order and preemption.


def test_under_fcfs_requests_start_in_order_of_arrival() -> None:
    h = make(max_num_seqs=1)
    for name in "abc":
        h.add(prompt(3, ord(name)), greedy(2), name, priority=-ord(name))
    h.run()
    assert [a.request_id for plan in h.plans for a in plan.admitted] == ["a", "b", "c"]


def test_under_priority_the_lowest_number_starts_first_and_then_the_earliest_arrival() -> None:
    h = make(max_num_seqs=1, policy="priority")
    for name, priority in (("a", 2), ("b", 1), ("c", 2), ("d", 0)):
        h.add(prompt(3, ord(name)), greedy(2), name, priority=priority)
    h.run()
    assert [a.request_id for plan in h.plans for a in plan.admitted] == ["d", "b", "a", "c"]


def test_no_request_overtakes_the_first_waiting_one() -> None:
    h = make(num_blocks=11, max_model_len=40)
    h.add(prompt(20), greedy(16), "a")
    h.step()
    h.add(prompt(30, 3), greedy(2), "big")
    h.add(prompt(2, 5), greedy(2), "small")
    assert set(launch(h).request_ids) == {"a"}
    h.finish()
    h.run()
    order = [a.request_id for plan in h.plans for a in plan.admitted]
    assert order.index("big") < order.index("small")


def test_a_preempted_request_returns_to_the_head_of_the_queue() -> None:
    h = make(num_blocks=8, max_num_seqs=2, max_model_len=28)
    h.add(prompt(8), greedy(18), "first")
    h.add(prompt(8, 3), greedy(18), "second")
    h.step()
    h.add(prompt(2, 5), greedy(2), "third")
    h.run()
    order = [a.request_id for plan in h.plans for a in plan.admitted]
    assert order[:2] == ["first", "second"]
    assert order.index("second", 2) < order.index("third")
    assert h.scheduler.stats().num_preemptions > 0
    h.check_answers()


def test_the_latest_arrival_is_preempted_and_the_first_never_is() -> None:
    h = make(num_blocks=10, max_num_seqs=4, max_model_len=36)
    for i in range(4):
        h.add(prompt(4, i), greedy(28), f"r{i}")
    h.run()
    preempted = {a.request_id for plan in h.plans for a in plan.admitted
                 if sum(a.request_id == b.request_id for p in h.plans for b in p.admitted) > 1}
    assert preempted and "r0" not in preempted
    h.check_answers()


def test_a_preempted_request_reuses_its_cached_blocks() -> None:
    h = make(num_blocks=12, max_num_seqs=2, max_model_len=40)
    h.add(prompt(4), greedy(30), "first")
    h.add(prompt(4, 3), greedy(20), "second")
    h.run()
    again = [(plan, a) for plan in h.plans for a in plan.admitted if a.request_id == "second"][1:]
    assert again, "nothing was preempted"
    plan, admission = again[0]
    assert plan.starts[plan.rows.index(admission.row)] > 0


# Admission control.


def test_a_request_longer_than_the_context_is_refused_with_numbers() -> None:
    h = make(max_model_len=32)
    with pytest.raises(InvalidInput, match=r"20 prompt tokens \+ 13 .* max_model_len is 32; lower max_tokens to at most 12") as caught:
        h.add(prompt(20), greedy(13))
    assert caught.value.param == "max_tokens"
    h.add(prompt(20), greedy(12))


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    h = make(max_model_len=32)
    for max_tokens in (1, None):
        with pytest.raises(InvalidInput, match="shorten the prompt to fewer than 32 tokens") as caught:
            h.add(prompt(32), greedy(max_tokens))
        assert caught.value.param == "prompt"
    h.add(prompt(31), greedy(1))


def test_a_request_that_can_never_fit_the_blocks_is_refused_with_numbers() -> None:
    h = make(num_blocks=5)  # 4 usable blocks of 4 tokens: 16 computed tokens, so 17 in total
    with pytest.raises(InvalidInput, match="5 KV blocks of 4 tokens are needed and 4 exist"):
        h.add(prompt(10), greedy(8))
    h.add(prompt(10), greedy(7), "fits")
    h.run()
    h.check_answers()


def test_without_max_tokens_a_request_ends_at_the_limit_of_context_or_blocks() -> None:
    for settings, total in (({"max_model_len": 30}, 30), ({"num_blocks": 5}, 17)):
        h = make(**settings)
        h.add(prompt(10), greedy(None), "a")
        h.run()
        assert len(h.answers["a", 0].tokens) == total - 10
        assert h.answers["a", 0].finish_reason == "length"
        h.check_answers()


def test_window_groups_need_fewer_blocks() -> None:
    assert make(num_blocks=8, kv_windows=(4,), max_num_batched_tokens=4).add(prompt(30), greedy(20))
    with pytest.raises(InvalidInput):
        make(num_blocks=8, kv_windows=(None,), max_num_batched_tokens=4).add(prompt(30), greedy(20))


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no tokens"):
        make().add(())


def test_an_id_is_refused_while_it_is_in_use() -> None:
    h = make()
    h.add(prompt(3), greedy(1), "a")
    with pytest.raises(InvalidInput, match="'a' is in use"):
        h.scheduler.add(h.requests["a"])
    h.run()
    h.scheduler.add(h.requests["a"])


def test_a_full_queue_refuses_a_request() -> None:
    h = make(max_queue=2, max_num_seqs=1)
    h.add(prompt(3), greedy(8), "runs")
    h.step()
    h.add(prompt(3, 1))
    h.add(prompt(3, 2))
    with pytest.raises(QueueFull) as caught:
        h.add(prompt(3, 3))
    assert caught.value.param == "max_queue"
    h.run()


@pytest.mark.parametrize(("field", "value"), [
    ("num_blocks", 1), ("block_size", 0), ("max_num_seqs", 0), ("max_num_batched_tokens", 0), ("max_model_len", 0), ("kv_windows", ()),
    ("kv_windows", (0,)), ("policy", "random"), ("planning_depth", 2), ("max_queue", 0), ("num_host_blocks", -1),
    ("long_prefill_token_threshold", -1),
])
def test_a_bad_setting_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        SchedulerConfig(**{"num_blocks": 10, field: value})
    assert caught.value.param == field


def test_settings_that_contradict_unchunked_prefill_are_refused() -> None:
    with pytest.raises(InvalidInput, match="at least max_model_len"):
        make(enable_chunked_prefill=False, max_num_batched_tokens=16)
    with pytest.raises(InvalidInput, match="leave one of them out"):
        make(enable_chunked_prefill=False, max_num_batched_tokens=64, long_prefill_token_threshold=3)


# The stop rule.


def test_eos_has_no_stop_reason_and_a_stop_token_has_its_id() -> None:
    outputs = _outputs(make(), 8)
    h = make(eos_token_ids=(outputs[2],))
    h.add(prompt(5), SamplingParams(max_tokens=8), "eos")
    h.add(prompt(5), SamplingParams(max_tokens=8, stop_token_ids=[outputs[2]], ignore_eos=True), "stop")
    h.add(prompt(5), SamplingParams(max_tokens=8, ignore_eos=True), "ignored")
    h.run()
    end = outputs.index(outputs[2]) + 1
    assert (h.answers["eos", 0].tokens, h.answers["eos", 0].stop_reason) == (outputs[:end], None)
    assert (h.answers["stop", 0].tokens, h.answers["stop", 0].stop_reason) == (outputs[:end], outputs[2])
    assert h.answers["ignored", 0].tokens == outputs
    h.check_answers()


def test_stop_tokens_count_only_after_min_tokens() -> None:
    h = make()
    outputs = _outputs(h, 8)
    h.add(prompt(5), SamplingParams(max_tokens=8, min_tokens=8, stop_token_ids=outputs), "a")
    h.run()
    assert h.answers["a", 0].tokens == outputs


def _outputs(h: Harness, count: int) -> list[int]:
    """The model's outputs after prompt(5)."""
    model, tokens = Model(h.config.kv_windows), list(prompt(5))
    for _ in range(count):
        tokens.append(model.next_token(tokens, 0, 0))
    return tokens[5:]


# Asynchronous scheduling and drafts.


def test_with_depth_1_a_step_is_planned_while_the_previous_one_runs() -> None:
    h = make(planning_depth=1)
    h.add(prompt(5), greedy(4), "a")
    first, second = launch(h), launch(h)
    assert (first.starts, second.starts) == ((0,), (5,))
    assert h.launch() is None, "at most one step ahead"


def test_no_token_is_planned_after_max_tokens() -> None:
    h = make(planning_depth=1)
    h.add(prompt(5), greedy(2), "a")
    launch(h)
    launch(h)
    h.finish()
    assert h.launch() is None
    h.finish()
    h.check_idle()


def test_a_stop_is_found_one_step_late_and_the_surplus_token_is_dropped() -> None:
    h = make(planning_depth=1)
    outputs = _outputs(h, 8)
    h.add(prompt(5), SamplingParams(max_tokens=8, stop_token_ids=[outputs[0]]), "a")
    launch(h)
    launch(h)
    assert h.finish()[0].finish_reason == "stop"
    assert h.scheduler.stats().num_used_blocks == 2, "its blocks are used until the launched plan is updated"
    assert h.scheduler.has_unfinished()
    assert h.finish() == []
    assert not h.scheduler.has_unfinished()
    h.check_idle()
    h.check_answers()


def test_a_request_that_needs_its_result_is_skipped_and_the_others_are_not() -> None:
    h = make(planning_depth=1)
    h.add(prompt(5), greedy(9), "free")
    h.add(prompt(5, 3), greedy(9, structured_outputs=GRAMMAR), "grammar")
    assert launch(h).request_ids == ("free", "grammar")
    assert launch(h).request_ids == ("free",)
    h.finish()
    assert launch(h).request_ids == ("free", "grammar")
    h.run()
    h.check_answers()


def test_a_request_that_needs_its_result_can_have_two_prompt_chunks_in_flight() -> None:
    h = make(planning_depth=1, max_num_batched_tokens=8)
    h.add(prompt(20), greedy(2, structured_outputs=GRAMMAR), "a")
    assert [launch(h).num_tokens, launch(h).num_tokens] == [(8,), (8,)]


@pytest.mark.parametrize("needs_result", [True, False])
@pytest.mark.parametrize("depth", [0, 1])
def test_drafts_are_verified_in_one_step_and_rejected_ones_are_dropped(depth: int, needs_result: bool) -> None:
    h = make(planning_depth=depth)
    outputs = _outputs(h, 6)
    h.add(prompt(5), greedy(6, structured_outputs=GRAMMAR if needs_result else None), "a")
    launch(h)
    _, result = h.executor.wait()
    plan = h.in_flight.popleft()
    wrong = (outputs[3] + 1) % 23
    h.scheduler.update(plan, StepResult(plan.step_id, result.token_ids, drafts=((outputs[1], outputs[2], wrong),)), {}, 0.0)
    plan = launch(h)
    assert (plan.num_tokens, plan.drafts) == ((4,), ((outputs[1], outputs[2], wrong),))
    assert h.launch() is None, "nothing is planned after unverified drafts"
    _, result = h.executor.wait()
    assert result.token_ids == (tuple(outputs[1:4]),)
    h.in_flight.popleft()
    assert h.scheduler.update(plan, result, {}, 0.0)[0].token_ids == tuple(outputs[1:4])
    assert (launch(h).starts, h.plans[-1].drafts) == ((8,), ((),))


def test_accepted_drafts_after_a_stop_token_are_dropped() -> None:
    h = make(block_size=2)
    outputs = _outputs(h, 8)
    h.add(prompt(5), SamplingParams(max_tokens=8, stop_token_ids=[outputs[1]]), "a")
    plan = launch(h)
    h.in_flight.popleft()
    _, result = h.executor.wait()
    h.scheduler.update(plan, StepResult(plan.step_id, result.token_ids, drafts=(tuple(outputs[1:5]),)), {}, 0.0)
    plan = launch(h)
    assert plan.drafts == (tuple(outputs[1:5]),)
    update = h.finish()[0]
    assert (update.token_ids, update.finish_reason) == ((outputs[1],), "stop")
    h.check_idle()
    assert h.scheduler.stats().num_cached_blocks == 3, "7 tokens are kept, so 3 full blocks"


# Prefix caching.


def test_a_second_request_with_the_same_prompt_computes_only_its_last_block() -> None:
    h = make()
    h.add(prompt(14), greedy(2), "a")
    h.run()
    h.add(prompt(14), greedy(2), "b")
    plan = launch(h)
    assert (plan.starts, plan.num_tokens) == ((12,), (2,))
    h.finish()
    h.run()
    assert h.answers["b", 0].num_cached_tokens == 12
    assert h.scheduler.stats().prefix_hits == 12
    h.check_answers()


def test_the_last_token_is_computed_even_if_its_block_is_cached() -> None:
    h = make()
    h.add(prompt(8), greedy(1), "a")
    h.run()
    h.add(prompt(8), greedy(1), "b")
    assert (launch(h).starts, h.plans[-1].num_tokens) == ((4,), (4,))


def test_the_next_turn_of_a_chat_finds_the_previous_answer() -> None:
    h = make()
    h.add(prompt(6), greedy(8), "turn 1")
    h.run()
    h.add((*prompt(6), *h.answers["turn 1", 0].tokens, 1, 2, 3), greedy(2), "turn 2")
    h.run()
    assert h.answers["turn 2", 0].num_cached_tokens == 12  # 13 of the first turn's 14 tokens were computed, which fill 3 blocks
    h.check_answers()


@pytest.mark.parametrize("other", [{"cache_salt": "mine"}, {"adapter_id": 1}])
def test_another_salt_or_adapter_shares_nothing(other: dict[str, Any]) -> None:
    h = make(max_loras=1)
    h.add(prompt(14), greedy(2), "a")
    h.run()
    h.add(prompt(14), greedy(2), "b", **other)
    h.run()
    h.add(prompt(14), greedy(2), "c", **other)
    h.run()
    assert [h.answers[name, 0].num_cached_tokens for name in "abc"] == [0, 0, 12]


def test_a_request_with_prompt_logprobs_uses_no_cached_prefix() -> None:
    h = make()
    h.add(prompt(14), greedy(2), "a")
    h.run()
    h.add(prompt(14), greedy(2, prompt_logprobs=1), "b")
    plan = launch(h)
    assert (plan.starts, plan.admitted[0].prompt_logprobs_from) == ((0,), 1)


def test_returned_prompt_logprobs_are_not_computed_again_after_a_preemption() -> None:
    h = make(num_blocks=11, max_num_seqs=2, max_num_batched_tokens=10, max_model_len=40)
    h.add(prompt(4), greedy(34), "first")
    h.add(prompt(18, 3), greedy(10, prompt_logprobs=1), "second")
    h.run()
    first_positions = [a.prompt_logprobs_from for plan in h.plans for a in plan.admitted if a.request_id == "second"]
    assert first_positions[0] == 1 and len(first_positions) > 1
    assert all(later is None or later > 1 for later in first_positions[1:])
    h.check_answers()


def test_the_last_blocks_of_a_finished_request_are_evicted_first() -> None:
    h = make(num_blocks=9, max_model_len=32)
    h.add(prompt(17), greedy(12), "old")  # 7 full blocks
    h.run()
    h.add(prompt(13, 7), greedy(1), "new")  # evicts 3 of them
    h.run()
    h.add(prompt(17), greedy(1), "again")
    h.run()
    assert h.answers["again", 0].num_cached_tokens == 16
    h.check_answers()


def test_a_reset_of_the_prefix_cache_covers_running_requests() -> None:
    h = make()
    h.add(prompt(14), greedy(20), "runs")
    h.step()
    h.scheduler.reset_prefix_cache()
    h.add(prompt(14), greedy(1), "new")
    h.run()
    assert h.answers["new", 0].num_cached_tokens == 0
    h.add((*prompt(14), *h.answers["runs", 0].tokens), greedy(1), "longer")
    h.run()
    assert h.answers["longer", 0].num_cached_tokens == 12, "only blocks computed entirely after the reset"
    h.check_answers()


# n > 1.


def test_the_prompt_is_computed_once_for_all_children() -> None:
    h = make()
    h.add(prompt(10), greedy(4, n=3), "a")
    plan = launch(h)
    assert (plan.request_ids, plan.num_tokens) == (("a#0",), (10,))
    assert (plan.sample_from, plan.sample_ids) == ((0, 0, 0), ("a#0", "a#1", "a#2"))
    assert len({a.block_ids for a in plan.admitted}) == 1
    assert h.scheduler.stats().num_used_blocks == 3
    h.finish()
    h.run()
    assert sum(p.total_tokens for p in h.plans) == 10 + 3 * 3
    h.check_answers()


@pytest.mark.parametrize("depth", [0, 1])
def test_children_copy_the_partly_filled_block_and_the_last_owner_writes_in_place(depth: int) -> None:
    h = make(planning_depth=depth)
    h.add(prompt(10), greedy(4, n=3), "a")
    shared = launch(h).admitted[0].block_ids[0][2]
    if depth == 0:
        h.finish()
    plan = launch(h)
    assert len(plan.copies) == 2 and {c.src for c in plan.copies} == {shared}
    assert h.scheduler.stats().num_used_blocks == 3 + 2
    while h.in_flight:
        h.finish()
    h.run()
    h.check_answers()


def test_children_of_a_prompt_of_full_blocks_copy_nothing() -> None:
    h = make()
    h.add(prompt(8), greedy(4, n=3), "a")
    h.run()
    assert all(not plan.copies for plan in h.plans)
    h.check_answers()


def test_children_without_a_row_wait_and_find_the_prompts_blocks() -> None:
    h = make(max_num_seqs=2)
    h.add(prompt(10), greedy(4, n=4), "a")
    h.run()
    assert h.plans[0].sample_ids == ("a#0", "a#1")
    late = [(p, a) for p in h.plans for a in p.admitted if a.request_id in ("a#2", "a#3")]
    assert [p.starts[p.rows.index(a.row)] for p, a in late] == [8, 8]
    h.check_answers()


def test_sequence_ids() -> None:
    assert (sequence_id("r", 0, 1), sequence_id("r", 1, 3)) == ("r", "r#1")


# Windows.


def test_blocks_outside_the_window_are_freed_and_the_worker_is_told() -> None:
    h = make(kv_windows=(None, 5), enable_prefix_caching=False)
    h.add(prompt(4), greedy(40), "a")
    h.run()
    freed = [entry for plan in h.plans for entry in plan.freed_blocks]
    assert [index for _, group, index in freed if group == 1] == list(range(len(freed)))
    assert len(freed) >= 8
    h.check_answers()


def test_a_request_with_a_window_holds_a_bounded_number_of_blocks() -> None:
    h = make(kv_windows=(5,), enable_prefix_caching=False, max_num_batched_tokens=8, max_model_len=200)
    h.add(prompt(60), greedy(100), "a")
    most = 0
    while h.scheduler.has_unfinished():
        h.step()
        most = max(most, h.scheduler.stats().num_used_blocks)
    assert most <= 4  # ceil((4 + 8) / 4) + 1


def test_a_hit_needs_only_the_last_blocks_of_a_window() -> None:
    h = make(kv_windows=(5,), num_blocks=20)
    h.add(prompt(30), greedy(1), "a")
    h.run()
    h.add(prompt(30), greedy(1), "b")
    plan = launch(h)
    assert plan.starts == (28,)
    assert plan.admitted[0].block_ids[0][:6] == (0,) * 6
    h.finish()
    h.run()
    h.check_answers()


# Aborts, failed steps, lost rows.


def test_an_aborted_request_frees_its_blocks_within_one_step() -> None:
    h = make(planning_depth=1)
    h.add(prompt(10), greedy(20, n=3), "a")
    h.step()
    assert h.in_flight, "a plan that includes it is in flight"
    assert h.abort("a")
    assert h.scheduler.stats().num_used_blocks > 0
    h.finish()
    h.check_idle()
    assert not h.abort("a")


def test_a_failed_step_ends_its_requests_and_caches_nothing() -> None:
    h = make()
    h.add(prompt(14), greedy(4), "a")
    h.launch(fails=True)
    assert [(p.request_id, p.finish_reason, p.sample_index) for p in h.finish()] == [("a", "error", None)]
    h.check_idle()
    h.add(prompt(14), greedy(4), "b")
    h.run()
    assert h.answers["b", 0].num_cached_tokens == 0
    h.check_answers()


def test_other_requests_continue_when_a_step_fails_with_another_in_flight() -> None:
    h = make(planning_depth=1, max_num_seqs=4)
    h.add(prompt(5), greedy(9), "a")
    h.launch(fails=True)
    h.add(prompt(5, 3), greedy(9), "b")
    launch(h)
    h.finish()
    h.run()
    assert (h.answers["a", 0].finish_reason, h.answers["b", 0].finish_reason) == ("error", "length")
    h.check_answers()


def test_children_forked_from_a_request_end_when_its_step_fails() -> None:
    h = make(planning_depth=1, max_num_batched_tokens=8)
    h.add(prompt(14), greedy(4, n=3), "a")
    h.launch(fails=True)
    assert len(launch(h).sample_ids) == 3
    assert sorted(p.sequence_id for p in h.finish()) == ["a#0", "a#1", "a#2"]
    assert h.finish() == []
    h.check_idle()


def test_a_plan_that_could_not_be_launched_can_fail() -> None:
    h = make()
    h.add(prompt(5), greedy(4), "a")
    plan = h.scheduler.schedule(0.0)
    assert plan is not None
    assert [p.finish_reason for p in h.scheduler.fail(plan)] == ["error"]
    h.scheduler.check()
    h.check_idle()


@pytest.mark.parametrize("depth", [0, 1])
def test_lost_rows_are_rebuilt_from_plans(depth: int) -> None:
    h = make(planning_depth=depth, kv_windows=(None, 6))
    for i in range(4):
        h.add(prompt(9, i), greedy(12, n=1 + i % 2), f"r{i}")
    for _ in range(4):
        h.step()
    while h.in_flight:
        h.finish()
    h.executor.drop_rows()
    h.scheduler.readmit_all()
    h.run()
    h.check_answers()


def test_a_row_is_rebuilt_only_when_all_its_tokens_are_known() -> None:
    h = make(planning_depth=1)
    h.add(prompt(9), greedy(12), "a")
    launch(h)
    h.scheduler.readmit_all()
    assert h.launch() is None, "the token that the launched plan samples is not known yet"
    h.finish()
    assert len(launch(h).admitted[0].token_ids) == 10
    h.run()
    h.check_answers()


def test_a_plans_cost_does_not_grow_with_history() -> None:
    h = make(max_model_len=4000, num_blocks=1100, max_num_batched_tokens=4000)
    h.add(prompt(3000), greedy(40), "a")
    h.step()
    for _ in range(20):
        plan = launch(h)
        assert plan.admitted == () and sum(len(blocks) for group in plan.new_blocks for blocks in group) <= 1
        h.finish()


def test_stats_count_blocks_and_sequences() -> None:
    h = make(max_num_seqs=1)
    h.add(prompt(9), greedy(2), "a")
    h.add(prompt(9, 3), greedy(2), "b")
    h.step()
    stats = h.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_blocks, stats.num_used_blocks) == (1, 1, 199, 3)
    h.run()
    stats = h.scheduler.stats()
    assert (stats.num_used_blocks, stats.num_cached_blocks, stats.num_free_blocks) == (0, 4, 199)


def test_the_request_with_the_lowest_priority_waits_for_a_block_and_keeps_its_own() -> None:
    h = make(num_blocks=8, max_model_len=28)  # 7 usable
    h.add(prompt(9), greedy(4), "first")  # 3 blocks from the start
    h.add(prompt(15, 3), greedy(8), "second")  # 4 blocks, and a fifth from position 16 on
    h.run()
    assert [plan.request_ids for plan in h.plans[:5]] == [("first", "second")] * 2 + [("first",)] * 2 + [("second",)]
    assert h.scheduler.stats().num_preemptions == 0
    h.check_answers()


# Drafts of the worker.


@pytest.mark.parametrize("depth", [0, 1])
def test_the_worker_proposes_while_a_sequence_wants_drafts_after_prompts_and_now_and_then(depth: int) -> None:
    h = make(num_device_drafts=3, planning_depth=depth, max_model_len=400)
    seen: list[tuple[bool, int]] = []  # of each launched plan: whether it proposes, and its number of drafts

    def step(drafts: tuple[int, ...] | None) -> None:
        """Launch all plans, and apply one result with these drafts of each sample."""
        while (plan := h.scheduler.schedule(0.0)) is not None:
            plans.append(plan)
            seen.append((plan.proposes, len(plan.drafts[0])))
        plan = plans.pop(0)
        found = tuple((7,) for _ in plan.sample_rows)
        h.scheduler.update(plan, StepResult(plan.step_id, found, drafts=(drafts,) * len(found)), {}, 0.0)
        h.scheduler.check()

    plans: list[StepPlan] = []
    h.add(prompt(4), greedy(380), "a")
    for _ in range(2 * PROBE_STEPS + 2):
        step(None)
    assert seen[0] == (True, 0)  # the prompt
    probes = [i for i, (proposes, _) in enumerate(seen) if proposes][1 + depth :]  # a plan that was launched before the first result
    assert len(probes) == 2 and probes[1] - probes[0] == PROBE_STEPS
    seen.clear()
    for _ in range(5):  # it wants drafts, and the worker has none yet
        step(())
    assert seen[1:] == [(True, 0)] * (len(seen) - 1)


def test_no_drafts_are_verified_after_a_plan_that_makes_none() -> None:
    h = make(num_device_drafts=3, planning_depth=1, max_model_len=400)
    h.add(prompt(4), greedy(380), "a")
    first, second = h.scheduler.schedule(0.0), h.scheduler.schedule(0.0)
    assert first is not None and second is not None and second.proposes
    h.scheduler.update(first, StepResult(first.step_id, ((7,),), drafts=(None,)), {}, 0.0)
    third = h.scheduler.schedule(0.0)
    assert third is not None and not third.proposes
    h.scheduler.update(second, StepResult(second.step_id, ((7,),), drafts=((1, 2, 3),)), {}, 0.0)
    fourth = h.scheduler.schedule(0.0)  # the drafts of the second plan are behind the token of the third, which made none
    assert fourth is not None and fourth.drafts == ((),) and fourth.proposes
    h.scheduler.update(third, StepResult(third.step_id, ((7,),), drafts=((),)), {}, 0.0)
    fifth = h.scheduler.schedule(0.0)
    assert fifth is not None and fifth.drafts == ((),) and fifth.proposes
    h.scheduler.update(fourth, StepResult(fourth.step_id, ((7,),), drafts=((1, 2, 3),)), {}, 0.0)
    sixth = h.scheduler.schedule(0.0)
    assert sixth is not None and sixth.drafts == ((DEVICE_DRAFT,) * 3,)
