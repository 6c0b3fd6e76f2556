"""The package's own metamorphic tests, unchanged, on the capstone's engine: four functions of tests/engine/test_metamorphic.py.

An adapter gives that engine the interface that they use. It serves their greedy requests, and the answers are those of the package.
`make test PYTEST="tests/lessons/test_capstone_metamorphic.py -n 0" CAPSTONE_ENGINE=my_lessons/capstone_engine.py` tests a learner's engine.
"""
from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from minivllm import SamplingParams
from minivllm.course.grading import load
from tests.engine import test_metamorphic as package
from tests.lessons.loading import LESSONS

Adapted = tuple[Path, ModuleType, package.Answers]
pytestmark = pytest.mark.usefixtures("one_torch_thread")


class Adapter:
    """The parts of `LLM`, `EngineCore` and `Scheduler` that the tests use, for an engine of the capstone."""

    def __init__(self, engine: Any) -> None:
        self.llm_engine = self.core = self.scheduler = self
        self.engine, self.requests, self.sent = engine, dict[str, Any](), Counter[str]()

    def add_request(self, name: str, prompt: list[int], params: SamplingParams) -> None:
        assert params.greedy and params.max_tokens is not None and name not in self.requests
        self.requests[name] = self.engine.add(prompt, self.engine.sampling(max_tokens=params.max_tokens))

    def has_unfinished_requests(self) -> bool:
        return bool(self.engine.waiting or self.engine.running)

    def step(self) -> list[Any]:
        """The new tokens of each request. When a request has finished, another one can have its name."""
        deltas = []
        if self.has_unfinished_requests():
            self.engine.step()
        for name, request in list(self.requests.items()):
            if new := request.output[self.sent[name]:]:
                self.sent[name] += len(new)
                reason = "length" if request.finished else None
                deltas.append(SimpleNamespace(request_id=name, index=0, token_ids=new, finish_reason=reason))
            if request.finished:
                del self.requests[name], self.sent[name]
        return deltas

    def check(self) -> None:
        """Each block has as many owners as tables contain it, and is free if it has none."""
        owners = Counter(block for request in [*self.engine.running, *self.engine.waiting] for block in request.table)
        assert list(map(owners.__getitem__, range(len(self.engine.pool.owners)))) == self.engine.pool.owners
        assert sorted(self.engine.pool.free) == [block for block, count in enumerate(self.engine.pool.owners) if not count]

    def stats(self) -> Any:
        return SimpleNamespace(prefix_cache_hits=self.engine.hits, num_preemptions=self.engine.preemptions,
                               used_blocks=sum(map(bool, self.engine.pool.owners)))


@pytest.fixture
def adapted(tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Adapted:
    """The checkpoint, the lesson (or the learner's file), and the package's answers. From then on `package.engine` is the capstone's."""
    lesson = load(Path(os.environ.get("CAPSTONE_ENGINE", LESSONS / "capstone_engine" / "lesson.py")).resolve(), "capstone_engine")
    folder = tiny_llama()
    monkeypatch.setattr(package, "REQUESTS", {name: package.REQUESTS[name] for name in package.GREEDY_NAMES})
    with package.engine(folder, enable_prefix_caching=False, async_scheduling=False) as llm:
        answers = {key: tokens for name in package.REQUESTS for key, tokens in package.ask(llm, [name]).items()}

    class Counted(lesson.Engine):  # type: ignore[misc, name-defined]
        sampling, hits, preemptions = lesson.Sampling, 0, 0

        def match(self, request: Any) -> None:
            super().match(request)
            self.hits += request.computed

        def preempt(self, request: Any) -> None:
            super().preempt(request)
            self.preemptions += 1

    @contextmanager
    def engine(folder: Path, *, async_scheduling: bool, block_size: int = 16, max_num_batched_tokens: int = 2048, max_num_seqs: int = 256,
               long_prefill_token_threshold: int = 0, enable_prefix_caching: bool = True, num_gpu_blocks_override: int = 400,
               kv_offloading_size: float = 0.0, max_model_len: int = 128) -> Iterator[Adapter]:
        assert not async_scheduling and not kv_offloading_size, "the capstone has neither"
        settings = lesson.Settings(
            num_blocks=num_gpu_blocks_override - 1, block_size=block_size, max_rows=max_num_seqs, token_budget=max_num_batched_tokens,
            max_chunk=long_prefill_token_threshold or max_num_batched_tokens, prefix_caching=enable_prefix_caching)
        yield Adapter(Counted(lesson.Model.from_folder(folder), settings))

    monkeypatch.setattr(package, "engine", engine)
    return folder, lesson, answers


@pytest.mark.parametrize(("block_size", "budget", "caching"), [(1, 64, True), (3, 5, False), (16, 64, True)])
def test_block_size_budget_and_prefix_cache(adapted: Adapted, block_size: int, budget: int,
                                            caching: bool) -> None:
    folder, _, answers = adapted
    package.test_block_size_budget_and_prefix_cache_change_nothing(folder, answers, block_size, budget, caching, False)


@pytest.mark.parametrize(("rows", "threshold"), [(2, 0), (5, 4)])
def test_the_number_of_rows_and_the_chunk_size(adapted: Adapted, rows: int, threshold: int) -> None:
    folder, _, answers = adapted
    package.test_the_number_of_rows_and_the_chunk_size_change_nothing(folder, answers, rows, threshold, False)


def test_running_out_of_blocks(adapted: Adapted) -> None:
    folder, _, answers = adapted
    package.test_running_out_of_blocks_changes_nothing(folder, answers, 4, 6, 0.0, False)


def test_other_requests_in_the_batch_and_the_order_of_arrival(adapted: Adapted) -> None:
    folder, _, answers = adapted
    package.test_other_requests_in_the_batch_and_the_order_of_arrival_change_nothing(folder, answers, False)


def test_an_engine_that_shares_blocks_without_counting_owners_fails(adapted: Adapted,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    folder, lesson, answers = adapted
    monkeypatch.setattr(lesson.BlockPool, "share", lambda self, block: None)
    with pytest.raises(AssertionError):
        package.test_other_requests_in_the_batch_and_the_order_of_arrival_change_nothing(folder, answers, False)
