"""Beam search on forks: each chosen beam continues from exactly its own tokens, and shares all full blocks."""
from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from minivllm.core.plan import StepPlan
from minivllm.core.scheduler import Scheduler, SchedulerConfig
from minivllm.engine_request import EngineRequest
from minivllm.sampling_params import SamplingParams
from tests.core.fake_executor import VOCABULARY, FakeExecutor, Model


class RandomBeamSearch:
    """A minimal beam search: it chooses beams at random, and keeps the tokens of each in a separate list."""

    def __init__(self, config: SchedulerConfig, prompt: tuple[int, ...], max_tokens: int, seed: int) -> None:
        self.chaos = random.Random(seed)
        self.model = Model(config.kv_windows)
        self.scheduler = Scheduler(config)
        self.executor = FakeExecutor(config, self.chaos)
        self.beams: dict[str, list[int]] = {"beam": list(prompt)}
        self.index: dict[str, int] = {"beam": 0}
        self.others: dict[str, list[int]] = {}
        self.plans: list[StepPlan] = []
        self.scheduler.add(EngineRequest("beam", prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True),
                                         beam_search=True))

    def add_other(self, name: str, prompt: tuple[int, ...]) -> None:
        """Add an ordinary request beside the search."""
        self.scheduler.add(EngineRequest(name, prompt, SamplingParams(max_tokens=10)))
        self.others[name] = list(prompt)

    def run(self, width: int) -> None:
        sampled: dict[str, int] = {}
        for _ in range(2000):
            if not self.scheduler.has_unfinished():
                return
            while (plan := self.scheduler.schedule(0.0)) is not None:
                self.scheduler.check()
                self.executor.launch(plan)
                self.plans.append(plan)
            plan, result = self.executor.wait()
            for update in self.scheduler.update(plan, result, {}, 0.0):
                self.scheduler.check()
                name = update.sequence_id
                if name in self.others:
                    assert update.token_ids == (self.model.next_token(self.others[name], 0, 0),)
                    self.others[name] += update.token_ids
                    continue
                expected = self.model.next_token(self.beams[name], 0, self.index[name])
                assert update.token_ids == (expected,), f"{name} continued from tokens of another beam"
                sampled[name] = expected
                if update.finish_reason:
                    del self.beams[name]
            if self.beams and sampled.keys() >= self.beams.keys():  # every beam has its next token
                self._choose(width)
                sampled = {}
        raise AssertionError("the search does not finish")

    def _choose(self, width: int) -> None:
        choices = [(self.chaos.choice(sorted(self.beams)), self.chaos.randrange(VOCABULARY)) for _ in range(width)]
        names = self.scheduler.choose_beams("beam", choices)
        self.scheduler.check()
        assert len(set(names)) == width
        self.beams = {name: [*self.beams[parent], token] for name, (parent, token) in zip(names, choices, strict=True)}
        self.index = {name: int(name.partition("#")[2] or 0) for name in names}


@given(seed=st.integers(0, 2**32), width=st.integers(1, 5), block_size=st.sampled_from([1, 2, 4]), depth=st.integers(0, 1),
       num_blocks=st.integers(26, 120), max_num_seqs=st.integers(1, 6), host=st.sampled_from([0, 30]),
       windows=st.sampled_from([(None,), (None, 3)]), others=st.integers(0, 2))
def test_each_beam_continues_from_its_own_tokens(
    seed: int, width: int, block_size: int, depth: int, num_blocks: int, max_num_seqs: int, host: int, windows: tuple[int | None, ...],
    others: int,
) -> None:
    """With any number of rows and blocks, and beside other requests that need them."""
    config = SchedulerConfig(
        num_blocks=num_blocks * len(windows), block_size=block_size, max_num_seqs=max_num_seqs, max_num_batched_tokens=16,
        max_model_len=25, planning_depth=depth, num_host_blocks=host, swap_fixed_cost=0.0, kv_windows=windows)
    search = RandomBeamSearch(config, (1, 2, 3, 4, 5, 6), 12, seed)
    for i in range(others):
        search.add_other(f"other {i}", tuple(range(i, i + 9)))
    search.run(width)
    stats = search.scheduler.stats()
    assert stats.num_running == stats.num_waiting == 0 and (stats.num_moves or stats.num_used_blocks == 0)


def test_a_beam_costs_one_partly_filled_block() -> None:
    config = SchedulerConfig(num_blocks=100, block_size=16, max_model_len=128, max_num_batched_tokens=128)
    search = RandomBeamSearch(config, tuple(range(1, 23)) * 3, 6, 0)
    scheduler = search.scheduler
    most = 0
    choose = search._choose

    def observe(width: int) -> None:
        nonlocal most
        most = max(most, scheduler.stats().num_used_blocks)
        choose(width)

    search._choose = observe  # type: ignore[method-assign]
    search.run(4)
    assert most <= 4 + 4  # 66 tokens: 4 full blocks shared by all beams, and a last block for each


def test_a_search_keeps_no_finished_forks() -> None:
    config = SchedulerConfig(num_blocks=400, block_size=4, max_model_len=128, max_num_batched_tokens=128)
    search = RandomBeamSearch(config, (1, 2, 3), 60, 0)
    request = search.scheduler._state.requests["beam"]
    choose = search._choose

    def observe(width: int) -> None:
        choose(width)
        assert len(request.sequences) == width

    search._choose = observe  # type: ignore[method-assign]
    search.run(4)
    assert request.next_index > 50, "many forks were made"


def test_choosing_no_beams_finishes_the_request() -> None:
    config = SchedulerConfig(num_blocks=100, max_model_len=128, max_num_batched_tokens=128)
    search = RandomBeamSearch(config, (1, 2, 3), 6, 0)
    plan = search.scheduler.schedule(0.0)
    assert plan is not None
    search.executor.launch(plan)
    search.scheduler.update(*search.executor.wait(), {}, 0.0)
    assert search.scheduler.choose_beams("beam", []) == []
    assert not search.scheduler.has_unfinished()
    assert search.scheduler.stats().num_used_blocks == 0
