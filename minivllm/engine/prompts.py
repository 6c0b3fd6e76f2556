"""What a request brings to the door, checked: the prompt as token ids, and parameters that this model can honour."""
from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from minivllm.engine.tokenizer import Tokenizer
from minivllm.errors import InvalidInput, nearest
from minivllm.sampling_params import SamplingParams

# Text, token ids, or {"prompt": text} or {"prompt_token_ids": ids}, with "cache_salt" if blocks are not for everybody to share.
Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]

_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


class ReadPrompt(NamedTuple):
    """What any form of prompt says."""

    text: str | None  # if there was one
    token_ids: tuple[int, ...]
    cache_salt: str | None = None


def read_prompt(prompt: Prompt, tokenizer: Tokenizer | None) -> ReadPrompt:
    """The prompt's text, token ids and cache salt. Raises `InvalidInput` for what is none of the forms."""
    salt = None
    if isinstance(prompt, Mapping):
        for key in prompt:
            if key not in _KEYS:
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
    return ReadPrompt(prompt, CheckedIds(tokenizer.encode(prompt)), salt)


class CheckedIds(tuple[int, ...]):
    """Token ids that were looked at: who reads the same prompt again need not."""

    __slots__ = ()


def _ids(ids: Any) -> CheckedIds:
    if type(ids) is CheckedIds:
        return ids
    if not isinstance(ids, Iterable):
        raise InvalidInput(f"a prompt is text or a list of token ids, got {ids!r}", "prompt")
    found = CheckedIds(ids)
    if not set(map(type, found)) <= {int}:
        wrong = next(token for token in found if type(token) is not int)
        raise InvalidInput(f"token ids are whole numbers, got {wrong!r}", "prompt")
    return found


def check_prompt(token_ids: Sequence[int], vocab_size: int, max_model_len: int, max_tokens: int | None) -> None:
    """Raise `InvalidInput` for a prompt that this model cannot take."""
    if not token_ids:
        raise InvalidInput("the prompt is empty: give it at least one token", "prompt")
    check_vocabulary(token_ids, vocab_size)
    room = max_model_len if max_tokens == 0 else max_model_len - 1
    if len(token_ids) > room:
        raise InvalidInput(
            f"the prompt has {len(token_ids)} tokens, but the context length is {max_model_len}"
            f"{'' if max_tokens == 0 else ' and the output needs at least one'}: shorten it, or raise max_model_len", "prompt",
        )


def truncate(token_ids: Sequence[int], keep: int | None, max_model_len: int, max_tokens: int | None) -> Sequence[int]:
    """The prompt's last `keep` tokens; -1: as many as leave room for the output; None: all."""
    if keep is None:
        return token_ids
    if keep == 0 or not -1 <= keep <= max_model_len:
        raise InvalidInput(f"truncate_prompt_tokens must be between 1 and the context, {max_model_len} tokens, or -1 for what leaves room "
                           f"for the output; got {keep}", "truncate_prompt_tokens")
    if keep == -1:
        keep = max(max_model_len - (1 if max_tokens is None else max_tokens), 1)
    return token_ids[-keep:]


def check_vocabulary(token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise `InvalidInput` for a prompt with a token id that the model does not have."""
    low, high = min(token_ids, default=0), max(token_ids, default=0)
    if low < 0 or high >= vocab_size:
        raise InvalidInput(f"token id {low if low < 0 else high} in the prompt is outside the vocabulary (0 to {vocab_size - 1})", "prompt")


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
    words = tuple(ids for ids in _bad_words(params.bad_words, tokenizer) if max(ids) < vocab_size)  # the model cannot write others
    return dataclasses.replace(params, bad_words_token_ids=words)


def _bad_words(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """A word is spelt differently at the start of a text and after a space: both spellings are banned."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for spelling in (word, " " + word.lstrip()):
            if ids := tuple(tokenizer.encode(spelling, add_special_tokens=False)):
                found[ids] = None
    return tuple(found)
