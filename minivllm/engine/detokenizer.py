"""Tokens to text while they come, and stop strings: the engine's half of deciding that a request ends.

The scheduler knows tokens, not text, so a stop string is found here, between the step's result and `Scheduler.update`:

    scan(plan, result)   feed each sampled token's text to its sequence; a stop string found -> Stop(keep, matched)
    take(...)            after update: the text that is certain by now, or all of it when the sequence has ended

Text is held back only while it could still become a stop string. Both the search and the hold-back are one automaton (Knuth,
Morris and Pratt) per stop string, whose state is the length of the longest prefix of the stop string that the text ends with:

    stop "</s>"     text  a < / b < / s          state 0 1 2 0 1 2 3     held back: the longest state, here "</s"
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from minivllm.core.plan import StepPlan, StepResult, Stop
from minivllm.core.stopping import StopRule
from minivllm.engine.tokenizer import TextStream, Tokenizer
from minivllm.outputs import FinishReason
from minivllm.sampling_params import SamplingParams

NO_STOPS: Mapping[int, Stop] = {}


class StopMatcher:
    """Searches a growing text for stop strings: O(1) amortised per character and stop string, whatever their lengths."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self._failure = [_failure_table(stop) for stop in self.stops]
        self._states = [0] * len(self.stops)
        self.partial = 0  # how many characters at the text's end could still become a stop string

    def push(self, char: str) -> str | None:
        """The stop string that this character completes; the longest if there are several."""
        found: str | None = None
        longest = 0
        for i, stop in enumerate(self.stops):
            state, failure = self._states[i], self._failure[i]
            while state and stop[state] != char:
                state = failure[state]
            if stop[state] == char:
                state += 1
            if state == len(stop):
                state = failure[state]
                if found is None or len(stop) > len(found):
                    found = stop
            self._states[i] = state
            if state > longest:
                longest = state
        self.partial = longest
        return found


def _failure_table(stop: str) -> list[int]:
    """[len + 1]: for a matched prefix of each length, the longest shorter prefix that it also ends with."""
    table = [0, 0]
    for char in stop[1:]:
        state = table[-1]
        while state and stop[state] != char:
            state = table[state]
        table.append(state + 1 if stop[state] == char else 0)
    return table


class _Sequence:
    """One sequence's text. `_text` is certain UTF-8 not handed out yet; its last `partial` characters are held back."""

    def __init__(
        self, stream: TextStream, params: SamplingParams, rule: StopRule, first_step: int,
    ) -> None:
        self.first_step = first_step
        self._stream = stream
        self._matcher = StopMatcher(params.stop or ())
        self._has_stops = bool(params.stop)
        self._min_tokens = params.min_tokens
        self._include_stop = params.include_stop_str_in_output
        self._rule = rule
        self._num_tokens = 0
        self._text = ""

    def push(self, tokens: Sequence[int]) -> Stop | None:
        """Feed sampled tokens, up to the one that ends the sequence. A `Stop` if that was a stop string."""
        count, reason = self._rule.end(self._num_tokens, tokens)
        shown = count - 1 if reason == "stop" and not self._include_stop else count  # EOS or a stop token is not text
        for i, token in enumerate(tokens[:shown]):
            self._num_tokens += 1
            text = self._stream.push(token)
            if not self._has_stops:
                self._text += text
                continue
            matched = self._search(text)
            if matched is not None:
                return Stop(keep=i + 1, matched=matched)
        return None

    def _search(self, new: str) -> str | None:
        """Add text up to the end of the first stop string in it."""
        for i, char in enumerate(new):
            matched = self._matcher.push(char)
            if matched is not None and self._num_tokens >= self._min_tokens:
                self._text += new[: i + 1]
                if not self._include_stop:
                    self._text = self._text[: len(self._text) - len(matched)]
                self._stream = _Nothing()  # what the token holds past the stop string is dropped
                return matched
        self._text += new
        return None

    def take(self, finished: bool) -> str:
        if finished:
            text, self._text = self._text + self._stream.finish(), ""
            return text
        if not self._has_stops:
            text, self._text = self._text, ""
            return text
        certain = len(self._text) - self._matcher.partial
        text, self._text = self._text[:certain], self._text[certain:]
        return text


class _Nothing:
    """The stream of a sequence that ended at a stop string."""

    def push(self, token_id: int) -> str:
        raise AssertionError("a sequence takes no tokens after its stop string")

    def finish(self) -> str:
        return ""


class Detokenizer:
    """The text of every running sequence. Without a tokenizer it knows no sequence and finds no stop."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._sequences: dict[str, _Sequence] = {}

    def add(
        self, sequence_id: str, prompt_token_ids: Sequence[int], params: SamplingParams, rule: StopRule, first_step: int = 0,
    ) -> None:
        """Start a sequence that gets tokens from plan `first_step` on, up to the end that `rule` sets.

        (An earlier plan that is still under way may name an earlier sequence of the same id.)
        """
        if self._tokenizer is None or not params.detokenize:
            return
        stream = self._tokenizer.stream(prompt_token_ids, params.skip_special_tokens)
        self._sequences[sequence_id] = _Sequence(stream, params, rule, first_step)

    def scan(self, plan: StepPlan, result: StepResult, ended: Mapping[int, Stop] = NO_STOPS) -> Mapping[int, Stop]:
        """Stops by sample index. A sequence that has ended since the plan was made is not known any more and is skipped.

        `ended`: samples that end by their grammar, with the tokens to keep; a stop string found in those goes before.
        """
        stops: dict[int, Stop] = {}
        for i, (sequence_id, tokens) in enumerate(zip(plan.sample_ids, result.token_ids, strict=True)):
            sequence = self._sequences.get(sequence_id)
            if sequence is None or plan.step_id < sequence.first_step:
                continue
            if i in ended:
                tokens = tokens[: ended[i].keep]
            if (stop := sequence.push(tokens)) is not None:
                stops[i] = stop
        return stops

    def take(self, sequence_id: str, finish_reason: FinishReason | None) -> str:
        """New certain text; with a finish reason, everything that is left, and the sequence is forgotten."""
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            return ""
        if finish_reason is not None:
            del self._sequences[sequence_id]
        return sequence.take(finish_reason is not None)

    def __len__(self) -> int:
        return len(self._sequences)
