"""Runs a scheduler with the fake executor, and checks every invariant after every call."""
from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from minivllm.core.plan import StepPlan, StepResult, Stop
from minivllm.core.scheduler import Scheduler, SchedulerConfig, SequenceUpdate
from minivllm.engine_request import EngineRequest
from minivllm.sampling_params import SamplingParams, StructuredOutputsParams
from minivllm.scheduling_policy import Policy
from tests.core.fake_executor import FakeExecutor, Model, expected_outputs, stop_rule

GRAMMAR = StructuredOutputsParams(choice=("a", "b"))  # a request with a grammar is never planned past a token whose value is unknown


@dataclass
class ChildOutput:
    """The output of one child of one request."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0


class Harness:
    """The engine loop, with `check()` between all calls."""

    def __init__(
        self, config: SchedulerConfig, *, chaos: random.Random | None = None, drafts: bool = False, stop_strings: bool = False,
        policy: Policy | None = None,
    ) -> None:
        self.config = config
        self.scheduler = Scheduler(config, policy)
        self.executor = FakeExecutor(config, chaos, drafts)
        self.stop_strings = stop_strings
        self.requests: dict[str, EngineRequest] = {}
        self.seeds: dict[str, int] = {}
        self.answers: dict[tuple[str, int], ChildOutput] = {}
        self.aborted: set[str] = set()
        self.in_flight: deque[StepPlan] = deque()
        self.plans: list[StepPlan] = []
        self.now = 0.0

    def add(self, prompt: tuple[int, ...], params: SamplingParams | None = None, request_id: str | None = None, *,
            seed: int = 0, **options: object) -> str:
        name = request_id or f"r{len(self.requests)}"
        new = EngineRequest(name, tuple(prompt), params or SamplingParams(max_tokens=4), self.now, **options)  # type: ignore[arg-type]
        self.scheduler.add(new, seed)
        self.requests[name], self.seeds[name] = new, seed
        for index in range(new.params.n):
            self.answers[name, index] = ChildOutput()
        self.scheduler.check()
        return name

    def abort(self, request_id: str) -> bool:
        known = self.scheduler.abort(request_id)
        self.scheduler.check()
        if known:
            self.aborted.add(request_id)
        return known

    def launch(self, fails: bool | Callable[[StepPlan], bool] = False) -> StepPlan | None:
        """Plan and launch one step, if one can be planned. `fails`: whether its result will be an error."""
        self.now += 1.0
        plan = self.scheduler.schedule(self.now)
        self.scheduler.check()
        if plan is not None:
            self.executor.launch(plan, fails(plan) if callable(fails) else fails)
            self.in_flight.append(plan)
            self.plans.append(plan)
            if plan.step_id % 3:
                self.scheduler.prepare()
                self.scheduler.check()
        return plan

    def finish(self) -> list[SequenceUpdate]:
        """Apply the oldest launched plan's result."""
        expected = self.in_flight.popleft()
        plan, result = self.executor.wait()
        assert plan is expected
        updates = self.scheduler.update(plan, result, self._stops(plan, result), self.now)
        self.scheduler.check()
        for update in updates:
            self._record(update)
        return updates

    def step(self) -> list[SequenceUpdate]:
        """Launch until the scheduler has no more plan, then apply one result. [] if there is nothing to do."""
        while self.launch() is not None:
            pass
        if not self.in_flight:
            assert not self.scheduler.has_unfinished(), "stuck: requests are unfinished and nothing can be planned"
            return []
        return self.finish()

    def run(self, max_steps: int = 5000) -> None:
        """Run until all requests have finished, then check that nothing was leaked."""
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished():
                break
            self.step()
        assert not self.scheduler.has_unfinished(), "requests do not finish"
        self.check_idle()

    def check_idle(self) -> None:
        stats = self.scheduler.stats()
        assert stats.num_running == stats.num_waiting == 0
        if not stats.num_moves:
            assert stats.num_used_blocks == 0, "blocks leaked"
            assert stats.num_used_host_blocks == 0, "host blocks leaked"

    def check_answers(self) -> None:
        """Check that every request that was not aborted or failed has exactly the tokens of the plain computation."""
        for (name, index), answer in self.answers.items():
            new = self.requests[name]
            model = Model(self.config.kv_windows, new.adapter_id)
            outputs, reason = expected_outputs(model, new.prompt_token_ids, new.params, self.seeds[name], self.config.eos_token_ids,
                                               self.limit(new), index, self.stop_strings)
            if name in self.aborted or answer.finish_reason == "error":
                assert answer.tokens == outputs[:len(answer.tokens)], f"{name}#{index}"
            else:
                assert (answer.tokens, answer.finish_reason) == (outputs, reason), f"{name}#{index}"

    def limit(self, new: EngineRequest) -> int:
        return self.scheduler._admission.max_tokens_total(new)

    def _stops(self, plan: StepPlan, result: StepResult) -> dict[int, Stop]:
        stops: dict[int, Stop] = {}
        if not self.stop_strings:
            return stops
        for sample, (name, tokens) in enumerate(zip(plan.sample_ids, result.token_ids, strict=False)):
            request_id, _, index = name.partition("#")
            known = list(self.answers[request_id, int(index or 0)].tokens)
            for position, token in enumerate(tokens):
                known.append(token)
                if stop_rule(known):
                    stops[sample] = Stop(position + 1, "stop string")
                    break
        return stops

    def _record(self, update: SequenceUpdate) -> None:
        answer = self.answers[update.request_id, update.index]
        assert answer.finish_reason is None, f"{update.sequence_id} continues after it finished"
        assert update.request_id not in self.aborted, f"{update.sequence_id} continues after its abort"
        assert update.token_ids or update.finish_reason, "an update without a change"
        answer.tokens.extend(update.token_ids)
        answer.finish_reason, answer.stop_reason, answer.num_cached_tokens = (
            update.finish_reason, update.stop_reason, update.num_cached_tokens)
