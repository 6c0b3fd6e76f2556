"""When a sequence ends: at a stop token, a stop string, or its limit, whichever comes first among the tokens of one step."""
from __future__ import annotations

from minivllm.core.plan import Stop
from minivllm.core.request import Sequence
from minivllm.outputs import FinishReason


def cut(
    sequence: Sequence, token_ids: tuple[int, ...], stop: Stop | None,
) -> tuple[tuple[int, ...], FinishReason | None, int | str | None]:
    """(tokens to keep, why it ends, what ended it). `stop` is the detokenizer's verdict on the same tokens.

    EOS and stop tokens count only after `min_tokens` outputs. At the same token a stop goes before the length limit.
    """
    new = sequence.request.new
    end = len(token_ids) if stop is None else stop.keep
    for position, token in enumerate(token_ids[:end]):
        kept = token_ids[:position + 1]
        if token in sequence.stop_ids and sequence.num_outputs + position >= new.params.min_tokens:
            is_eos = token in new.eos_token_ids and not new.params.ignore_eos
            return kept, "stop", None if is_eos else token
        stops_here = stop is not None and position + 1 == end
        if len(sequence.tokens) + position + 1 >= sequence.max_tokens_total and not stops_here:
            return kept, "length", None
    return (token_ids, None, None) if stop is None else (token_ids[:end], "stop", stop.matched)
