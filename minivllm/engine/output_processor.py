"""What a step's result means for each request: text, stop strings, grammars, log-probabilities, and the deltas that are sent.

    masks(plan)                    before sampling: the tokens that grammars allow
    advance_grammars, push_text    after the result: the samples that end by a grammar or a stop string  ──▶ Scheduler.update
    assemble(updates)              after the update: one `OutputDelta` for each sequence that advanced or ended
    propose(plan, result)          before the update: drafts for the next step (speculative decoding)
    take_failures                  after each of them: requests that must end, because something went wrong with them alone

An exception in the work for one sequence ends its request and no other one: many requests share a step.
`RequestState` is all that the engine remembers of a request. What the request needs for planning is the scheduler's.
"""
from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from minivllm.core.admission import QueueFull
from minivllm.core.plan import StepPlan, StepResult, Stop, TokenLogprobs
from minivllm.core.request import SequenceUpdate, sequence_id
from minivllm.core.stopping import StopRule
from minivllm.engine.detokenizer import SequenceText
from minivllm.engine.grammar import GrammarMasks, SequenceGrammar
from minivllm.engine.grammar_text import Matcher
from minivllm.engine.mask_budget import MaskAccount, MaskBudget
from minivllm.engine.pooling import PooledPrompt
from minivllm.engine.speculation import SequenceDrafts, Speculation
from minivllm.engine.tokenizer import Tokenizer
from minivllm.engine_request import EngineRequest
from minivllm.outputs import FinishReason, OutputDelta, RequestMetrics
from minivllm.sampling.logits_processors import TokenMasks
from minivllm.sampling_params import SamplingParams

log = logging.getLogger(__name__)
MASKS_TAKE_TOO_LONG = ("computing which tokens the grammar allows takes too long (mask_budget.py has the limits): "
                       "make it simpler, with fewer ways to read the same text, or lower n")


@dataclass(slots=True)
class SequenceState:
    """One unfinished child of a request."""

    request: RequestState
    id: str
    index: int
    text: SequenceText | None = None  # None: no text is wanted
    grammar: SequenceGrammar | None = None
    drafts: SequenceDrafts | None = None  # None: no speculative decoding
    first_token_time: float | None = None


@dataclass(slots=True)
class RequestState:
    """One unfinished request."""

    id: str
    params: SamplingParams
    arrival_time: float
    first_step: int  # plans launched before it may name an earlier request of the same id
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # [prompt length]; None: not wanted, or sent already
    pooled: PooledPrompt | None = None
    sequences: dict[int, SequenceState] = field(default_factory=dict)  # by index
    masks: MaskAccount = field(default_factory=MaskAccount)  # what its grammar's masks have cost


class GrammarRow(NamedTuple):
    """A sample of a sequence with a grammar."""

    sequence: SequenceState
    work: tuple[int, SequenceGrammar, tuple[int, ...]]  # first logits row, grammar, drafts

    @property
    def account(self) -> MaskAccount:
        return self.sequence.request.masks


class RequestFailure(NamedTuple):
    """A request that cannot go on."""

    request_id: str
    error: str
    param: str | None = None  # the request's field that caused it


def sequence_ids(request_id: str, params: SamplingParams) -> tuple[str, ...]:
    return tuple(sequence_id(request_id, index, params.n) for index in range(params.n))


class OutputProcessor:
    """The state of all unfinished requests. Without a tokenizer there is no text."""

    def __init__(self, tokenizer: Tokenizer | None, masks: GrammarMasks, speculation: Speculation | None = None) -> None:
        self._tokenizer = tokenizer
        self._masks = masks
        self._speculation = speculation
        self._budget = MaskBudget()
        self._requests: dict[str, RequestState] = {}
        self._sequences: dict[str, SequenceState] = {}  # by sequence id
        self._num_grammars = 0
        self._failures: dict[str, RequestFailure] = {}  # by request id, until `take_failures`

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def id_in_use(self, request_id: str, params: SamplingParams) -> bool:
        """Whether the id of this request, or of one of its sequences, is in use."""
        return request_id in self._requests or any(name in self._sequences for name in (request_id, *sequence_ids(request_id, params)))

    # -- requests come and go -------------------------------------------------------------------------------------------

    def add(self, request: EngineRequest, rule: StopRule, grammar: Matcher | None, first_step: int) -> None:
        """Start a request that takes part from plan `first_step` on. `grammar`: a matcher to copy for each sequence."""
        params, prompt = request.params, request.prompt_token_ids
        state = RequestState(request.request_id, params, request.arrival_time, first_step, masks=MaskAccount(request.owner))
        if params.prompt_logprobs is not None:
            state.prompt_logprobs = [None] * len(prompt)
        if params.pooling is not None:
            state.pooled = PooledPrompt(params.pooling, len(prompt))
        self._requests[state.id] = state
        for index, name in enumerate(sequence_ids(state.id, params)):
            sequence = SequenceState(state, name, index)
            if self._tokenizer is not None and params.detokenize:
                sequence.text = SequenceText(self._tokenizer.stream(prompt, params.skip_special_tokens), params, rule)
            if grammar is not None:
                sequence.grammar = SequenceGrammar(grammar)
                self._num_grammars += 1
            if self._speculation is not None and not request.beam_search and state.pooled is None:
                sequence.drafts = self._speculation.start(prompt)
            state.sequences[index] = self._sequences[name] = sequence

    def choose_beams(self, request_id: str, names: Sequence[str]) -> list[int]:
        """The sequences of a beam search from now on. Returns their indices."""
        request = self._requests[request_id]
        for sequence in request.sequences.values():
            del self._sequences[sequence.id]
        indices = [_beam_index(request_id, name) for name in names]
        request.sequences = {
            index: request.sequences.get(index) or SequenceState(request, name, index) for index, name in zip(indices, names, strict=True)
        }
        self._sequences.update((sequence.id, sequence) for sequence in request.sequences.values())
        return indices

    def end(
        self, request_id: str, reason: FinishReason, now: float, error: str | None = None, param: str | None = None,
    ) -> list[OutputDelta]:
        """End a request without another token. Returns the last deltas of its children."""
        deltas = []
        for _, sequence in sorted(self._requests[request_id].sequences.items()):
            text = ""
            try:
                text = "" if sequence.text is None else sequence.text.take(finished=True)
            except Exception:
                log.exception("the last text of %s is lost because of a bug", sequence.id)
            deltas.append(OutputDelta(request_id, sequence.index, (), text, finish_reason=reason, error=error, error_param=param,
                                      metrics=_metrics(sequence, now)))
            self._forget(sequence)
        return deltas

    def _forget(self, sequence: SequenceState) -> None:
        request = sequence.request
        del request.sequences[sequence.index], self._sequences[sequence.id]
        if not request.sequences:
            del self._requests[request.id]
        self._num_grammars -= sequence.grammar is not None

    # -- failures of one request --------------------------------------------------------------------------------------

    def _fail(self, sequence: SequenceState, bug: Exception) -> None:
        """The work for this sequence raised an exception."""
        request_id = sequence.request.id
        log.error("request %s ends because of a bug", request_id, exc_info=bug)
        self._failures.setdefault(request_id, RequestFailure(request_id, f"the request failed because of a bug ({type(bug).__name__})"))

    def take_failures(self) -> list[RequestFailure]:
        """The requests that must end now."""
        failures, self._failures = self._failures, {}
        return [failure for failure in failures.values() if failure.request_id in self._requests]

    def reject(self, plan: StepPlan, result: StepResult) -> None:
        """End the requests whose rows the worker could not prepare."""
        for name, error in result.failed:
            sequence = self._sequences.get(name)
            if sequence is not None and plan.step_id >= sequence.request.first_step:
                self._failures.setdefault(sequence.request.id, RequestFailure(sequence.request.id, error))

    def check_mask_budget(self, owner: str) -> None:
        """Raise `QueueFull` if the grammars of this owner's requests have taken too much of the engine's time."""
        if self._budget.exhausted(owner):
            raise QueueFull("the grammars of this key's requests have taken too much time: make them simpler, and try again later",
                            "structured_outputs")

    def clear(self) -> None:
        """Forget all requests."""
        self._requests.clear()
        self._sequences.clear()
        self._num_grammars = 0

    # -- a step ---------------------------------------------------------------------------------------------------------

    def masks(self, plan: StepPlan) -> TokenMasks | None:
        """The tokens that grammars allow; None if the plan samples for no sequence with a grammar."""
        if not self._num_grammars:
            return None
        together: list[GrammarRow] = []
        alone: dict[str, list[GrammarRow]] = {}  # by request
        index = 0  # of a logits row: a sample has one, and one more for each of its drafts
        for name, column in zip(plan.sample_ids, plan.sample_from, strict=True):
            sequence, drafts = self._sequences.get(name), plan.drafts[column]
            if sequence is not None and sequence.grammar is not None:
                row = GrammarRow(sequence, (index, sequence.grammar, drafts))
                (alone.setdefault(sequence.request.id, []) if row.account.watched else together).append(row)
            index += 1 + len(drafts)
        masks: list[TokenMasks] = []
        self._budget.begin_step()
        count = self._budget.together([row.account for row in together], lambda part: self._fill(together[part], masks))
        for row in together[count:]:
            alone.setdefault(row.sequence.request.id, []).append(row)
        for rows in alone.values():
            if not self._budget.alone(rows[0].account, len(rows), lambda part, rows=rows: self._fill(rows[part], masks)):  # type: ignore[misc]
                self._fail_grammar(rows[0].sequence.request, MASKS_TAKE_TOO_LONG)
        return TokenMasks.join(masks) if masks else None

    def _fill(self, rows: Sequence[GrammarRow], masks: list[TokenMasks]) -> None:
        try:
            masks.append(self._masks.fill([row.work for row in rows]))
        except Exception as bug:  # they are computed together: now each on its own
            if len(rows) == 1:
                self._fail(rows[0].sequence, bug)
            else:
                for row in rows:
                    self._fill([row], masks)

    def _fail_grammar(self, request: RequestState, why: str) -> None:
        assert request.params.structured_outputs is not None
        where = request.params.structured_outputs.where
        self._failures.setdefault(request.id, RequestFailure(request.id, f"{where}: {why}", where))

    def _sampled(self, plan: StepPlan) -> list[SequenceState | None]:
        """The sequence of each sample; None if it has ended since the plan was made."""
        get, step_id = self._sequences.get, plan.step_id
        return [s if (s := get(name)) is not None and step_id >= s.request.first_step else None for name in plan.sample_ids]

    def advance_grammars(self, plan: StepPlan, result: StepResult) -> dict[int, Stop]:
        """Pass the sampled tokens to the grammars. Returns stops by sample index.

        If the grammar of one child fails, the whole request ends: an answer has one status for all its children.
        """
        stops: dict[int, Stop] = {}
        if not self._num_grammars:
            return stops
        for i, (sequence, tokens) in enumerate(zip(self._sampled(plan), result.token_ids, strict=True)):
            if sequence is None or sequence.grammar is None:
                continue
            try:
                stop = sequence.grammar.advance(tokens)
            except Exception as bug:
                self._fail(sequence, bug)
                continue
            if stop is not None:
                stops[i] = stop
            if sequence.grammar.failure is not None:
                self._fail_grammar(sequence.request, sequence.grammar.failure)
        return stops

    def push_text(self, plan: StepPlan, result: StepResult, stops: Mapping[int, Stop]) -> dict[int, Stop]:
        """Detokenize the sampled tokens. `stops` by sample index are the ends that grammars set. Returns them with the stop strings.

        If a stop string and the grammar end the same sample, the stop string counts.
        """
        found = dict(stops)
        for i, (sequence, tokens) in enumerate(zip(self._sampled(plan), result.token_ids, strict=True)):
            if sequence is None or sequence.text is None:
                continue
            if i in stops:
                tokens = tokens[:stops[i].keep]
            try:
                stop = sequence.text.push(tokens)
            except Exception as bug:
                self._fail(sequence, bug)
                continue
            if stop is not None:
                found[i] = stop
        return found

    def prepare_drafts(self, plan: StepPlan) -> None:
        """Index the prompts that this plan completes, while it runs."""
        if self._speculation is None:
            return
        for name in plan.sample_ids:
            sequence = self._sequences.get(name)
            if sequence is not None and sequence.drafts is not None:
                try:
                    self._speculation.prepare(sequence.drafts)
                except Exception as bug:
                    self._fail(sequence, bug)

    def propose(self, plan: StepPlan, result: StepResult, stops: Mapping[int, Stop]) -> StepResult:
        """Add drafts for the next step to a result. `stops`: samples whose sequences end."""
        if self._speculation is None:
            return result
        found: list[tuple[int, ...] | None] = []
        for i, (sequence, tokens) in enumerate(zip(self._sampled(plan), result.token_ids, strict=True)):
            found.append(None)
            if sequence is None or sequence.drafts is None:
                continue
            try:
                if num_drafts := len(plan.drafts[plan.sample_from[i]]):
                    self._speculation.count(sequence.drafts, num_drafts, len(tokens) - 1)
                if i not in stops:
                    proposed = result.drafts[i] if result.drafts else None
                    found[i] = self._speculation.propose(sequence.drafts, tokens, len(plan.rows), proposed)
            except Exception as bug:
                self._fail(sequence, bug)
        return replace(result, drafts=tuple(found))

    def collect_prompts(self, plan: StepPlan, result: StepResult) -> None:
        """Logprobs and hidden states of prompts. They arrive in chunks. A chunk recomputed after a preemption repeats its values."""
        for column, first, count, data in result.pooled:
            sequence = self._sequences.get(plan.request_ids[column])
            if sequence is not None and plan.step_id >= sequence.request.first_step and sequence.request.pooled is not None:
                try:
                    sequence.request.pooled.add(first, count, data)
                except Exception as bug:
                    self._fail(sequence, bug)
        for column, first, entries in result.prompt_logprobs:
            sequence = self._sequences.get(plan.request_ids[column])
            if sequence is None or plan.step_id < sequence.request.first_step:
                continue
            try:
                if sequence.request.prompt_logprobs is not None:
                    sequence.request.prompt_logprobs[first:first + len(entries)] = entries
            except Exception as bug:
                self._fail(sequence, bug)

    def assemble(self, updates: Iterable[SequenceUpdate], result: StepResult, now: float) -> list[OutputDelta]:
        """The deltas of what the scheduler's update returned."""
        deltas = []
        for update in updates:
            sequence = self._sequences.get(update.sequence_id)
            if sequence is not None:
                try:
                    deltas.append(self._delta(sequence, update, result, now))
                except Exception as bug:
                    self._fail(sequence, bug)
        return deltas

    def _delta(self, sequence: SequenceState, update: SequenceUpdate, result: StepResult, now: float) -> OutputDelta:
        request, tokens, reason = sequence.request, update.token_ids, update.finish_reason
        if tokens and sequence.first_token_time is None:
            sequence.first_token_time = now
        logprobs = None
        if request.params.logprobs is not None and update.sample_index is not None and result.logprobs:
            logprobs = (result.logprobs[update.sample_index] or ())[:len(tokens)]
        prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None
        text = "" if sequence.text is None else sequence.text.take(finished=reason is not None)
        metrics = None if reason is None else _metrics(sequence, now, update)
        delta = OutputDelta(
            update.request_id, update.index, tokens, text, logprobs, reason, update.stop_reason, update.num_cached_tokens,
            None if prompt_logprobs is None else tuple(prompt_logprobs), metrics, result.error if reason == "error" else None,
            pooled=None if request.pooled is None or reason != "length" else request.pooled.vector(),
        )
        if reason is not None:
            self._forget(sequence)
        return delta


def _metrics(sequence: SequenceState, now: float, update: SequenceUpdate | None = None) -> RequestMetrics:
    metrics = RequestMetrics(sequence.request.arrival_time, first_token_time=sequence.first_token_time, finished_time=now,
                             drafts=None if sequence.drafts is None else sequence.drafts.counts)
    if update is not None:
        metrics.first_scheduled_time, metrics.num_preemptions = update.first_scheduled_time, update.num_preemptions
    return metrics


def _beam_index(request_id: str, name: str) -> int:
    """The inverse of `core.request.sequence_id` for a beam search, whose first sequence has the id of the request."""
    return 0 if name == request_id else int(name.removeprefix(f"{request_id}#"))
