"""The cost model: what one request may make the server do, estimated before the work begins.

    body ──▶ choices ──▶ characters that are rendered and tokenized ──▶ tokens ──▶ entries of the answer

Each function checks one cost and raises an error that names the field, the value, the limit and what to change. The table of all costs,
also of those that are checked elsewhere, is in docs/security.md.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

from minivllm.errors import InvalidInput
from minivllm.server.errors import RETRY_AFTER, ApiError, context_error

MAX_TOKEN_CHARACTERS = 256  # no vocabulary has longer tokens
USUAL_CHARACTERS = 16  # hardly any text has more characters per token; a longer one is counted in pieces first
PIECE = 65_536  # characters of such a piece
MAX_TOKENIZED = 2**18  # characters, or tokens, of a text that is only tokenized or detokenized, if the context is not longer
MAX_ENTRIES = 2**18  # log-probabilities in one answer; about 500 bytes each while the answer is built
MAX_KEPT_ENTRIES = 2**21  # in all answers that are being built
MAX_REPEATED = 2**22  # characters, or token ids, of prompts that an answer with several choices repeats for each of them
MAX_INPUTS = 2048  # texts of one request for embeddings (OpenAI's limit), or of both sides of a score
MAX_NUMBERS = 2**22  # of the vectors of one answer; 4 bytes each while they are collected, about 20 as JSON
MAX_KEPT_NUMBERS = 2**24  # of the vectors of all answers that are being built
MAX_BODY_BYTES = 2**28  # of all bodies that are being received or parsed
MAX_PENDING_TOKENS = 2**24  # of the prompts of all unfinished requests; about 25 bytes each


def check_choices(prompts: int, n: int, limit: int) -> None:
    if prompts * n > limit:
        raise InvalidInput(f"prompts ({prompts}) times n ({n}) is {prompts * n} completions, and one request may have {limit}: "
                           "send several requests (--max-choices sets the limit)", "n" if n > 1 else "prompt")


def check_inputs(count: int, param: str) -> None:
    if count > MAX_INPUTS:
        raise InvalidInput(f"{param} has {count} texts, and one request may have {MAX_INPUTS}: send several requests", param)


def check_vectors(count: int, size: int, param: str) -> None:
    """Numbers of an answer with vectors."""
    if count * size > MAX_NUMBERS:
        raise InvalidInput(f"{count} vectors of {size} numbers each make {count * size}, and one answer may have {MAX_NUMBERS}: send fewer "
                           "texts, or lower dimensions", param)


def check_length(characters: int, max_model_len: int, param: str) -> None:
    """Refuse a text that cannot fit the context whatever its tokens are, before it is tokenized."""
    if characters > max_model_len * MAX_TOKEN_CHARACTERS:
        raise context_error(characters, max_model_len, param, unit="characters")


def check_tokens(text: str, encode: Callable[[str], Sequence[int]], max_model_len: int, param: str) -> None:
    """Refuse a long text whose first pieces have more tokens than the context. Tokenizing it whole takes 300 bytes per character."""
    check_length(len(text), max_model_len, param)
    if len(text) <= max(USUAL_CHARACTERS * max_model_len, PIECE):
        return
    tokens = 0
    for start in range(0, len(text), PIECE):
        tokens += max(0, len(encode(text[start:start + PIECE])) - 4)  # the cut and special tokens may add a few
        if tokens > max_model_len:
            raise context_error(tokens, max_model_len, param)


def check_tokenized(count: int, max_model_len: int, param: str, unit: str) -> None:
    """The size of a text for /tokenize or /detokenize, which need not fit the context."""
    limit = max(MAX_TOKENIZED, USUAL_CHARACTERS * max_model_len)
    if count > limit:
        raise InvalidInput(f"{param} has {count} {unit}, and at most {limit} are allowed: send it in parts", param)


def check_entries(choices: int, tokens: int, alternatives: int, prompt_tokens: int, max_model_len: int, param: str) -> None:
    """Log-probabilities of an answer: for each token its own and those of the alternatives. One full context is always allowed."""
    entries = (choices * tokens + prompt_tokens) * (1 + alternatives)
    limit = max(MAX_ENTRIES, 2 * max_model_len * (1 + alternatives))
    if entries > limit:
        raise InvalidInput(f"{choices} completions of up to {tokens} tokens with {alternatives} alternatives each would have {entries} "
                           f"log-probabilities, and one answer may have {limit}: lower n, max_tokens or {param}", param)


def check_repeated(choices: int, size: int, what: str, field: str) -> None:
    """What an answer repeats of a prompt for each of its choices. With one choice it is no more than the request itself."""
    if choices > 1 and choices * size > MAX_REPEATED:
        raise InvalidInput(f"{field} would repeat {size} {what} of the prompt for each of n={choices} choices, and one answer may repeat "
                           f"{MAX_REPEATED}: lower n, or leave {field} out", field)


class CostLedger:
    """What all unfinished requests hold together. An owner that uses less than its share of the limit may always add some."""

    def __init__(self, limit: int, what: str) -> None:
        self._limit = limit
        self._what = what  # that is counted, in errors
        self._kept: dict[str, int] = {}  # by owner

    def add(self, owner: str, count: int) -> None:
        kept = self._kept.get(owner, 0) + count
        if sum(self._kept.values()) + count > self._limit and kept > self._limit // (len(self._kept) + (owner not in self._kept)):
            raise ApiError(429, f"unfinished requests hold {self._limit} {self._what} already: try again later",
                           code="rate_limit_exceeded", headers={"retry-after": RETRY_AFTER})
        self._kept[owner] = kept

    def release(self, owner: str, count: int) -> None:
        self._kept[owner] = self._kept.get(owner, 0) - count
        if self._kept[owner] <= 0:
            del self._kept[owner]
