"""Beam search: the W most probable outputs, found by extending W sequences at a time. It uses the scheduler's forks.

    step t     beam 0: ... a b    its best continuations  c d e        All continuations are ranked by the sum of log-probabilities.
               beam 1: ... a x    its best continuations  y c z        Those that end with EOS are complete. The best W of the
                                                                       others are the next beams.
    step t+1   beam 0: ... a b c       beam 0 continues
               beam 2: ... a b d       beam 2 is a fork of beam 0 (it shares all blocks but the last one); beam 1 has ended

A completed sequence has the score: sum of log-probabilities / (number of output tokens ** length_penalty), as in HF (the simplest form
of Wu et al., 2016). The search ends when no live beam can still score higher than the W-th best completed sequence.

A beam that has its token pauses until all beams have theirs. So a search may be preempted, or lack rows, like any request.
"""
from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from minivllm.core.plan import TokenLogprobs
from minivllm.engine.engine import EngineCore
from minivllm.engine.llm_engine import LLMEngine
from minivllm.engine.prompts import Prompt, read_prompt
from minivllm.engine.tokenizer import Tokenizer
from minivllm.engine_request import LoRARequest
from minivllm.errors import InvalidInput
from minivllm.outputs import FinishReason, OutputDelta
from minivllm.sampling_params import MAX_LOGPROBS, BeamSearchParams, SamplingParams


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
    """A live sequence. `index` is its index in the engine's request."""

    index: int
    tokens: tuple[int, ...]  # the output so far
    logprob: float


@dataclass(slots=True)
class _Search:
    """The search for one prompt."""

    request_id: str
    prompt: tuple[int, ...]
    params: BeamSearchParams
    max_tokens: int  # of the output: the user's limit, or what the context leaves
    eos: frozenset[int]
    cache_salt: str | None = None
    beams: list[_Beam] = field(default_factory=lambda: [_Beam(0, (), 0.0)])
    completed: list[tuple[float, int, _Beam, FinishReason]] = field(default_factory=list)  # heap of the best W: (score, tie-break, ...)
    _entries: dict[int, TokenLogprobs] = field(default_factory=dict)  # by index: of beams that have their next token
    _order: itertools.count[int] = field(default_factory=itertools.count)

    def score(self, logprob: float, length: int) -> float:
        return logprob / length**self.params.length_penalty

    def advance(self, entries: dict[int, TokenLogprobs]) -> list[tuple[int, int]]:
        """Extend the beams, given every beam's next-token log-probabilities. Returns the next beams as (index, token); [] at the end."""
        width = self.params.beam_width
        candidates = [
            (beam.logprob + logprob, beam, token)
            for beam in self.beams
            for token, logprob in zip(entries[beam.index].top_ids, entries[beam.index].top_logprobs, strict=True)
        ]
        candidates.sort(key=lambda c: -c[0])  # a stable sort: with equal sums the earlier beam comes first
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
        if length == self.max_tokens:
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
        """An upper bound of a beam's final score. The sum of log-probabilities only decreases, so only a larger length can raise it."""
        best = self.max_tokens if self.params.length_penalty > 0 else length + 1
        return self.score(logprob, best)

    def take(self, delta: OutputDelta, core: EngineCore) -> bool:
        """Handle the delta of one beam. After the last beam's delta the next beams are chosen. False: the search has ended."""
        if delta.finish_reason == "error":
            raise RuntimeError(f"a step of the beam search failed: {delta.error}")
        assert delta.logprobs, "a beam search requests log-probabilities"
        self._entries[delta.index] = delta.logprobs[0]
        if len(self._entries) < len(self.beams):
            return True
        entries, self._entries = self._entries, {}
        chosen = self.advance(entries)
        if not chosen:
            core.abort_request(self.request_id)
            return False
        for beam, index in zip(self.beams, core.choose_beams(self.request_id, chosen), strict=True):
            beam.index = index
        return True

    def output(self, tokenizer: Tokenizer | None) -> BeamSearchOutput:
        sequences = []
        for _, _, beam, reason in sorted(self.completed, reverse=True):
            tokens = [*self.prompt, *beam.tokens]
            text = None if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True)
            sequences.append(BeamSearchSequence(tokens, beam.logprob, text, reason))
        return BeamSearchOutput(sequences)


def beam_search(
    engine: LLMEngine, request_ids: Sequence[str], prompts: Sequence[Prompt], params: BeamSearchParams,
    lora_requests: Sequence[LoRARequest | None],
) -> list[BeamSearchOutput]:
    """Search for all prompts at the same time. `request_ids` are unused ids, one for each prompt, as are the adapters."""
    core = engine.core
    eos = frozenset() if params.ignore_eos else frozenset(core.eos_token_ids)
    if params.beam_width + len(eos) > MAX_LOGPROBS:
        raise InvalidInput(f"beam_width {params.beam_width} is too wide: at most {MAX_LOGPROBS - len(eos)}", "beam_width")
    one_step = SamplingParams(
        temperature=0, max_tokens=params.max_tokens, logprobs=min(params.beam_width + len(eos), core.vocab_size), ignore_eos=True,
        detokenize=False,
    )
    read = [read_prompt(prompt, core.tokenizer) for prompt in prompts]
    searches = [
        _Search(request_id, prompt.token_ids, params, min(params.max_tokens, core.max_model_len - len(prompt.token_ids)), eos,
                prompt.cache_salt)
        for request_id, prompt in zip(request_ids, read, strict=True)
    ]
    adapters = dict(zip(request_ids, lora_requests, strict=True))
    waiting = deque(searches)
    running: dict[str, _Search] = {}
    try:
        while waiting or running:
            while waiting and core.has_room:  # the running searches make room
                search = waiting.popleft()
                core.add_request(search.request_id, search.prompt, one_step, cache_salt=search.cache_salt, beam_search=True,
                                 lora_request=adapters[search.request_id])
                running[search.request_id] = search
            for delta in engine.advance():
                found = running.get(delta.request_id)
                if found is not None and not found.take(delta, core):
                    del running[delta.request_id]
    finally:
        for request_id in running:  # after an error or Ctrl-C: leave no request behind
            core.abort_request(request_id)
    return [search.output(core.tokenizer) for search in searches]

