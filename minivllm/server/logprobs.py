"""Log-probabilities in OpenAI's two formats.

    completions   four parallel lists: tokens, token_logprobs, top_logprobs [{text: logprob}], text_offset
    chat          one entry per token: {token, logprob, bytes, top_logprobs: [{token, logprob, bytes}]}

A token may be only a part of a character. Chat's `bytes` are exact then, and completions write "bytes:\\xe2\\x82", as OpenAI does.
"""
from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from minivllm.core.plan import TokenLogprobs

LOWEST = -9999.0  # OpenAI's value for an impossible token: JSON has no minus infinity


class TokenNames(Protocol):
    """The part of a tokenizer that this module uses."""

    def token_bytes(self, token_id: int) -> bytes: ...

    def is_special(self, token_id: int) -> bool: ...


class NumberedTokens:
    """Stands in for the tokenizer of an engine without one: each token is named by its id."""

    def token_bytes(self, token_id: int) -> bytes:
        return f"token_id:{token_id}".encode()

    def is_special(self, token_id: int) -> bool:
        return False


def finite(logprob: float) -> float:
    """A number that JSON can represent."""
    return logprob if math.isfinite(logprob) else LOWEST


def chat_entries(names: TokenNames, entries: Iterable[TokenLogprobs], top: int) -> list[dict[str, Any]]:
    """`choices[].logprobs.content`, one entry per token."""
    def named(token_id: int, logprob: float) -> dict[str, Any]:
        raw = names.token_bytes(token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(raw)}

    return [
        {**named(entry.token_id, entry.logprob),
         "top_logprobs": [named(t, lp) for t, lp in zip(entry.top_ids[:top], entry.top_logprobs[:top], strict=True)]}
        for entry in entries
    ]


class CompletionLogprobs:
    """Completions' format for one choice, token by token. Keeps the offset in the text."""

    def __init__(self, names: TokenNames, top: int, skip_special: bool, echo: tuple[int, str] = (0, "")) -> None:
        """echo: number of the prompt's tokens, which come first, and the text that stands for them."""
        self._names = names
        self._top = top
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # characters of the text so far
        self._prompt_left, self._echo = echo

    def add(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> dict[str, list[Any]]:
        """The four lists for further tokens. A prompt's first token has the entry None, because nothing predicts it."""
        new: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, entry in zip(token_ids, entries, strict=True):
            broken = self._broken_before(token_id)
            new["text_offset"].append(self._offset + broken)
            self._advance(token_id)
            new["tokens"].append(self._name(token_id))
            new["token_logprobs"].append(None if entry is None else finite(entry.logprob))
            new["top_logprobs"].append(None if entry is None else self._tops(entry))
        return new

    def _broken_before(self, token_id: int) -> int:
        """Length of the replacement that a token writes for an incomplete character before it."""
        held, flag = self._utf8.getstate()
        raw = self._names.token_bytes(token_id)
        if not held or (self._skip_special and self._names.is_special(token_id)):
            return 0
        whole = len(self._utf8.decode(raw))
        self._utf8.reset()
        alone = len(self._utf8.decode(raw))
        self._utf8.setstate((held, flag))
        return int(whole > alone)

    def _advance(self, token_id: int) -> None:
        """Move the offset to the end of a token."""
        special, raw = self._skip_special and self._names.is_special(token_id), self._names.token_bytes(token_id)
        if not self._prompt_left:
            self._offset += 0 if special else len(self._utf8.decode(raw))
            return
        # The prompt's text may be as the user typed it: with special tokens, or without the space that a tokenizer puts in front.
        piece = raw.decode("utf-8", "replace") if special else self._utf8.decode(raw)
        if not self._echo.startswith(piece, self._offset):
            piece = "" if special else piece.removeprefix(" ")
        self._offset += len(piece)
        self._prompt_left -= 1
        if not self._prompt_left:  # the output starts behind the prompt's text, also if that ends inside a character
            self._offset = len(self._echo)
            self._utf8.reset()

    def _tops(self, entry: TokenLogprobs) -> dict[str, float]:
        """The most probable tokens and the sampled one: up to top + 1 entries."""
        pairs = list(zip(entry.top_ids[:self._top], entry.top_logprobs[:self._top], strict=True))
        if all(token_id != entry.token_id for token_id, _ in pairs):
            pairs.append((entry.token_id, entry.logprob))
        return {self._name(token_id): finite(logprob) for token_id, logprob in pairs}

    def _name(self, token_id: int) -> str:
        raw = self._names.token_bytes(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def prompt_logprobs(names: TokenNames, entries: Sequence[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: per prompt token, token id -> {logprob, rank, decoded_token}."""
    def row(entry: TokenLogprobs) -> dict[str, Any]:
        ranked = {t: (lp, rank) for rank, (t, lp) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), start=1)}
        ranked[entry.token_id] = (entry.logprob, entry.rank)
        return {
            str(t): {"logprob": finite(lp), "rank": rank, "decoded_token": names.token_bytes(t).decode("utf-8", "replace")}
            for t, (lp, rank) in ranked.items()
        }

    return [None if entry is None else row(entry) for entry in entries]
