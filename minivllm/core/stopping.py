"""When an output ends: at a stop token, a stop string or its token limit, whichever comes first.

One `StopRule` per request decides it for the scheduler and for the detokenizer, which must not turn tokens past the end into text.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minivllm.core.plan import Stop
from minivllm.outputs import FinishReason
from minivllm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class StopRule:
    """The token ids that end an output, and its limits. EOS and stop tokens count only after `min_tokens` outputs."""

    stop_ids: frozenset[int]  # EOS included
    eos_ids: frozenset[int]  # empty with ignore_eos
    min_tokens: int
    max_tokens: int

    @classmethod
    def of(cls, params: SamplingParams, eos_token_ids: Sequence[int], max_tokens: int) -> StopRule:
        eos_ids = frozenset(() if params.ignore_eos else eos_token_ids)
        return cls(eos_ids | frozenset(params.stop_token_ids or ()), eos_ids, params.min_tokens, max_tokens)

    def end(self, num_outputs: int, token_ids: Sequence[int]) -> tuple[int, FinishReason | None]:
        """Returns (number of these tokens that belong to the output, finish reason or None if the output continues).

        `num_outputs` tokens were sampled before these.
        """
        if num_outputs + len(token_ids) < self.max_tokens and self.stop_ids.isdisjoint(token_ids):
            return len(token_ids), None  # the common case
        for count, token in enumerate(token_ids, start=1):
            if token in self.stop_ids and num_outputs + count > self.min_tokens:
                return count, "stop"
            if num_outputs + count >= self.max_tokens:
                return count, "length"
        return len(token_ids), None

    def cut(
        self, num_outputs: int, token_ids: tuple[int, ...], stop: Stop | None,
    ) -> tuple[tuple[int, ...], FinishReason | None, int | str | None]:
        """(tokens to keep, finish reason, stop reason). `stop`: a stop string or grammar end found in the same tokens.

        If several ends fall on the same token, a stop token has precedence over `stop`, and `stop` over the length limit.
        """
        if stop is not None:
            token_ids = token_ids[:stop.keep]
        count, reason = self.end(num_outputs, token_ids)
        if reason == "stop":
            last = token_ids[count - 1]
            return token_ids[:count], "stop", None if last in self.eos_ids else last
        if stop is not None and count == len(token_ids):
            return token_ids, "stop", stop.matched
        return token_ids[:count], reason, None
