"""Beam search on top of the scheduler's forks: the W most probable outputs, W sequences at a time.

    step t     beam 0: ... a b    its best continuations  c d e        all continuations ranked by the sum of log-probabilities;
               beam 1: ... a x    its best continuations  y c z        those that end with EOS are complete, the best W of the
                                                                       others are the next beams: a beam goes on, is forked
    step t+1   beam 0: ... a b c       beam 0 was forked:              (copy-on-write: the fork costs one partly filled block)
               beam 2: ... a b d       beam 1 is over                  or is over

A completed sequence is scored by its sum of log-probabilities / (number of output tokens ** length_penalty), as HF does (Wu et
al., 2016, in its simplest form). The search ends when no live beam could still become better than the W-th best completed one.

Beams that have their token pause until all have theirs, so a search may be preempted or run out of rows like any request.
"""
from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from minivllm.core.plan import TokenLogprobs
from minivllm.core.scheduler import QueueFull
from minivllm.engine.engine import LLMEngine
from minivllm.engine.prompts import Prompt, read_prompt
from minivllm.errors import InvalidInput
from minivllm.outputs import FinishReason, OutputDelta
from minivllm.sampling_params import MAX_LOGPROBS, SamplingParams


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """How to search. Raises `InvalidInput` naming the field."""

    beam_width: int  # sequences kept, and sequences returned
    max_tokens: int
    ignore_eos: bool = False  # go on after EOS, as if it were any token
    length_penalty: float = 1.0  # above 0 favours long outputs, below 0 short ones; 0 compares sums

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidInput(f"{name} must be a whole number of at least 1, got {value!r}", name)
        if isinstance(self.length_penalty, bool) or not isinstance(self.length_penalty, (int, float)):
            raise InvalidInput(f"length_penalty must be a number, got {self.length_penalty!r}", "length_penalty")


@dataclass(slots=True)
class BeamSearchSequence:
    """One result (vLLM's names): `tokens` and `text` include the prompt."""

    tokens: list[int]
    cum_logprob: float
    text: str | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The best sequences for one prompt, best first."""

    sequences: list[BeamSearchSequence]


@dataclass(slots=True)
class _Beam:
    """A live sequence: `index` is its name in the engine."""

    index: int
    tokens: tuple[int, ...]  # output so far
    logprob: float


@dataclass(slots=True)
class _Search:
    """One prompt's search."""

    request_id: str
    prompt: tuple[int, ...]
    params: BeamSearchParams
    eos: frozenset[int]
    cache_salt: str | None = None
    beams: list[_Beam] = field(default_factory=lambda: [_Beam(0, (), 0.0)])
    completed: list[tuple[float, int, _Beam, FinishReason]] = field(default_factory=list)  # heap of the best W: (score, tie-break, ...)
    _entries: dict[int, TokenLogprobs] = field(default_factory=dict)  # of the beams that have their token, by index
    _order: itertools.count[int] = field(default_factory=itertools.count)

    def score(self, logprob: float, length: int) -> float:
        return logprob / length**self.params.length_penalty

    def advance(self, entries: dict[int, TokenLogprobs]) -> list[tuple[int, int]]:
        """Take in every beam's next-token log-probabilities; (index, token) of the next beams, [] at the end."""
        width = self.params.beam_width
        candidates = [
            (beam.logprob + logprob, beam, token)
            for beam in self.beams
            for token, logprob in zip(entries[beam.index].top_ids, entries[beam.index].top_logprobs, strict=True)
        ]
        candidates.sort(key=lambda c: -c[0])  # stable: of equal sums the earlier beam's comes first
        chosen: list[tuple[int, int]] = []
        beams: list[_Beam] = []
        for logprob, beam, token in candidates:
            following = _Beam(beam.index, (*beam.tokens, token), logprob)
            if token in self.eos:
                self._complete(following, "stop")
            elif len(beams) < width:
                beams.append(following)
                chosen.append((beam.index, token))
        self.beams = beams
        length = len(beams[0].tokens) if beams else 0
        if length == self.params.max_tokens:
            for beam in beams:
                self._complete(beam, "length")
            chosen = []
        elif len(self.completed) == width and beams and self._bound(beams[0].logprob, length) <= self.completed[0][0]:
            chosen = []
        if not chosen:
            self.beams = []
        return chosen

    def _complete(self, beam: _Beam, reason: FinishReason) -> None:
        entry = (self.score(beam.logprob, len(beam.tokens)), -next(self._order), beam, reason)
        if len(self.completed) < self.params.beam_width:
            heapq.heappush(self.completed, entry)
        else:
            heapq.heappushpop(self.completed, entry)

    def _bound(self, logprob: float, length: int) -> float:
        """The best score that a beam can still reach: its sum only falls, so all that helps is its length."""
        best = self.params.max_tokens if self.params.length_penalty > 0 else length + 1
        return self.score(logprob, best)

    def take(self, delta: OutputDelta, engine: LLMEngine) -> bool:
        """One beam's token has come; with the last one the next beams are chosen. False: the search is over."""
        if delta.finish_reason == "error":
            raise RuntimeError(f"a step of the beam search failed: {delta.error}")
        assert delta.logprobs, "log-probabilities were asked for"
        self._entries[delta.index] = delta.logprobs[0]
        if len(self._entries) < len(self.beams):
            return True
        entries, self._entries = self._entries, {}
        chosen = self.advance(entries)
        if not chosen:
            engine.abort_request(self.request_id)
            return False
        for beam, index in zip(self.beams, engine.choose_beams(self.request_id, chosen), strict=True):
            beam.index = index
        return True

    def output(self, engine: LLMEngine) -> BeamSearchOutput:
        sequences = []
        for _, _, beam, reason in sorted(self.completed, reverse=True):
            tokens = [*self.prompt, *beam.tokens]
            text = None if engine.tokenizer is None else engine.tokenizer.decode(tokens, skip_special_tokens=True)
            sequences.append(BeamSearchSequence(tokens, beam.logprob, text, reason))
        return BeamSearchOutput(sequences)


def beam_search(
    engine: LLMEngine, names: Sequence[str], prompts: Sequence[Prompt], params: BeamSearchParams,
) -> list[BeamSearchOutput]:
    """Search for every prompt, all at the same time. `names` are free request ids."""
    eos = frozenset() if params.ignore_eos else frozenset(engine.eos_token_ids)
    if params.beam_width + len(eos) > MAX_LOGPROBS:
        raise InvalidInput(f"beam_width {params.beam_width} is too wide: at most {MAX_LOGPROBS - len(eos)}", "beam_width")
    asked = SamplingParams(
        temperature=0, max_tokens=params.max_tokens, logprobs=min(params.beam_width + len(eos), engine.vocab_size), ignore_eos=True,
        detokenize=False,
    )
    read = [read_prompt(prompt, engine.tokenizer) for prompt in prompts]
    searches = [_Search(name, prompt.token_ids, params, eos, prompt.cache_salt) for name, prompt in zip(names, read, strict=True)]
    waiting = deque(searches)
    running: dict[str, _Search] = {}
    try:
        while waiting or running:
            while waiting and _start(engine, waiting[0], asked, bool(running)):
                search = waiting.popleft()
                running[search.request_id] = search
            for delta in engine.step():
                concerned = running.get(delta.request_id)
                if concerned is not None and not concerned.take(delta, engine):
                    del running[delta.request_id]
    finally:
        for name in running:  # an error or Ctrl-C: leave the engine as it was
            engine.abort_request(name)
    return [search.output(engine) for search in searches]


def _start(engine: LLMEngine, search: _Search, asked: SamplingParams, others_run: bool) -> bool:
    try:
        engine.add_request(search.request_id, search.prompt, asked, cache_salt=search.cache_salt, beam_search=True)
    except QueueFull:
        if others_run:
            return False  # steps will make room
        raise
    return True
