"""What a request brings to the door, checked: the prompt as token ids, and parameters that this model can honour."""
from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from minivllm.engine.tokenizer import Tokenizer
from minivllm.errors import InvalidInput, nearest
from minivllm.sampling_params import SamplingParams

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]  # text, token ids, {"prompt": text} or {"prompt_token_ids": ids}

_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


def read_prompt(prompt: Prompt, tokenizer: Tokenizer | None) -> tuple[str | None, tuple[int, ...]]:
    """(text if there was one, token ids) of any form of prompt."""
    if isinstance(prompt, Mapping):
        for key in prompt:
            if key not in _KEYS:
                raise InvalidInput(f"unknown key {key!r} in a prompt{nearest(str(key), _KEYS)}", "prompt")
        text = prompt.get("prompt")
        if prompt.get("prompt_token_ids") is not None:
            return text, _ids(prompt["prompt_token_ids"])
        if not isinstance(text, str):
            raise InvalidInput('a prompt given as a dict needs "prompt" (text) or "prompt_token_ids"', "prompt")
        prompt = text
    if not isinstance(prompt, str):
        return None, _ids(prompt)
    if tokenizer is None:
        raise InvalidInput(
            'this engine has no tokenizer (skip_tokenizer_init): pass {"prompt_token_ids": [...]}', "prompt",
        )
    return prompt, tuple(tokenizer.encode(prompt))


def _ids(ids: Any) -> tuple[int, ...]:
    if not isinstance(ids, Iterable):
        raise InvalidInput(f"a prompt is text or a list of token ids, got {ids!r}", "prompt")
    found = tuple(ids)
    for token in found:
        if type(token) is not int:
            raise InvalidInput(f"token ids are whole numbers, got {token!r}", "prompt")
    return found


def check_prompt(token_ids: Sequence[int], vocab_size: int, max_model_len: int, max_tokens: int | None) -> None:
    """Raise `InvalidInput` for a prompt that this model cannot take."""
    if not token_ids:
        raise InvalidInput("the prompt is empty: give it at least one token", "prompt")
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise InvalidInput(f"token id {bad} in the prompt is outside the vocabulary (0 to {vocab_size - 1})", "prompt")
    room = max_model_len if max_tokens == 0 else max_model_len - 1
    if len(token_ids) > room:
        raise InvalidInput(
            f"the prompt has {len(token_ids)} tokens, but the context length is {max_model_len}"
            f"{'' if max_tokens == 0 else ' and the output needs at least one'}: shorten it, or raise max_model_len", "prompt",
        )


def check_params(params: SamplingParams, tokenizer: Tokenizer | None, vocab_size: int) -> SamplingParams:
    """Parameters as the core and the worker want them: ids inside the vocabulary, `bad_words` as token sequences."""
    named: tuple[tuple[str, Iterable[int]], ...] = (
        ("stop_token_ids", params.stop_token_ids or ()), ("allowed_token_ids", params.allowed_token_ids or ()),
        ("logit_bias", params.logit_bias or ()),
    )
    for name, ids in named:
        for token in ids:
            if token >= vocab_size:
                raise InvalidInput(f"token id {token} in {name} is outside the vocabulary (0 to {vocab_size - 1})", name)
    if tokenizer is None:
        for name in ("stop", "bad_words"):
            if getattr(params, name):
                raise InvalidInput(f"{name} needs a tokenizer, and this engine has none (skip_tokenizer_init): use token ids", name)
        return params
    if not params.bad_words:
        return params
    return dataclasses.replace(params, bad_words_token_ids=_bad_words(params.bad_words, tokenizer))


def _bad_words(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """A word is spelt differently at the start of a text and after a space: both spellings are banned."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for spelling in (word, " " + word.lstrip()):
            if ids := tuple(tokenizer.encode(spelling, add_special_tokens=False)):
                found[ids] = None
    return tuple(found)
