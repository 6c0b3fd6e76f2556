"""From a prompt to an `EngineRequest`, and the checks that a request must pass. They raise `InvalidInput`, which names the field."""
from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from functools import lru_cache
from typing import Any, NamedTuple, Required, TypeAlias, TypedDict

from minivllm.engine.tokenizer import Tokenizer
from minivllm.engine_request import EngineRequest, LoRARequest
from minivllm.errors import InvalidInput, nearest, refuse_unbuilt, shown
from minivllm.sampling_params import PoolingParams, SamplingParams, whole

# Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}. A dict may have a "cache_salt": see `EngineRequest`.
Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]

# Entries of a field times n: comparisons or changes of logits in each step of one request, at most about 10 ms on one CPU core.
MOST_PER_STEP = {"bad_words": 1 << 16, "allowed_token_ids": 1 << 21, "stop_token_ids": 1 << 21, "logit_bias": 1 << 21}
_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
_UNBUILT = ("multi_modal_data", "multi_modal_uuids", "mm_processor_kwargs", "prompt_embeds")  # keys of vLLM's prompts


class TextPrompt(TypedDict, total=False):
    """A prompt as text (vLLM's class)."""

    prompt: Required[str]  # the text
    cache_salt: str  # cached prefixes are shared only by requests with the same salt


class TokensPrompt(TypedDict, total=False):
    """A prompt as token ids (vLLM's class)."""

    prompt_token_ids: Required[list[int]]  # the token ids, with BOS if the model needs it
    prompt: str  # the text, which outputs repeat
    cache_salt: str  # as in TextPrompt


PromptType = Prompt


class ReadPrompt(NamedTuple):
    """A prompt after reading, whatever its form was."""

    text: str | None  # None: it was given as token ids
    token_ids: tuple[int, ...]
    cache_salt: str | None = None


def read_prompt(prompt: Prompt, tokenizer: Tokenizer | None) -> ReadPrompt:
    """Read a prompt in any form, and tokenize text."""
    salt = None
    if isinstance(prompt, Mapping):
        refuse_unbuilt(**{key: prompt[key] for key in _UNBUILT if key in prompt})
        for key in prompt:
            if key not in _KEYS and key not in _UNBUILT:
                raise InvalidInput(f"unknown key {key!r} in a prompt{nearest(str(key), _KEYS)}", "prompt")
        text, salt = prompt.get("prompt"), prompt.get("cache_salt")
        if salt is not None and not isinstance(salt, str):
            raise InvalidInput(f"cache_salt must be text, got {salt!r}", "cache_salt")
        if prompt.get("prompt_token_ids") is not None:
            return ReadPrompt(text, _ids(prompt["prompt_token_ids"]), salt)
        if not isinstance(text, str):
            raise InvalidInput('a prompt given as a dict needs "prompt" (text) or "prompt_token_ids"', "prompt")
        prompt = text
    if not isinstance(prompt, str):
        return ReadPrompt(None, _ids(prompt), salt)
    if tokenizer is None:
        raise InvalidInput(
            'this engine has no tokenizer (skip_tokenizer_init): pass {"prompt_token_ids": [...]}', "prompt",
        )
    return ReadPrompt(prompt, tuple(tokenizer.encode(prompt)), salt)


def _ids(ids: Any) -> tuple[int, ...]:
    if not isinstance(ids, Iterable) or isinstance(ids, (bytes, bytearray, Set)):  # bytes are not tokens, and a set has no order
        raise InvalidInput(f"a prompt is text or a list of token ids, got {shown(ids)}", "prompt")
    found = tuple(ids)
    if not set(map(type, found)) <= {int}:  # numpy's integers become plain ones
        found = tuple(whole("a token id", token, 0, None, "token ids are whole numbers", field="prompt") for token in found)
    return found


def prepare_request(
    request_id: str, prompt: Prompt, params: SamplingParams | PoolingParams, tokenizer: Tokenizer | None, max_model_len: int, *,
    arrival_time: float | None = None, priority: int = 0, cache_salt: str | None = None, beam_search: bool = False,
    lora_request: LoRARequest | None = None,
) -> tuple[str | None, EngineRequest]:
    """The prompt's text (None: it was given as token ids), and the request.

    The prompt is truncated here, so that the ids that a frontend reports are those that the engine gets. `max_tokens` is lowered to what
    the context leaves, so that a longer output ends with the finish reason "length".
    """
    if isinstance(params, PoolingParams):
        params = params.sampling()
    if not isinstance(params, SamplingParams):
        raise InvalidInput(f"params must be SamplingParams or PoolingParams, got {type(params).__name__}", "params")
    params = params.clone()  # the caller may change its own later
    text, every, salt = read_prompt(prompt, tokenizer)
    token_ids = tuple(truncate(every, params.truncate_prompt_tokens, max_model_len, params.max_tokens))
    request = EngineRequest(
        request_id, token_ids, _within_context(params, max_model_len - len(token_ids)),
        time.monotonic() if arrival_time is None else arrival_time, priority, salt if cache_salt is None else cache_salt,
        beam_search=beam_search, lora_request=checked_lora(lora_request),
    )
    return text, request


def checked_lora(lora_request: Any) -> LoRARequest | None:
    """A request's adapter. Raises `InvalidInput` for a value of another kind."""
    if not lora_request:
        return None
    if not isinstance(lora_request, LoRARequest):
        raise InvalidInput(f"lora_request must be a LoRARequest, got {shown(lora_request)}", "lora_request")
    return lora_request


def _within_context(params: SamplingParams, room: int) -> SamplingParams:
    """Parameters with at most `room` output tokens. Without room for one, the check of the prompt fails later."""
    if params.max_tokens is None or params.max_tokens <= room or room < 1:
        return params
    return dataclasses.replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room))


def check_prompt(token_ids: Sequence[int], vocab_size: int, max_model_len: int, max_tokens: int | None) -> None:
    """Check that the prompt is in the vocabulary, and that it fits the context with at least one output token."""
    if not token_ids:
        raise InvalidInput("the prompt is empty: give it at least one token", "prompt")
    check_vocabulary("prompt", token_ids, vocab_size)
    room = max_model_len if max_tokens == 0 else max_model_len - 1
    if len(token_ids) > room:
        raise InvalidInput(
            f"the prompt has {len(token_ids)} tokens, but the context length is {max_model_len}"
            f"{'' if max_tokens == 0 else ' and the output needs at least one'}: shorten it, or raise max_model_len", "prompt",
        )


def truncate(token_ids: Sequence[int], keep: int | None, max_model_len: int, max_tokens: int | None) -> Sequence[int]:
    """The last `keep` tokens of a prompt. -1: as many as leave room for the output. None: all."""
    if keep is None:
        return token_ids
    if keep == 0 or not -1 <= keep <= max_model_len:
        raise InvalidInput(f"truncate_prompt_tokens must be from 1 to the context length {max_model_len}, or -1 to leave room for the "
                           f"output, got {keep}", "truncate_prompt_tokens")
    if keep == -1:
        keep = max(max_model_len - (1 if max_tokens is None else max_tokens), 1)
    return token_ids[-keep:]


def check_vocabulary(field: str, token_ids: Collection[int], vocab_size: int) -> None:
    """Check that the model has all token ids of a field."""
    low, high = min(token_ids, default=0), max(token_ids, default=0)
    if low < 0 or high >= vocab_size:
        raise InvalidInput(f"token id {low if low < 0 else high} in {field} is outside the vocabulary (0 to {vocab_size - 1})", field)


def check_num_logprobs(name: str, count: int | None, vocab_size: int, max_logprobs: int) -> None:
    """Check how many alternatives per token a field requests. -1: all tokens of the vocabulary, in the field and as the limit."""
    limit = vocab_size if max_logprobs == -1 else min(max_logprobs, vocab_size)
    if count is not None and (vocab_size if count == -1 else count) > limit:
        got = f"-1, which means all {vocab_size} tokens" if count == -1 else str(count)
        raise InvalidInput(f"{name} must be at most {limit}, got {got}: request fewer, or start the engine with a larger max_logprobs "
                           "(--max-logprobs)", name)


def check_params(params: SamplingParams, tokenizer: Tokenizer | None, vocab_size: int, max_logprobs: int) -> SamplingParams:
    """Check parameters against the model, and complete them: `bad_words_token_ids` are the token sequences of `bad_words`."""
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        check_vocabulary(name, getattr(params, name) or (), vocab_size)
        _check_rows(name, len(getattr(params, name) or ()), params.n)
    for name in ("logprobs", "prompt_logprobs"):
        check_num_logprobs(name, getattr(params, name), vocab_size, max_logprobs)
        if getattr(params, name) == -1:
            every: dict[str, Any] = {name: vocab_size}
            params = dataclasses.replace(params, **every)
    if tokenizer is None:
        for name in ("stop", "bad_words"):
            if getattr(params, name):
                raise InvalidInput(f"{name} needs a tokenizer, and this engine has none (skip_tokenizer_init): use token ids", name)
        return params
    if not params.bad_words:
        return params
    words = tuple(ids for ids in bad_word_ids(tuple(params.bad_words), tokenizer) if max(ids) < vocab_size)  # others cannot be generated
    _check_rows("bad_words", len(words), params.n)
    return dataclasses.replace(params, bad_words_token_ids=words)


def _check_rows(name: str, count: int, n: int) -> None:
    """Bound the work per step of one request: each of its rows compares or changes so many logits."""
    limit = MOST_PER_STEP[name]
    if count * n > limit:
        raise InvalidInput(f"{name} has {count:,} entries for each of n = {n} completions, and at most {limit:,} in all are allowed: "
                           "leave some out, or lower n", name)


@lru_cache(maxsize=64)
def bad_word_ids(words: tuple[str, ...], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Token sequences to ban. A word has other tokens inside a text, after a space, and at the start of a text: all are banned.

    1,024 words take about 0.1 s, so a compile thread calls it first for a client's request (`preparation.py`).
    """
    spellings = []
    for word in words:
        spellings += [tokenizer.encode_inside(word), tokenizer.encode_inside(" " + word.lstrip()), tokenizer.encode(word, False)]
    return tuple(dict.fromkeys(tuple(ids) for ids in spellings if ids))
