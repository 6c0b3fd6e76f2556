"""Traces: a recorded run replays exactly, can be summarized, and can be simulated under other settings."""
from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minivllm.cli import trace as command
from minivllm.core.plan import StepPlan, StepResult, Stop, TokenLogprobs
from minivllm.core.scheduler import Scheduler, SchedulerConfig
from minivllm.core.simulate import SimulatedRequest, StepCost, nearest_rank, recorded_requests, simulate, synthetic_requests
from minivllm.core.trace import (
    Aborted,
    Arrival,
    BeamsChosen,
    CacheReset,
    Planned,
    Readmitted,
    RecordingScheduler,
    TraceWriter,
    Updated,
    read,
    replay,
)
from minivllm.core.trace_summary import summarize
from minivllm.engine_request import EngineRequest
from minivllm.errors import InvalidInput
from minivllm.sampling_params import SamplingParams
from minivllm.scheduling_policy import POLICIES
from tests.core.harness import GRAMMAR

EOS = 7


def answer(plan: StepPlan, *, error: str | None = None) -> StepResult:
    """The result of a made-up model: a token depends only on its position and sequence. Sometimes it is EOS."""
    tokens = []
    for column, name in zip(plan.sample_from, plan.sample_ids, strict=True):
        position = plan.starts[column] + plan.num_tokens[column]
        tokens.append(((position * 31 + sum(name.encode())) % 23,))
    moves = tuple(m.move_id for m in (*plan.moves_in, *plan.moves_out))
    logprobs = tuple((TokenLogprobs(t, -1.0 / 3.0, 1, (t, 0), (-1 / 3, float("-inf"))),) for (t,) in tokens)
    return StepResult(
        plan.step_id, () if error else tuple(tokens), logprobs if plan.step_id % 3 == 0 else (), finished_moves=moves, error=error,
    )


class Driver:
    """A recording scheduler, a clock that advances by 1/3 s per step, and a queue of launched plans."""

    def __init__(self, config: SchedulerConfig, path: Path) -> None:
        self.writer = TraceWriter(path, config, {"model": "none"})
        self.scheduler = RecordingScheduler(config, self.writer)
        self.inflight: deque[StepPlan] = deque()
        self.now = 0.1

    def step(self, *, error: str | None = None, stop: int | None = None) -> None:
        while (plan := self.scheduler.schedule(self.now)) is not None:
            self.inflight.append(plan)
        self.now += 1.0 / 3.0
        if self.inflight:
            plan = self.inflight.popleft()
            stops = {stop: Stop(keep=1, matched="halt")} if stop is not None and stop < len(plan.sample_ids) and error is None else {}
            self.scheduler.update(plan, answer(plan, error=error), stops, self.now)

    def finish(self) -> None:
        for _ in range(2000):
            if not self.scheduler.has_unfinished():
                break
            self.step()
        assert not self.scheduler.has_unfinished()
        self.writer.close()


configs = st.builds(
    lambda base, budget, seqs, **kw: SchedulerConfig(
        num_blocks=base, max_num_batched_tokens=budget, max_num_seqs=seqs, eos_token_ids=(EOS,), **kw),
    st.integers(14, 40), st.integers(3, 40), st.integers(1, 6), block_size=st.sampled_from([4, 5]),
    max_model_len=st.just(48), enable_prefix_caching=st.booleans(), policy=st.sampled_from(sorted(POLICIES)),
    planning_depth=st.integers(0, 1), num_host_blocks=st.sampled_from([0, 20]), swap_fixed_cost=st.just(0.0),
    kv_windows=st.sampled_from([(None,), (None,), (8,)]),
)
requests = st.tuples(
    st.integers(1, 30), st.integers(1, 16), st.integers(1, 3), st.booleans(), st.integers(0, 3), st.sampled_from([None, "salt"]),
)
actions = st.lists(st.one_of(
    requests.map(lambda r: ("add", r)), st.just(("step", None)), st.just(("step", None)), st.just(("step", None)),
    st.integers(0, 9).map(lambda i: ("abort", i)), st.integers(0, 4).map(lambda i: ("stop", i)), st.just(("fail", None)),
    st.just(("reset", None)), st.just(("readmit", None)),
), min_size=3, max_size=40)


def new_request(number: int, spec: tuple[Any, ...], now: float) -> EngineRequest:
    prompt, output, n, ignore_eos, priority, salt = spec
    params = SamplingParams(n=n, max_tokens=output, temperature=0.7, seed=3, ignore_eos=ignore_eos, stop=["a", "b"], logit_bias={5: 1.5},
                            stop_token_ids=[] if ignore_eos else [11], bad_words_token_ids=((1, 2), (3,)))
    return EngineRequest(f"r{number}", tuple(i % 5 for i in range(prompt)), params, now, priority, salt)


def record(config: SchedulerConfig, program: list[tuple[str, Any]], path: Path) -> None:
    driver, added = Driver(config, path), 0
    for action, argument in program:
        if action == "add":
            try:
                driver.scheduler.add(new_request(added, argument, driver.now), 2**63 + added)
            except InvalidInput:
                continue
            added += 1
        elif action == "abort":
            driver.scheduler.abort(f"r{argument}")
        elif action == "reset":
            driver.scheduler.reset_prefix_cache()
        elif action == "readmit":
            if not driver.inflight:
                driver.scheduler.readmit_all()
        else:
            driver.step(error="boom" if action == "fail" else None, stop=argument if action == "stop" else None)
    driver.finish()


def small_run(path: Path, **changes: Any) -> SchedulerConfig:
    """Six requests in a small pool: there are preemptions, prefix hits, children and stops."""
    config = dataclasses.replace(SchedulerConfig(num_blocks=14, block_size=4, max_num_batched_tokens=16, max_model_len=48), **changes)
    program: list[tuple[str, Any]] = [("add", (20, 14, 1 + i % 2, True, 0, None)) for i in range(6)]
    program += [("step", None)] * 9 + [("stop", 0)]
    record(config, program, path)
    return config


# -- recording and replaying -----------------------------------------------------------------------------------------------


@given(config=configs, program=actions)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
def test_every_recorded_run_replays_exactly(tmp_path: Path, config: SchedulerConfig, program: list[tuple[str, Any]]) -> None:
    path = tmp_path / "run.jsonl"
    record(config, program, path)
    trace = read(path)
    assert trace.config == config and not trace.cut_off
    steps = list(replay(trace))
    assert [s.mismatch for s in steps if s.mismatch] == [] and len(steps) == len(trace.events)
    if steps:
        steps[-1].scheduler.check()
        assert not steps[-1].scheduler.has_unfinished()


def assert_replay_needs(kind: type, path: Path) -> None:
    trace = read(path)
    assert all(step.mismatch is None for step in replay(trace))
    without = dataclasses.replace(trace, events=tuple(e for e in trace.events if not isinstance(e, kind)))
    assert len(without.events) < len(trace.events) and any(step.mismatch for step in replay(without))


@pytest.mark.parametrize(("action", "kind"), [(("abort", 0), Aborted), (("reset", None), CacheReset), (("readmit", None), Readmitted)])
def test_every_kind_of_call_is_recorded_and_needed_for_the_replay(tmp_path: Path, action: tuple[str, Any], kind: type) -> None:
    path, add, step = tmp_path / "run.jsonl", ("add", (9, 12, 1, True, 0, None)), ("step", None)
    record(SchedulerConfig(num_blocks=64, block_size=4, max_model_len=48), [add, step, step, action, add, step], path)
    assert_replay_needs(kind, path)


def test_the_choices_of_a_beam_search_are_recorded_and_needed_for_the_replay(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    driver = Driver(SchedulerConfig(num_blocks=64, block_size=4, max_model_len=48), path)
    params = SamplingParams(max_tokens=9, ignore_eos=True, structured_outputs=GRAMMAR)
    driver.scheduler.add(EngineRequest("r0", tuple(range(9)), params))
    beams = ["r0"]
    for step in range(4):
        driver.step()
        beams = driver.scheduler.choose_beams("r0", [(beams[-1], step), (beams[-1], step + 5)])
    driver.finish()
    assert_replay_needs(BeamsChosen, path)
    assert recorded_requests(read(path)) == [], "a beam search depends on the model, so it is not simulated"


def test_recorded_events_are_read_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    seen: list[Any] = []
    config = SchedulerConfig(num_blocks=30, block_size=4, max_model_len=48)
    driver = Driver(config, path)
    new = new_request(0, (9, 4, 2, True, 0, "salt"), 0.1)
    driver.scheduler.add(new, 2**63)
    update = driver.scheduler.update
    driver.scheduler.update = lambda *args: (seen.append(args), update(*args))[1]  # type: ignore[method-assign]
    driver.step(stop=1)
    driver.finish()
    events = read(path).events
    assert events[0] == Arrival(new, 2**63)
    updates = [e for e in events if isinstance(e, Updated)]
    assert [(e.plan, e.result, dict(e.stops), e.now) for e in updates] == [(p, r, s, n) for p, r, s, n in seen]
    assert read(path).about == {"model": "none"}


def test_the_length_of_a_line_does_not_grow_with_history(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    driver = Driver(SchedulerConfig(num_blocks=200, block_size=4, max_model_len=600), path)
    driver.scheduler.add(EngineRequest("r0", (1, 2, 3), SamplingParams(max_tokens=500, ignore_eos=True)))
    driver.finish()
    sizes = [len(line) for line in path.read_text().splitlines()]
    assert max(sizes[-100:]) <= max(sizes[10:110]) + 10  # numbers have more digits


def test_a_changed_plan_is_a_mismatch(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    small_run(path)
    trace = read(path)
    at = [i for i, e in enumerate(trace.events) if isinstance(e, Planned) and e.plan is not None][5]
    plan = trace.events[at].plan  # type: ignore[union-attr]
    rows = (plan.rows[0] + 1, *plan.rows[1:])
    events = (*trace.events[:at], Planned(trace.events[at].now, dataclasses.replace(plan, rows=rows)), *trace.events[at + 1:])  # type: ignore[union-attr]
    steps = list(replay(dataclasses.replace(trace, events=events)))
    assert len(steps) == at + 1, "the replay ends at the first difference"
    mismatch = steps[-1].mismatch
    assert mismatch is not None
    assert tuple(mismatch) == (at, plan.step_id, "rows", rows, plan.rows)


def test_a_refused_request_is_not_recorded(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    driver = Driver(SchedulerConfig(num_blocks=4, block_size=4), path)
    with pytest.raises(InvalidInput):
        driver.scheduler.add(EngineRequest("r0", (1,) * 100, SamplingParams()))
    driver.finish()
    assert read(path).events == ()


def test_a_trace_with_an_incomplete_last_line_is_read_without_it(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    small_run(path)
    whole = read(path)
    path.write_text(path.read_text()[:-20])
    cut = read(path)
    assert cut.cut_off and cut.events == whole.events[:-1]
    assert all(step.mismatch is None for step in replay(cut))


@pytest.mark.parametrize(("text", "says"), [
    ("", "does not start with a config line"),
    ('{"event":"abort","request_id":"r0"}\n', "does not start with a config line"),
    ('{"event":"config","version":99,"scheduler":{},"about":{}}\n', "version 99"),
    ("hello\n", "line 1"),
    ('{"event":"dance"}\n', "line 1"),
    ('{"_":"Nonsense"}\n', "line 1"),
])
def test_a_file_that_is_no_trace_is_refused_with_the_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=says):
        read(path)
    with pytest.raises(InvalidInput, match="No such file"):
        read(tmp_path / "missing.jsonl")
    with pytest.raises(InvalidInput, match="cannot write"):
        TraceWriter(tmp_path / "no" / "folder", SchedulerConfig(num_blocks=4))


# -- the summary -----------------------------------------------------------------------------------------------------------


def test_a_summary_accounts_for_every_token(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    small_run(path)
    summary = summarize(read(path))
    assert summary.mismatch is None and summary.num_requests == 6
    assert sum(summary.finish_reasons.values()) == 9 and summary.finish_reasons["stop"] == 1  # three of the six have two children
    assert sum(summary.kinds) == sum(step.plan.total_tokens for step in summary.steps)
    assert summary.kinds.recomputed > 0 and summary.steps[-1].stats.num_preemptions > 0
    assert 0.0 < summary.waste < 0.5


def test_kinds_of_tokens_add_up_to_the_requested_lengths(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    driver = Driver(SchedulerConfig(num_blocks=64, block_size=4, max_num_batched_tokens=7, max_model_len=64), path)
    for i, (prompt, output) in enumerate([(20, 5), (3, 9)]):
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        driver.scheduler.add(EngineRequest(f"r{i}", tuple(range(100 * i, 100 * i + prompt)), params))
    driver.finish()
    kinds = summarize(read(path)).kinds
    assert kinds == (20 + 3, (5 - 1) + (9 - 1), 0), "the last sampled token is never computed"


def test_empty_slots_are_those_after_the_last_token_and_shared_ones_count_once(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    driver = Driver(SchedulerConfig(num_blocks=64, block_size=8, max_model_len=64), path)
    driver.scheduler.add(EngineRequest("r0", tuple(range(13)), SamplingParams(n=3, max_tokens=2, ignore_eos=True)))
    driver.finish()
    first, second = summarize(read(path)).steps
    assert first.empty_slots == 16 - 13, "the children share the prompt's two blocks"
    assert second.empty_slots == 3 * (16 - 14), "each owns its second block now"


# -- the same requests under other settings --------------------------------------------------------------------------------

FIXED = StepCost(base=1.0, per_token=0.0, per_context=0.0)


def one(prompt: int, output: int, at: float = 0.0) -> list[SimulatedRequest]:
    return synthetic_requests([(prompt, output)], [at])


def test_a_step_takes_as_long_as_its_cost_says() -> None:
    config = SchedulerConfig(num_blocks=64, max_num_batched_tokens=64)
    cost = StepCost(base=1.0, per_token=0.1, per_context=0.01, host=0.5)
    simulation = simulate(config, one(20, 3, at=2.0), cost)
    prefill, decode1, decode2 = 1.0 + 20 * 0.1 + 20 * 0.01, 1.0 + 0.1 + 21 * 0.01, 1.0 + 0.1 + 22 * 0.01
    expected = [2.0 + 0.5 + prefill]
    expected += [expected[0] + 0.5 + decode1, expected[0] + 1.0 + decode1 + decode2]
    assert simulation.token_times["r0", 0] == pytest.approx(expected)
    assert simulation.times_to_first_token() == pytest.approx([0.5 + prefill])
    assert simulation.duration == pytest.approx(expected[-1] - 2.0)


def test_asynchronous_scheduling_overlaps_host_and_device_time() -> None:
    requests, cost = one(8, 11), StepCost(base=1.0, per_token=0.0, per_context=0.0, host=0.5)
    synchronous, overlapped = (simulate(SchedulerConfig(num_blocks=64, planning_depth=depth), requests, cost) for depth in (0, 1))
    assert synchronous.duration == pytest.approx(11 * 1.5)
    assert overlapped.duration == pytest.approx(0.5 + 11 * 1.0)


def test_chunks_shorten_the_latency_of_other_requests_and_lengthen_the_prompts_own() -> None:
    requests = synthetic_requests([(8, 60), (1000, 1)], [0.0, 10.0])
    cost = StepCost(base=1.0, per_token=0.01, per_context=0.0)
    whole, chunked = (simulate(SchedulerConfig(num_blocks=128, max_num_batched_tokens=budget), requests, cost) for budget in (1024, 64))
    assert max(whole.inter_token_latencies()) > 11.0 > 2.0 > max(chunked.inter_token_latencies())
    assert whole.token_times["r1", 0] < chunked.token_times["r1", 0]


def test_a_simulation_under_the_recorded_settings_makes_the_same_plans(tmp_path: Path) -> None:
    """All requests arrive at the start, so only the model and the clock differ from the recorded run."""
    path = tmp_path / "run.jsonl"
    config = SchedulerConfig(num_blocks=14, block_size=4, max_num_batched_tokens=16, max_model_len=48, enable_prefix_caching=False)
    record(config, [("add", (18, 12, 1, i % 2 == 0, 0, None)) for i in range(5)], path)
    trace = read(path)
    recorded = [e.plan for e in trace.events if isinstance(e, Planned) and e.plan is not None]
    simulation = simulate(config, recorded_requests(trace), FIXED)
    assert [step.plan for step in simulation.steps] == recorded
    assert simulation.num_preemptions > 0


@pytest.mark.parametrize("changes", [
    {"num_blocks": 200}, {"planning_depth": 1}, {"max_num_batched_tokens": 5}, {"enable_prefix_caching": False},
    {"num_host_blocks": 50, "swap_fixed_cost": 0.0},
])
def test_under_any_settings_every_request_gets_its_recorded_tokens(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "run.jsonl"
    config = small_run(path)
    requests = recorded_requests(read(path))
    simulation = simulate(dataclasses.replace(config, **changes), requests, FIXED)
    for item in requests:
        assert [len(simulation.token_times[item.new.request_id, i]) for i in range(item.new.params.n)] == [len(o) for o in item.outputs]
    assert simulation.output_tokens == summarize(read(path)).num_tokens_kept


def test_successive_requests_with_the_same_id_are_distinguished(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    driver = Driver(SchedulerConfig(num_blocks=64, block_size=4, max_model_len=48, enable_prefix_caching=False), path)
    for tokens in (3, 5):
        driver.scheduler.add(EngineRequest("same", (1, 2, 3), SamplingParams(max_tokens=tokens, ignore_eos=True)))
        while driver.scheduler.has_unfinished():
            driver.step()
    driver.finish()
    trace = read(path)
    assert summarize(trace).kinds == (3 + 3, 2 + 4, 0), "the second request's prompt is not a recomputation"
    requests = recorded_requests(trace)
    assert [(w.new.request_id, len(w.outputs[0])) for w in requests] == [("same", 3), ("same/1", 5)]
    assert simulate(trace.config, requests, FIXED).output_tokens == 8


def test_a_request_that_can_never_fit_is_reported_as_refused() -> None:
    simulation = simulate(SchedulerConfig(num_blocks=4, block_size=4), one(100, 5), FIXED)
    assert simulation.refused == ("r0",) and simulation.steps == ()


@pytest.mark.parametrize("delay", [0.0, 1.5])
def test_step_costs_are_fitted_to_step_times_also_if_one_step_was_slow(tmp_path: Path, delay: float) -> None:
    path = tmp_path / "run.jsonl"
    true = StepCost(base=3e-3, per_token=2e-5, per_context=4e-7)
    config = SchedulerConfig(num_blocks=64, block_size=4, max_num_batched_tokens=16, max_model_len=48)
    writer = TraceWriter(path, config)
    scheduler = RecordingScheduler(config, writer)
    for i in range(4):
        scheduler.add(new_request(i, (5 * i + 3, 12, 1, True, 0, None), 0.0))
    now = 1.0
    while (plan := scheduler.schedule(now)) is not None:
        now += true.seconds(plan) + delay * (plan.step_id == 2)  # it compiled a kernel
        scheduler.update(plan, answer(plan), {}, now)
    writer.close()
    found = StepCost.fit(read(path))
    assert (found.base, found.per_token, found.per_context) == pytest.approx((3e-3, 2e-5, 4e-7), rel=1e-3)


def test_nearest_rank_percentiles_are_among_the_values() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [nearest_rank(values, p) for p in (0, 20, 50, 99, 100)] == [1.0, 1.0, 3.0, 5.0, 5.0]


# -- the command -----------------------------------------------------------------------------------------------------------


def run_command(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return command.run(parser.parse_args(["trace", *argv]))


def test_the_command_summarizes_replays_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    small_run(path)
    assert run_command(str(path)) == 0
    out = capsys.readouterr().out
    assert "requests    6; finished sequences: 8 length, 1 stop" in out and "recomputed" in out and "blocks used" in out
    assert run_command(str(path), "--replay") == 0
    assert "all equal" in capsys.readouterr().out
    assert run_command(str(path), "--compare", "num_blocks=200", "--compare", "policy=priority", "planning_depth=1") == 0
    table = capsys.readouterr().out
    row = next(line.split() for line in table.splitlines() if line.startswith("preemptions"))
    assert int(row[1]) > 0 and row[2] == "0", "preemptions with the recorded settings, none with 200 blocks"
    assert run_command("--synthetic", "5", "--rate", "100", "--compare", "max_num_seqs=1") == 0


def test_a_compressed_trace_is_read_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    small_run(path)
    packed = tmp_path / "run.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read(packed) == read(path)
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(InvalidInput, match=r"cannot read the trace .*\.gz"):
        read(packed)
    packed.write_bytes(path.read_bytes())
    with pytest.raises(InvalidInput, match=r"cannot read the trace .*Not a gzipped file"):
        read(packed)


def test_the_command_ends_with_1_if_a_plan_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    small_run(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    plan = next(line for line in reversed(lines) if line["event"] == "plan" and line["plan"])
    plan["plan"]["rows"][0] += 1
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run_command(str(path), "--replay") == 1
    assert "rows was" in capsys.readouterr().out
    assert run_command(str(path)) == 1


@pytest.mark.parametrize("argv", [
    [], ["FILE", "--synthetic", "3"], ["--synthetic", "3", "--replay"], ["--synthetic", "0"], ["--synthetic", "3", "--rate", "0"],
    ["FILE", "--compare", "num_block=3"], ["FILE", "--compare", "num_blocks"], ["FILE", "--compare", "num_blocks=many"],
    ["FILE", "--compare", "policy=lottery"], ["FILE", "--compare", "num_blocks=99", "--step-cost", "1,2"],
])
def test_the_command_refuses_wrong_arguments(tmp_path: Path, argv: list[str]) -> None:
    path = tmp_path / "run.jsonl"
    small_run(path)
    with pytest.raises(InvalidInput):
        run_command(*[str(path) if a == "FILE" else a for a in argv])


@pytest.mark.parametrize("name", ["kv_windows", "eos_token_ids"])
def test_the_command_neither_sets_nor_suggests_tuples(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run.jsonl"
    small_run(path)
    for argument in (f"{name}=2", f"{name[:-1]}=2"):
        with pytest.raises(InvalidInput, match="is not KEY=VALUE with a setting of the scheduler") as refused:
            run_command(str(path), "--compare", argument)
        assert f"{name}" not in str(refused.value).removeprefix(repr(argument))


def test_recording_changes_no_plan(tmp_path: Path) -> None:
    config = SchedulerConfig(num_blocks=20, block_size=4, max_num_batched_tokens=16, max_model_len=48)
    writer = TraceWriter(tmp_path / "run.jsonl", config)
    schedulers = [Scheduler(config), RecordingScheduler(config, writer)]
    for scheduler in schedulers:
        for i in range(5):
            scheduler.add(new_request(i, (4 * i + 2, 9, 1, True, 0, None), 0.0))
    for step in range(200):
        plain, recorded = (s.schedule(float(step)) for s in schedulers)
        assert plain == recorded
        if plain is None:
            break
        for scheduler in schedulers:
            scheduler.update(plain, answer(plain), {}, float(step))
    writer.close()
    assert not schedulers[0].has_unfinished()
