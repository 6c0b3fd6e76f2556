"""`EngineCore`: requests in, deltas out, one step at a time. `LLMEngine` (llm_engine.py) has vLLM's methods and is built on it.

    add ─▶ Scheduler ┐                                 ┌ masks ◀─ grammars
                     │ schedule() ─▶ plan ─▶ launch ───┴▶ sample ─▶ StepPipeline ───────────┐   (at most planning_depth + 1 plans)
    deltas ◀─ OutputProcessor ◀─ update() ◀─ stops ◀─ OutputProcessor ◀─ result ◀─ wait ────┘

`step()` first launches every plan that can be made, then waits for the oldest one. With planning depth 1 the device has its next step
while the host handles the last result. The engine owns no thread: its caller calls `step` until nothing is left to do.
"""
from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from minivllm.core.plan import StepPlan, StepResult, Stop
from minivllm.core.request import sequence_id
from minivllm.core.scheduler import Scheduler
from minivllm.core.trace import RecordingScheduler
from minivllm.engine.adapters import AdapterRegistry
from minivllm.engine.executor import Executor, PendingStep
from minivllm.engine.grammar import GrammarMasks
from minivllm.engine.grammar_compiler import DEFAULT_SECONDS, GrammarCompiler
from minivllm.engine.messages import EngineInfo
from minivllm.engine.metrics import EngineStats
from minivllm.engine.output_processor import OutputProcessor
from minivllm.engine.pooling import check_dimensions
from minivllm.engine.preparation import RequestPreparation
from minivllm.engine.prompts import Prompt, check_params, check_prompt, prepare_request
from minivllm.engine.speculation import Speculation
from minivllm.engine.tokenizer import Tokenizer
from minivllm.engine.watch import EngineView, Watch
from minivllm.engine_request import EngineRequest, LoRARequest
from minivllm.errors import EngineDead, InvalidInput
from minivllm.outputs import DraftCounts, OutputDelta
from minivllm.sampling_params import PoolingParams, SamplingParams
from minivllm.splitmix64 import MASK, output

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FailedLaunch:
    """A step that could not be launched. Taking its result raises the error, after the results of earlier steps were taken."""

    error: Exception

    def wait(self) -> StepResult:
        raise self.error


class StepPipeline:
    """The launched plans whose results have not been taken, oldest first."""

    def __init__(
        self, scheduler: Scheduler, executor: Executor, outputs: OutputProcessor, clock: Callable[[], float],
    ) -> None:
        self._scheduler, self._executor, self._outputs, self._clock = scheduler, executor, outputs, clock
        self._in_flight: deque[tuple[StepPlan, PendingStep]] = deque()
        self.next_step_id = 0
        self.num_steps = 0  # results taken
        self.num_failed = 0

    def __len__(self) -> int:
        return len(self._in_flight)

    def fill(self) -> None:
        """Launch every plan that can be made now."""
        while len(self._in_flight) <= self._scheduler.config.planning_depth and not self._launch_failed():
            plan = self._scheduler.schedule(self._clock())
            if plan is None:
                return
            self.next_step_id = plan.step_id + 1
            self._in_flight.append((plan, self._launch(plan)))
            self._scheduler.prepare()
            self._outputs.prepare_drafts(plan)

    def _launch_failed(self) -> bool:
        """After a failed launch the worker's rows may be wrong: nothing is launched before the scheduler has the error."""
        return bool(self._in_flight) and isinstance(self._in_flight[-1][1], FailedLaunch)

    def _launch(self, plan: StepPlan) -> PendingStep:
        try:
            launched = self._executor.launch(plan)
            masks = self._outputs.masks(plan)  # on a GPU the step runs meanwhile
            return self._executor.sample(launched, masks)
        except Exception as error:
            return FailedLaunch(error)
        except BaseException as interruption:  # Ctrl-C in `LLM.generate`: the step failed, and later ones need to know
            self._in_flight.append((plan, FailedLaunch(RuntimeError(f"the step was interrupted by {type(interruption).__name__}"))))
            raise

    def take(self) -> tuple[StepPlan, StepResult]:
        """Wait for the oldest plan's result. A failed step gives a result with `error`; a lost device raises `EngineDead`."""
        plan, pending = self._in_flight.popleft()
        self.num_steps += 1
        try:
            result = pending.wait()
        except Exception as error:
            if _is_fatal(error):
                raise EngineDead(f"{type(error).__name__}: {error}") from error
            log.exception("step %d failed; its requests end with an error", plan.step_id)
            result = StepResult(step_id=plan.step_id, token_ids=(), error=f"{type(error).__name__}: {error}")
        self.num_failed += result.error is not None
        return plan, result

    def drain(self) -> None:
        """Wait for all launched steps and drop their results."""
        while self._in_flight:
            _, pending = self._in_flight.popleft()
            try:
                pending.wait()
            except Exception:
                log.debug("a step failed while the engine was closing", exc_info=True)


def _is_fatal(error: Exception) -> bool:
    """Whether the device is lost, so that every later step would fail too."""
    return isinstance(error, EngineDead) or type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)


class EngineCore:
    """Not thread-safe: one thread makes all calls, except to what `preparation` returns."""

    def __init__(
        self, *, executor: Executor, scheduler: Scheduler, tokenizer: Tokenizer | None, info: EngineInfo, seed: int = 0,
        max_cpu_loras: int | None = None, max_grammar_seconds: float = DEFAULT_SECONDS,
        clock: Callable[[], float] = time.monotonic, speculation: Speculation | None = None,
    ) -> None:
        self.executor = executor
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.max_model_len = info.max_model_len
        self.eos_token_ids = info.eos_token_ids
        self.vocab_size = info.vocab_size
        self._info = info
        self._seed = seed
        self._clock = clock
        self._compiler = GrammarCompiler(tokenizer, info.eos_token_ids, max_grammar_seconds)
        self._speculation = speculation
        self._outputs = OutputProcessor(tokenizer, GrammarMasks(self._compiler), speculation)
        self._adapters = AdapterRegistry(executor, scheduler.uses_adapter, info.max_loras, max_cpu_loras)
        self._pipeline = StepPipeline(scheduler, executor, self._outputs, clock)
        self._num_added = 0
        self._watch: Watch | None = None
        self._closed = False

    # -- requests -------------------------------------------------------------------------------------------------------

    def add_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams | PoolingParams, *, arrival_time: float | None = None,
        priority: int = 0, cache_salt: str | None = None, beam_search: bool = False, lora_request: LoRARequest | None = None,
    ) -> None:
        """Queue a request. Raises `InvalidInput` for a request that this engine can never answer. The output ends at `max_model_len`.

        `beam_search`: its sequences pause after each token until `choose_beams` is called.
        """
        _, request = prepare_request(
            request_id, prompt, params, self.tokenizer, self.max_model_len,
            arrival_time=self._clock() if arrival_time is None else arrival_time, priority=priority, cache_salt=cache_salt,
            beam_search=beam_search, lora_request=lora_request,
        )
        self.add(request)

    def __contains__(self, request_id: str) -> bool:
        """Whether an unfinished request has this id."""
        return request_id in self._outputs

    @property
    def has_room(self) -> bool:
        """Whether the queue takes another request now. Steps make room."""
        return self.scheduler.has_room()

    def add(self, request: EngineRequest) -> None:
        """Queue a request whose prompt `prepare_request` or a server has prepared. Raises `InvalidInput` as `add_request` does."""
        if self._closed:
            raise EngineDead("the engine was closed")
        request = self._checked(request)
        structure = request.params.structured_outputs
        grammar = None if structure is None else self._compiler.compile(structure)
        rule = self.scheduler.add(request, self._seed_for(request.params))
        self._num_added += 1
        self._outputs.add(request, rule, grammar, self._pipeline.next_step_id)

    def _checked(self, request: EngineRequest) -> EngineRequest:
        """The request with complete parameters (see `check_params`)."""
        params = request.params
        if not isinstance(params, SamplingParams):
            raise InvalidInput(f"params must be SamplingParams, got {type(params).__name__}", "params")
        if not isinstance(request.request_id, str):
            raise InvalidInput(f"request_id must be a string, got {request.request_id!r}: pass str({request.request_id!r})", "request_id")
        keep = params.truncate_prompt_tokens
        if keep is not None and 0 < keep < len(request.prompt_token_ids):
            raise InvalidInput(f"the prompt has {len(request.prompt_token_ids)} tokens and truncate_prompt_tokens is {keep}: "
                               "truncate the prompt before the request is added", "truncate_prompt_tokens")
        if self._outputs.id_in_use(request.request_id, params):
            raise InvalidInput(f"request id {request.request_id!r} is in use: choose another", "request_id")
        if request.priority and self._info.scheduling_policy != "priority":
            raise InvalidInput(
                f"priority {request.priority} has no effect: start the engine with scheduling_policy='priority'", "priority")
        if request.beam_search and params.structured_outputs is not None:
            raise InvalidInput("beam search with structured_outputs is not supported: leave one of them out", "structured_outputs")
        check_prompt(request.prompt_token_ids, self.vocab_size, self.max_model_len, params.max_tokens)
        if params.pooling is not None:
            pooling = params.pooling.complete(self._info.pooling)
            check_dimensions(pooling, self._info.embedding_size)
            params = replace(params, pooling=pooling)
        complete = check_params(params, self.tokenizer, self.vocab_size, self._info.max_logprobs)
        adapter_id = 0 if request.lora_request is None else self._adapters.use(request.lora_request)
        return request if complete is request.params and adapter_id == request.adapter_id else replace(
            request, params=complete, adapter_id=adapter_id)

    def _seed_for(self, params: SamplingParams) -> int:
        """The user's seed; otherwise one that follows from the engine's seed and the number of the request."""
        return output(self._seed, self._num_added) if params.seed is None else params.seed & MASK

    def warm_up(self) -> None:
        """Do once what would otherwise delay the steps of other requests: before the first request."""
        self._compiler.warm_up()

    def prepare_ahead(self) -> bool:
        """Do one short piece of work, of milliseconds, that later steps would otherwise wait for. False: nothing is left."""
        return self.executor.prepare_ahead()

    def check_room(self, owner: str, num_preparing: int) -> None:
        """Raise `QueueFull` if the queue has no room for this owner, counting so many requests that are being prepared."""
        self.scheduler.check_room(owner, num_preparing)

    def preparation(self, request: EngineRequest | LoRARequest) -> RequestPreparation | None:
        """What takes long before `add`, or `load_adapter`; None: nothing. Another thread does it while steps continue.

        Raises `QueueFull` for a grammar of an owner whose grammars have taken too much time.
        """
        adapter = request if isinstance(request, LoRARequest) else request.lora_request
        read = None if adapter is None else self._adapters.preparation(adapter)
        if isinstance(request, EngineRequest) and request.params.structured_outputs is not None:
            self._outputs.check_mask_budget(request.owner)
        if isinstance(request, LoRARequest):
            return None if read is None else RequestPreparation([read], None)
        return RequestPreparation.of(request.params, self.tokenizer, self._compiler, read)

    # -- LoRA adapters --------------------------------------------------------------------------------------------------

    def load_adapter(self, request: LoRARequest) -> None:
        """Load a LoRA adapter that requests may name. Raises `InvalidInput` if it cannot be loaded, or if the name is in use."""
        self._adapters.load(request)

    def unload_adapter(self, lora_name: str) -> None:
        """Forget a LoRA adapter: new requests cannot have it, and running ones finish with it. Raises `InvalidInput` if it is unknown."""
        self._adapters.unload(lora_name)

    def adapters(self) -> tuple[LoRARequest, ...]:
        """The loaded LoRA adapters."""
        return self._adapters.loaded()

    def choose_beams(self, request_id: str, beams: Sequence[tuple[int, int]]) -> list[int]:
        """Beam search, after every beam has its token: continue with these (index, newest token) only.

        Returns the indices of the beams from now on. An index that is given twice is forked; one that is not given ends without a delta.
        """
        # With n = 1 the first sequence has the id of the request. Forks are named as if n were larger.
        beam_ids = [(sequence_id(request_id, index, index + 1), token) for index, token in beams]
        return self._outputs.choose_beams(request_id, self.scheduler.choose_beams(request_id, beam_ids))

    def abort_request(self, request_id: str) -> list[OutputDelta]:
        """End a request with all its children now. Returns their last deltas (finish reason "abort"); [] for an unknown id."""
        if request_id not in self._outputs:
            return []
        self.scheduler.abort(request_id)
        return self._outputs.end(request_id, "abort", self._clock())

    # -- steps ----------------------------------------------------------------------------------------------------------

    def step(self) -> list[OutputDelta]:
        """Launch every plan that can be made, wait for the oldest one, and return what it produced."""
        begin = self._clock()
        self._pipeline.fill()
        if not self._pipeline:
            assert not self.scheduler.has_unfinished(), "requests are unfinished, but nothing can be planned"
            return []
        plan, result = self._pipeline.take()
        self._record(plan, begin)
        failed, stops = ([], {}) if result.error is not None else self._read(plan, result)
        if result.error is None:
            result = self._outputs.propose(plan, result, stops)
        now = self._clock()
        deltas = self._outputs.assemble(self.scheduler.update(plan, result, stops, now), result, now)
        deltas = failed + deltas + self._end_failed()
        self._adapters.free_unused()
        return deltas

    def _read(self, plan: StepPlan, result: StepResult) -> tuple[list[OutputDelta], dict[int, Stop]]:
        """Pass a result to grammars and texts. Returns the last deltas of requests that failed, and where samples end."""
        if result.failed:
            self._outputs.reject(plan, result)
        stops = self._outputs.advance_grammars(plan, result)
        deltas = self._end_failed()
        stops = self._outputs.push_text(plan, result, stops)
        self._outputs.collect_prompts(plan, result)
        return deltas + self._end_failed(), stops

    def _end_failed(self) -> list[OutputDelta]:
        """End the requests that failed alone. Returns their last deltas; all other requests continue."""
        deltas: list[OutputDelta] = []
        for failure in self._outputs.take_failures():
            self.scheduler.abort(failure.request_id)
            deltas += self._outputs.end(failure.request_id, "error", self._clock(), failure.error, failure.param)
        return deltas

    def _record(self, plan: StepPlan, begin: float) -> None:
        if self._watch is not None:
            try:
                self._watch.record(plan, begin)
            except Exception:  # the page shows less, and no request is affected
                log.exception("recording steps for the page ended because of a bug")
                self._watch = None

    # -- state ----------------------------------------------------------------------------------------------------------

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has work: unfinished requests, or launched plans whose results must be taken."""
        return bool(self._outputs) or bool(self._pipeline) or self.scheduler.has_unfinished()

    def stats(self) -> EngineStats:
        core = self.scheduler.stats()
        return EngineStats(
            num_running=core.num_running, num_waiting=core.num_waiting, num_blocks=core.num_blocks,
            used_blocks=core.num_used_blocks, cached_blocks=core.num_cached_blocks, prefix_cache_queries=core.prefix_queries,
            prefix_cache_hits=core.prefix_hits, num_preemptions=core.num_preemptions, num_steps=self._pipeline.num_steps,
            num_failed_steps=self._pipeline.num_failed,
            drafts=None if self._speculation is None else DraftCounts() + self._speculation.counts,
        )

    def watch(self, on: bool) -> None:
        """Start or stop recording what `view` returns."""
        self._watch = Watch(self.scheduler, self._clock) if on else None

    def view(self) -> EngineView | None:
        """The latest steps and the scheduler's state; None if the next view is not due, or if nothing is recorded."""
        try:
            return None if self._watch is None else self._watch.view(at_rest=not self.has_unfinished_requests())
        except Exception:
            log.exception("views for the page ended because of a bug")
            self._watch = None
            return None

    def info(self) -> EngineInfo:
        return self._info

    def reset_prefix_cache(self) -> None:
        """Make all cached blocks unfindable, also those of running requests."""
        self.scheduler.reset_prefix_cache()

    def when_failed(self, call: Callable[[Exception], None]) -> None:
        """Call this, from another thread, if the engine cannot go on although no step runs."""
        self.executor.when_failed(call)

    def close(self) -> None:
        """Wait for launched steps, then free all memory. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._pipeline.drain()
        self._outputs.clear()
        self._compiler.close()
        if isinstance(self.scheduler, RecordingScheduler):
            self.scheduler.writer.close()
        self.executor.close()
