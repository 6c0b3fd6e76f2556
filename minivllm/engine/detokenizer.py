"""Tokens to text as they are sampled, and the search for stop strings.

The scheduler knows tokens and no text, so stop strings are found here, between a step's result and `Scheduler.update`:

    push(tokens)     feed sampled tokens; if a stop string ends the output: Stop(keep, matched)
    take(finished)   after the update: the text that is certain by now, or all of it if the sequence has ended

Text is held back only while it may still become part of a stop string (see `stop_strings.py`).
"""
from __future__ import annotations

from collections.abc import Sequence

from minivllm.core.plan import Stop
from minivllm.core.stopping import StopRule
from minivllm.engine import stop_strings
from minivllm.engine.tokenizer import TextStream
from minivllm.sampling_params import SamplingParams


class SequenceText:
    """The text of one sequence. `_text` has not been returned yet; its last characters may be held back."""

    __slots__ = ("_include_stop", "_min_tokens", "_num_tokens", "_rule", "_state", "_stops", "_stream", "_text")

    def __init__(self, stream: TextStream, params: SamplingParams, rule: StopRule) -> None:
        self._stream: TextStream | None = stream  # None once a stop string was found
        self._stops = stop_strings.compiled(params.stop) if params.stop else None
        self._state = stop_strings.START
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._rule = rule
        self._num_tokens = 0
        self._text = ""

    def push(self, tokens: Sequence[int]) -> Stop | None:
        """Feed sampled tokens up to the one that ends the output. Returns a `Stop` if a stop string ends it."""
        assert self._stream is not None, "a sequence takes no tokens after its stop string"
        count, reason = self._rule.end(self._num_tokens, tokens)
        if reason == "stop" and not self._include_stop:
            count -= 1  # EOS or a stop token counts as a token but is not text
        for i, token in enumerate(tokens[:count], start=1):
            text = self._stream.push(token)
            if self._stops is not None:
                self._state, end, matched = self._stops.search(self._state, text, self._num_tokens + i < self._min_tokens)
                if matched is not None:
                    self._end_with(text[:end], matched)
                    return Stop(keep=i, matched=matched)
            self._text += text
        self._num_tokens += count
        return None

    def _end_with(self, text: str, matched: str) -> None:
        """Add the last text, which a stop string ends. What follows it in the same token is dropped."""
        self._text += text
        if not self._include_stop:
            self._text = self._text.removesuffix(matched)
        self._stream = None

    def take(self, finished: bool) -> str:
        """The text that became certain since the last call. `finished`: all of it."""
        text, self._text = self._text, ""
        if finished:
            return text + self._stream.finish() if self._stream is not None else text
        if self._stops is not None and (held_back := self._stops.held_back[self._state]):
            text, self._text = text[:-held_back], text[-held_back:]
        return text
