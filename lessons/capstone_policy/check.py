"""Checks of the capstone, for `minivllm course check capstone-policy`. A failed assert is the explanation that the learner reads."""
import math
from dataclasses import replace
from types import SimpleNamespace

from minivllm.core.plan import StepResult
from minivllm.core.scheduler import Scheduler, SchedulerConfig
from minivllm.core.simulate import StepCost, nearest_rank
from minivllm.engine_request import EngineRequest
from minivllm.sampling_params import SamplingParams
from minivllm.scheduling_policy import POLICIES

COST = StepCost(base=0.02, per_token=0.001, per_context=0.0)
MOST_P99 = 1.25  # times that of first come, first served


def request_of(prompt, max_tokens, arrival=0.0, name="r"):
    return EngineRequest(name, tuple(range(prompt)), SamplingParams(max_tokens=max_tokens), arrival)


def check_ranks(policy, requests):
    """A rank is a number and depends on the request only."""
    ranks = [policy(request) for request in requests]
    for rank in ranks:
        assert isinstance(rank, (int, float)) and not math.isnan(rank), f"a rank is a number, and this policy returned {rank!r}"
    again = [policy(replace(request)) for request in reversed(requests)][::-1]
    assert ranks == again, (
        "the same requests had other ranks the second time, in another order: a rank must depend on the request only. With a clock, a "
        "counter or chance in it, a recorded run could not be replayed")


def check_promises(policy):
    """The real scheduler with little memory. Its invariants are asserted after every call, and each request gets all of its tokens."""
    config = SchedulerConfig(num_blocks=12, block_size=4, max_num_seqs=3, max_num_batched_tokens=9, max_model_len=40)
    scheduler, outputs, wanted = Scheduler(config, policy), {}, {}
    for step in range(400):
        if step % 2 == 0 and step < 24:
            new = request_of(1 + 5 * step % 17, 2 + 7 * step % 13, 0.1 * step, f"r{step}")
            scheduler.add(new)
            outputs[new.request_id] = []
            wanted[new.request_id] = [1000 * step + i for i in range(new.params.max_tokens)]
        plan = scheduler.schedule(float(step))
        scheduler.check()
        if plan is not None:
            sampled = tuple((wanted[name][len(outputs[name])],) for name in plan.sample_ids)
            for update in scheduler.update(plan, StepResult(plan.step_id, sampled), {}, float(step)):
                outputs[update.request_id] += update.token_ids
            scheduler.check()
    assert not scheduler.has_unfinished(), "requests are unfinished after 400 steps: the policy lets one wait for ever"
    assert outputs == wanted, "a request did not get exactly its tokens"


def task_1_seconds_of_work(lesson):
    got = lesson.seconds_of_work(request_of(100, 1), COST, 4)
    assert got < 0.1 + 0.03, f"a prompt of 100 tokens takes 100 ms and one token of output 24 ms: expected 0.124, got {got:.3f}"
    got = lesson.seconds_of_work(request_of(1, 100), COST, 4)
    assert got > 1.0, f"100 tokens of output are 100 steps, and each takes 20 ms or more, got {got:.3f}: outputs are most of the work"
    assert abs(got - (0.001 + 100 * 0.021)) > 1e-6, (
        f"got {got:.3f}: a step does not compute this request only. With 4 rows in use it has 4 tokens, and takes 24 ms")
    assert abs(got - 2.401) < 1e-6, f"1 token of prompt takes 1 ms and 100 steps of 4 tokens take 24 ms each: expected 2.401, got {got:.3f}"
    try:
        got = lesson.seconds_of_work(request_of(1, None), COST, 4, longest=50)
    except TypeError:
        got = None
    assert got is not None, "max_tokens is None if the client gave no limit: then count `longest` tokens"
    assert abs(got - 1.201) < 1e-6, f"max_tokens is None, so the output has up to `longest` = 50 tokens: expected 1.201, got {got:.3f}"


def task_1_shortest_first(lesson):
    load = lesson.recorded_load()
    policy = lesson.ShortestFirst(load.cost, 4)
    first, shortest = lesson.run(load).times_to_first_token(), lesson.run(load, policy).times_to_first_token()
    assert len(shortest) == len(load.requests), f"{len(load.requests) - len(shortest)} requests got no token"
    ratio = lesson.mean(shortest) / lesson.mean(first)
    assert ratio < 1.0, f"with the shortest first, the mean TTFT is {ratio:.2f} times as long: a LOW rank is served first"
    assert ratio < 0.65, f"the mean TTFT is {ratio:.2f} times that of first come, first served: 0.59 is what exact work gives"
    check_ranks(policy, [request.new for request in load.requests])


def result_of(*requests):
    """A result in which these (arrival, first token) were measured."""
    return SimpleNamespace(arrivals={f"r{i}": arrival for i, (arrival, _) in enumerate(requests)},
                           token_times={(f"r{i}", 0): [first, first + 1.0] for i, (_, first) in enumerate(requests)})


def task_2_overtaking(lesson):
    got = lesson.longest_overtaking(result_of((0.0, 1.0), (1.0, 3.0), (2.0, 4.0)))
    assert got == 0.0, f"no request was overtaken, so the result is 0, got {got}"
    got = lesson.longest_overtaking(result_of((0.0, 9.0), (1.0, 2.0), (5.0, 6.0)))
    assert got != 8.0, "8 s is how long the request waited. It also waited for earlier ones: measure how much LATER an overtaker arrived"
    assert got != 1.0, "the next request overtook it, but that of 4 s later did so too: the largest difference counts"
    assert got == 5.0, f"the request of 0 s got its token after the one that arrived at 5 s: expected 5, got {got}"
    got = lesson.longest_overtaking(result_of((5.0, 6.0), (0.0, 9.0)))
    assert got == 5.0, f"requests are not always listed in the order of arrival: expected 5, got {got}"
    got = lesson.longest_overtaking(result_of((0.0, 9.0), (3.0, 9.0)))
    assert got == 0.0, f"two first tokens in the same step are no overtaking: expected 0, got {got}"


def task_3_aging(lesson):
    policy = lesson.Aging(COST, 4, patience=8.0, weight=2.0)
    small, large = request_of(100, 1, 50.0), request_of(100, 1000, 50.0)
    assert policy(large) != policy(replace(large, arrival_time=99.0)), (
        "the rank does not depend on the arrival: then a request with much work waits as long as new ones with less work arrive")
    assert policy(small) <= policy(large), "at the same arrival, the request with less work goes first: a LOW rank is served first"
    got = policy(large)
    assert got <= 58.0, (
        f"a request that arrived at 50 s has the rank {got:.2f}: one with little work that arrives at 58.1 s overtakes it, and "
        "`patience` is 8 s")
    assert abs(policy(small) - 50.248) < 1e-6, f"50 s, and 2 times 0.124 s of work: expected 50.248, got {policy(small):.3f}"
    assert abs(got - 58.0) < 1e-6, f"50 s, and 48 s of weighted work of which 8 count: expected 58, got {got:.3f}"


def task_3_the_bound_holds(lesson):
    for load in (lesson.recorded_load(), lesson.made_up_load(4)):
        policy = lesson.Aging(load.cost, load.config.max_running, patience=4.0)
        result = lesson.run(load, policy)
        longest = lesson.longest_overtaking(result)
        assert longest <= 4.0, f"a request was overtaken by one that arrived {longest:.1f} s later: `patience` was 4 s"
        first = lesson.mean(lesson.run(load).times_to_first_token())
        got = lesson.mean(result.times_to_first_token())
        assert got < first, f"{load.name}: the mean TTFT is {got:.2f} s, and {first:.2f} s without a policy: nothing was gained"
    check_ranks(policy, [request.new for request in load.requests])
    check_promises(policy)


def task_4_the_best_policy(lesson):
    loads = [lesson.recorded_load(), *map(lesson.made_up_load, (1, 2, 3))]
    lines = [_judged(lesson, loads, "`my_policy`", lesson.my_policy)]
    for name, policy in POLICIES.items():
        if name not in ("fcfs", "priority"):
            lines.append(_judged(lesson, loads, f"the package's policy {name}", lambda cost, rows, policy=policy: policy, strict=False))
    return "\n".join(lines)


def _judged(lesson, loads, name, make, strict=True):
    means, tails = [], []
    for load in loads:
        policy = make(load.cost, load.config.max_running)
        check_ranks(policy, [request.new for request in load.requests])
        check_promises(policy)
        first, got = lesson.run(load).times_to_first_token(), lesson.run(load, policy).times_to_first_token()
        means.append(lesson.mean(got) / lesson.mean(first))
        tails.append(nearest_rank(got, 99) / nearest_rank(first, 99))
        assert not strict or tails[-1] <= MOST_P99, (
            f"{load.name}: 99% of the requests wait up to {tails[-1]:.2f} times as long as first come, first served lets them: at most "
            f"{MOST_P99} is allowed. A mean that long requests pay for is no gain")
    return (f"{name}: mean TTFT {lesson.mean(means):.3f} times that of first come, first served "
            f"({', '.join(f'{ratio:.2f}' for ratio in means)}), p99 at most {max(tails):.2f} times")
