"""An executor without a model: the next token is a hash of all tokens before it.

It knows only the plans and keeps a row table like a worker. So a wrong plan (a missing token, a row reused too early) gives wrong tokens.
"""
from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minivllm.core.plan import RowAdmission, StepPlan, StepResult, TokenLogprobs
from minivllm.core.scheduler import Scheduler, SchedulerConfig
from minivllm.engine.engine import EngineCore
from minivllm.engine.messages import EngineInfo
from minivllm.engine.tokenizer import Tokenizer

VOCAB = 400
EOS = 1


def next_token(history: Sequence[int], seed: int, child: int) -> int:
    """Never EOS, so that the request alone decides the length."""
    digest = hashlib.blake2b(repr((tuple(history), seed, child)).encode(), digest_size=8).digest()
    return 3 + int.from_bytes(digest, "little") % (VOCAB - 3)


def expected(prompt: Sequence[int], count: int, seed: int = 0, child: int = 0) -> list[int]:
    """The fake model's output after a prompt. Greedy requests use seed 0 and child 0."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, seed, child))
    return tokens[len(prompt):]


@dataclass
class _Row:
    admission: RowAdmission
    tokens: list[int]


@dataclass
class FakePending:
    result: StepResult
    error: Exception | None = None
    gate: threading.Event | None = None

    def wait(self) -> StepResult:
        if self.gate is not None:
            self.gate.wait()
        if self.error is not None:
            raise self.error
        return self.result


@dataclass
class FakeExecutor:
    num_blocks: int = 64
    choose: Callable[[Sequence[int], RowAdmission], int] | None = None  # replaces the hash
    fail_at: dict[int, Exception] = field(default_factory=dict)  # step id -> raised by launch
    fail_waiting_at: dict[int, Exception] = field(default_factory=dict)  # step id -> raised by wait
    gate: threading.Event | None = None  # `wait` waits for it
    closed: bool = False
    plans: list[StepPlan] = field(default_factory=list)
    max_outstanding: int = 0
    waited: int = 0

    def __post_init__(self) -> None:
        self._rows: dict[int, _Row] = {}
        self.launched = 0

    def launch(self, plan: StepPlan) -> StepPlan:
        if plan.step_id in self.fail_at:
            raise self.fail_at[plan.step_id]
        self.plans.append(plan)
        self.launched += 1
        for admission in plan.admitted:
            self._rows[admission.row] = _Row(admission, list(admission.token_ids))
        return plan

    def sample(self, plan: StepPlan, masks: object = None) -> FakePending:
        tokens, logprobs = [], []
        for column, row_number in zip(plan.sample_from, plan.sample_rows, strict=True):
            source = self._rows[plan.rows[column]]
            position = plan.starts[column] + plan.num_tokens[column]  # of the token to sample
            history = source.tokens[:position]
            assert len(history) == position, "the plan computes tokens that the row never got"
            row = self._rows[row_number]
            token = self._choose(history, row.admission)
            row.tokens = [*history, token]
            tokens.append((token,))
            logprobs.append(self._logprobs(history, token, row.admission.params.logprobs))
        result = StepResult(
            step_id=plan.step_id, token_ids=tuple(tokens), logprobs=tuple(logprobs) if any(logprobs) else (),
            prompt_logprobs=self._prompt_logprobs(plan),
            finished_moves=tuple(m.move_id for m in (*plan.moves_out, *plan.moves_in)),
        )
        return FakePending(result, self.fail_waiting_at.get(plan.step_id), self.gate)

    def _choose(self, history: list[int], admission: RowAdmission) -> int:
        if self.choose is not None:
            return self.choose(history, admission)
        greedy = admission.params.greedy
        return next_token(history, 0 if greedy else admission.seed, 0 if greedy else admission.child_index)

    def _logprobs(self, history: list[int], token: int, count: int | None) -> tuple[TokenLogprobs, ...] | None:
        if count is None:
            return None
        top = tuple((token + i) % VOCAB for i in range(count))
        return (TokenLogprobs(token, -float(len(history)), 1, top, tuple(-float(len(history) + i) for i in range(count))),)

    def _prompt_logprobs(self, plan: StepPlan) -> tuple[tuple[int, int, tuple[TokenLogprobs, ...]], ...]:
        found = []
        for column, row_number in enumerate(plan.rows):
            row = self._rows[row_number]
            owed = row.admission.prompt_logprobs_from
            start = plan.starts[column] + 1
            end = min(start + plan.num_tokens[column], row.admission.num_prompt_tokens)
            if owed is not None and max(start, owed) < end:
                first = max(start, owed)
                entries = tuple(TokenLogprobs(row.tokens[p], -float(p), 1) for p in range(first, end))
                found.append((column, first, entries))
        return tuple(found)

    def when_failed(self, call: Callable[[Exception], None]) -> None:
        pass

    def prepare_ahead(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True


def make_engine(
    executor: FakeExecutor | None = None, *, folder: Path | str | None = None, planning_depth: int = 0, block_size: int = 4,
    max_num_seqs: int = 16, max_num_batched_tokens: int = 64, max_model_len: int = 128, seed: int = 0,
    clock: Callable[[], float] | None = None, **scheduler: object,
) -> EngineCore:
    """An engine around the fake executor. All other parts are real."""
    executor = executor or FakeExecutor()
    config = SchedulerConfig(
        num_blocks=executor.num_blocks, block_size=block_size, max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens, max_model_len=max_model_len, planning_depth=planning_depth,
        eos_token_ids=(EOS,), **scheduler,  # type: ignore[arg-type]
    )
    info = EngineInfo(
        model="fake", model_folder="", tokenizer_folder=None if folder is None else str(folder), max_model_len=max_model_len,
        vocab_size=VOCAB, eos_token_ids=(EOS,), device="cpu", dtype="float32", num_blocks=executor.num_blocks,
        block_size=block_size, generation_config={"temperature": 0.5}, scheduling_policy=str(scheduler.get("policy", "fcfs")),
    )
    extra = {} if clock is None else {"clock": clock}
    return EngineCore(
        executor=executor, scheduler=Scheduler(config), tokenizer=None if folder is None else Tokenizer(folder), info=info,  # type: ignore[arg-type]
        seed=seed, **extra,
    )
