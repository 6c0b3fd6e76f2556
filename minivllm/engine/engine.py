"""`LLMEngine`: the straight line from requests to outputs, one step at a time.

    add_request ─▶ scheduler ┐                               ┌ masks ◀─ grammars
                             │ schedule() ─▶ plan ─▶ launch ─┴▶ sample ─▶ in flight ──────────┐   (ahead: at most depth + 1)
    OutputDelta ◀─ assemble ◀┴ update() ◀─ stops ◀─ detokenizer, grammars ◀─ result ◀─ wait ──┘

`step()` first launches what may be planned ahead, then waits for the oldest plan, so that with depth 1 the device already has
its next step while the host looks at this one. The engine owns no thread and no loop: whoever calls `step()` is the loop.
"""
from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from minivllm.config import EngineConfig
from minivllm.core.plan import StepPlan, StepResult, TokenLogprobs
from minivllm.core.request import SequenceUpdate, sequence_id
from minivllm.core.scheduler import Scheduler
from minivllm.core.stopping import StopRule
from minivllm.core.trace import RecordingScheduler
from minivllm.engine.detokenizer import Detokenizer
from minivllm.engine.grammar import GrammarCompiler, Grammars
from minivllm.engine.loop import EngineInfo
from minivllm.engine.metrics import EngineStats
from minivllm.engine.prompts import Prompt, check_params, check_prompt, prepare_request
from minivllm.engine.tokenizer import Tokenizer
from minivllm.engine.watch import EngineView, Watch
from minivllm.engine_request import EngineRequest
from minivllm.errors import EngineDead, InvalidInput
from minivllm.outputs import FinishReason, OutputDelta, RequestMetrics
from minivllm.sampling_params import SamplingParams
from minivllm.splitmix64 import MASK, output

if TYPE_CHECKING:
    from minivllm.engine.executor import Executor, PendingStep

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Failed:
    """A step that could not even be launched; it fails when its turn to be updated comes."""

    step_id: int
    error: Exception

    def wait(self) -> StepResult:
        raise self.error


@dataclass(slots=True)
class _Request:
    """What the engine remembers of a request for its outputs; everything else is the scheduler's."""

    params: SamplingParams
    sequences: dict[int, str]  # unfinished ones: index -> sequence id
    arrival_time: float
    first_step: int  # plans launched before it may name an earlier request of the same id
    prompt_logprobs: list[TokenLogprobs | None] | None  # [prompt length]; None: not asked for, or handed out
    first_token_times: dict[int, float] = field(default_factory=dict)


class LLMEngine:
    """Requests in, deltas out. Not thread-safe: one thread calls everything."""

    def __init__(
        self, *, executor: Executor, scheduler: Scheduler, tokenizer: Tokenizer | None, info: EngineInfo, seed: int = 0,
        planning_depth: int = 0, clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.executor = executor
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.max_model_len = info.max_model_len
        self.eos_token_ids = info.eos_token_ids
        self.vocab_size = info.vocab_size
        self._info = info
        self._seed = seed
        self._depth = planning_depth
        self._clock = clock
        self._detokenizer = Detokenizer(tokenizer)
        self._compiler = GrammarCompiler(tokenizer, info.eos_token_ids)
        self._grammars = Grammars(self._compiler)
        self._requests: dict[str, _Request] = {}
        self._owner: dict[str, str] = {}  # sequence id -> request id
        self._inflight: deque[tuple[StepPlan, PendingStep]] = deque()
        self._next_step = 0
        self._num_added = 0
        self._num_steps = 0
        self._num_failed = 0
        self._watch: Watch | None = None
        self._closed = False

    @classmethod
    def from_config(cls, config: EngineConfig) -> LLMEngine:
        """Find the model, load it, size the KV cache. The one place where all parts meet."""
        from minivllm.engine.compose import build_engine

        return build_engine(config)

    # -- requests in ----------------------------------------------------------------------------------------------------

    def add_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams, *, arrival_time: float | None = None,
        priority: int = 0, cache_salt: str | None = None, beam_search: bool = False,
    ) -> None:
        """Queue a request. Raises `InvalidInput` for anything this engine can never answer."""
        _, request = prepare_request(
            request_id, prompt, params, self.tokenizer, self.max_model_len,
            arrival_time=self._clock() if arrival_time is None else arrival_time, priority=priority, cache_salt=cache_salt,
            beam_search=beam_search,
        )
        self.add(request)

    def add(self, request: EngineRequest) -> None:
        """Queue a request that a frontend has prepared. Raises `InvalidInput` for anything this engine can never answer."""
        if self._closed:
            raise EngineDead("the engine was closed")
        request_id, params = request.request_id, request.params
        if any(name in self._owner for name in (request_id, *self._sequence_ids(request_id, params))):
            raise InvalidInput(f"request id {request_id!r} is in use: choose another", "request_id")
        if request.priority and self._info.scheduling_policy != "priority":
            raise InvalidInput(f"priority {request.priority} has no effect: start the engine with scheduling_policy='priority'", "priority")
        check_prompt(request.prompt_token_ids, self.vocab_size, self.max_model_len, params.max_tokens)
        params = check_params(params, self.tokenizer, self.vocab_size)
        wanted = params.structured_outputs
        if wanted is not None and request.beam_search:
            raise InvalidInput("beam search with structured_outputs is not supported: leave one of them out", "structured_outputs")
        start = None if wanted is None else self._compiler.compile(wanted)
        if params is not request.params:
            request = replace(request, params=params)
        rule = self.scheduler.add(request, self._seed_for(params))
        self._num_added += 1
        self._remember(request, rule)
        if start is not None:
            for name in self._sequence_ids(request_id, params):
                self._grammars.add(name, start, self._next_step)

    def preparation(self, params: SamplingParams) -> Callable[[], object] | None:
        """What `add_request` would compile first, if anything: callable on another thread, so that steps go on meanwhile."""
        wanted = params.structured_outputs
        return None if wanted is None or self._compiler.knows(wanted) else partial(self._compiler.compile, wanted)

    @staticmethod
    def _sequence_ids(request_id: str, params: SamplingParams) -> tuple[str, ...]:
        return tuple(sequence_id(request_id, i, params.n) for i in range(params.n))

    def _remember(self, request: EngineRequest, rule: StopRule) -> None:
        request_id, token_ids, params = request.request_id, request.prompt_token_ids, request.params
        ids = self._sequence_ids(request_id, params)
        wanted = params.prompt_logprobs is not None
        self._requests[request_id] = _Request(
            params=params, sequences=dict(enumerate(ids)), arrival_time=request.arrival_time, first_step=self._next_step,
            prompt_logprobs=[None] * len(token_ids) if wanted else None,
        )
        for name in ids:
            self._owner[name] = request_id
            self._detokenizer.add(name, token_ids, params, rule, self._next_step)

    def _seed_for(self, params: SamplingParams) -> int:
        """The request's own seed, or one drawn from the engine's by the number of the request: reproducible, all different."""
        if params.seed is not None:
            return params.seed & MASK
        return output(self._seed, self._num_added)

    def choose_beams(self, request_id: str, beams: Sequence[tuple[int, int]]) -> list[int]:
        """Beam search, when every beam has its token: go on with these (index, newest token) only.

        Returns the beams' indices from now on: an index named twice is forked. What is not named ends without a delta.
        """
        request = self._requests[request_id]
        names = self.scheduler.choose_beams(request_id, [(_beam_name(request_id, index), token) for index, token in beams])
        for name in request.sequences.values():
            del self._owner[name]
        indices = [_beam_index(request_id, name) for name in names]
        request.sequences = dict(zip(indices, names, strict=True))
        self._owner.update(dict.fromkeys(names, request_id))
        return indices

    def abort_request(self, request_id: str) -> list[OutputDelta]:
        """End a request now, all children. Returns their last deltas (finish reason "abort"); [] for an unknown id."""
        request = self._requests.get(request_id)
        if request is None:
            return []
        self.scheduler.abort(request_id)
        return [self._end(request_id, request, index, "abort") for index in sorted(request.sequences)]

    def _end(
        self, request_id: str, request: _Request, index: int, reason: FinishReason, error: str | None = None, param: str | None = None,
    ) -> OutputDelta:
        """The last delta of a child that ends without a token."""
        text = self._detokenizer.take(request.sequences[index], reason)
        metrics = RequestMetrics(
            arrival_time=request.arrival_time, first_token_time=request.first_token_times.get(index),
            finished_time=self._clock(),
        )
        self._forget(request_id, request, index)
        return OutputDelta(request_id=request_id, index=index, token_ids=(), text=text, finish_reason=reason, metrics=metrics,
                           error=error, error_param=param)

    def _forget(self, request_id: str, request: _Request, index: int) -> None:
        name = request.sequences.pop(index)
        del self._owner[name]
        self._grammars.forget(name)
        if not request.sequences:
            del self._requests[request_id]

    # -- the straight line ----------------------------------------------------------------------------------------------

    def step(self) -> list[OutputDelta]:
        """Launch what can be planned ahead, wait for the oldest plan, and return what it brought."""
        while len(self._inflight) <= self._depth and not self._failed_to_launch():
            plan = self.scheduler.schedule(self._clock())
            if plan is None:
                break
            self._next_step = plan.step_id + 1
            self._inflight.append((plan, self._launch(plan)))
            self.scheduler.prepare()
        if not self._inflight:
            assert not self.scheduler.has_unfinished(), "requests are unfinished, but nothing can be planned"
            return []
        return self._finish(*self._inflight.popleft())

    def _failed_to_launch(self) -> bool:
        """The newest plan's rows may be wrong in the worker: nothing is planned on them before the scheduler knows."""
        return bool(self._inflight) and isinstance(self._inflight[-1][1], _Failed)

    def _launch(self, plan: StepPlan) -> PendingStep:
        try:
            handle = self.executor.launch(plan)
            masks = self._grammars.masks(plan)  # on a GPU the step runs meanwhile
            return self.executor.sample(handle, masks)
        except Exception as error:
            return _Failed(plan.step_id, error)

    def _finish(self, plan: StepPlan, pending: PendingStep) -> list[OutputDelta]:
        self._num_steps += 1
        try:
            result = pending.wait()
        except Exception as error:
            if _is_fatal(error):
                raise EngineDead(f"{type(error).__name__}: {error}") from error
            log.exception("step %d failed; its requests end with an error", plan.step_id)
            result = StepResult(step_id=plan.step_id, token_ids=(), error=f"{type(error).__name__}: {error}")
        if self._watch is not None:
            self._watch.saw(plan)
        if result.error is not None:
            self._num_failed += 1
            stops = {}
            failed = []
        else:
            stops = self._grammars.advance(plan, result)
            failed = self._end_failed()
            stops |= self._detokenizer.scan(plan, result, stops)
            self._collect_prompt_logprobs(plan, result)
        now = self._clock()
        done = self.scheduler.update(plan, result, stops, now)
        return failed + [self._assemble(progress, result, now) for progress in done if progress.request_id in self._requests]

    def _end_failed(self) -> list[OutputDelta]:
        """A request whose grammar could not be followed ends, and nobody else notices.

        All its unfinished children end with the one that failed: an answer has one status, so the others' could not be given.
        """
        deltas: list[OutputDelta] = []
        for name, why in self._grammars.take_failed().items():
            request_id = self._owner.get(name)
            if request_id is None:
                continue  # it ended with a sibling
            request = self._requests[request_id]
            assert request.params.structured_outputs is not None
            self.scheduler.abort(request_id)
            field = request.params.structured_outputs.where
            deltas += [self._end(request_id, request, index, "error", f"{field}: {why}", field) for index in sorted(request.sequences)]
        return deltas

    def _collect_prompt_logprobs(self, plan: StepPlan, result: StepResult) -> None:
        """They come in chunks, each with its first position; a chunk recomputed after a preemption says the same again."""
        for column, first, entries in result.prompt_logprobs:
            request = self._requests.get(self._owner.get(plan.request_ids[column], ""))
            if request is not None and request.prompt_logprobs is not None and plan.step_id >= request.first_step:
                request.prompt_logprobs[first: first + len(entries)] = entries

    def _assemble(self, progress: SequenceUpdate, result: StepResult, now: float) -> OutputDelta:
        request = self._requests[progress.request_id]
        index, tokens, reason = progress.index, progress.token_ids, progress.finish_reason
        text = self._detokenizer.take(progress.sequence_id, reason)
        if tokens and index not in request.first_token_times:
            request.first_token_times[index] = now
        logprobs = None
        if request.params.logprobs is not None and progress.sample_index is not None and result.logprobs:
            logprobs = (result.logprobs[progress.sample_index] or ())[: len(tokens)]
        prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None
        metrics = None
        if reason is not None:
            metrics = RequestMetrics(
                arrival_time=request.arrival_time, first_scheduled_time=progress.first_scheduled_time,
                first_token_time=request.first_token_times.get(index), finished_time=now,
                num_preemptions=progress.num_preemptions,
            )
            self._forget(progress.request_id, request, index)
        return OutputDelta(
            progress.request_id, index, tokens, text, logprobs, reason, progress.stop_reason, progress.num_cached_tokens,
            None if prompt_logprobs is None else tuple(prompt_logprobs), metrics, result.error if reason == "error" else None,
        )

    # -- state ----------------------------------------------------------------------------------------------------------

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has work: requests without an end, or launched plans to take in."""
        return bool(self._requests) or bool(self._inflight) or self.scheduler.has_unfinished()

    def stats(self) -> EngineStats:
        core = self.scheduler.stats()
        return EngineStats(
            num_running=core.num_running, num_waiting=core.num_waiting, num_blocks=core.num_blocks,
            used_blocks=core.num_used_blocks, cached_blocks=core.num_cached_blocks, prefix_cache_queries=core.prefix_queries,
            prefix_cache_hits=core.prefix_hits, num_preemptions=core.num_preemptions, num_steps=self._num_steps,
            num_failed_steps=self._num_failed,
        )

    def watch(self, on: bool) -> None:
        """Begin or cease to look at what `view` shows."""
        self._watch = Watch(self.scheduler) if on else None

    def view(self) -> EngineView | None:
        """What there is to see since the last view; None while it is not due, or nobody watches."""
        return None if self._watch is None else self._watch.view(at_rest=not self.has_unfinished_requests())

    def info(self) -> EngineInfo:
        return self._info

    def reset_prefix_cache(self) -> None:
        """Find nothing that was computed so far again."""
        self.scheduler.reset_prefix_cache()

    def close(self) -> None:
        """Take in what was launched, then give all memory back. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        while self._inflight:
            _, pending = self._inflight.popleft()
            try:
                pending.wait()
            except Exception:
                log.debug("a step failed while the engine was closing", exc_info=True)
        self._requests.clear()
        self._owner.clear()
        if isinstance(self.scheduler, RecordingScheduler):
            self.scheduler.writer.close()
        self.executor.close()


def _beam_name(request_id: str, index: int) -> str:
    """Forks of a request with n = 1 are named as if it had more (see `core.request.sequence_id`)."""
    return sequence_id(request_id, index, index + 1)


def _beam_index(request_id: str, name: str) -> int:
    return 0 if name == request_id else int(name.removeprefix(f"{request_id}#"))


def _is_fatal(error: Exception) -> bool:
    """Whether the device is lost, so that no later step could succeed either."""
    return isinstance(error, EngineDead) or type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)
