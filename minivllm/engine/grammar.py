"""Structured output: the tokens that a grammar allows next.

    StructuredOutputsParams ─▶ GrammarCompiler (grammar_compiler.py) ─▶ one matcher per sequence

    GrammarMasks.fill           while the forward pass runs: one bit per token, for each sample of a sequence with a grammar
    SequenceGrammar.advance     after it: the matcher takes the sampled tokens; if the output is complete, the sequence stops

A matcher belongs to a sequence and not to a row, so preemption does not affect it. It takes confirmed tokens only. Therefore the scheduler
plans nothing past a token whose value is unknown for a request with `structured_outputs`.
EOS is allowed where the output may end. Where only EOS could follow, the sequence ends without it.

The matchers are llguidance's (derivatives of regular expressions and an Earley parser). Its work per mask is limited by a count of
operations (`grammar_text.py`), and the time of all masks of a request by `mask_budget.py`. llguidance is imported on first use.
"""
from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import numpy as np

from minivllm.core.plan import Stop
from minivllm.engine.grammar_compiler import GrammarCompiler
from minivllm.engine.grammar_text import Matcher, matcher_error
from minivllm.sampling.logits_processors import TokenMasks


def fill_masks(pool: Any, work: Sequence[tuple[Matcher, Sequence[int]]], words: np.ndarray[Any, Any]) -> None:
    """Write the masks of all (matcher, drafts) in parallel: 1 + len(drafts) rows of `words` [n, W] int32 for each, in order.

    The first row is the mask of the next token, row i + 1 that of the token after the first i + 1 drafts. Rows after a draft that the
    grammar does not allow are not written: that draft will be rejected, and the tokens after it are not used.
    """
    row = 0
    plain: list[tuple[Matcher, int]] = []
    drafted: list[tuple[Matcher, int, list[int]]] = []
    for matcher, drafts in work:
        if drafts:
            drafted.append((matcher, row, list(drafts)))
        else:
            plain.append((matcher, row))
        row += 1 + len(drafts)
    assert row <= len(words) and words.flags.c_contiguous and words.dtype == np.int32
    width = words.shape[1] * words.itemsize
    if len(plain) == 1:  # a common case that needs no threads
        matcher, row = plain[0]
        matcher.unsafe_compute_mask_ptr(words[row].ctypes.data, width)
    elif plain:
        pool.unsafe_compute_mask_ptr(plain, words.ctypes.data, width, len(words))
    if drafted:
        pool.unsafe_compute_mask_ptr_with_draft_token(drafted, words.ctypes.data, width, len(words))


class SequenceGrammar:
    """The position of one sequence in its grammar."""

    __slots__ = ("_matcher", "_start", "failure")

    def __init__(self, start: Matcher) -> None:
        self._start = start
        self._matcher: Matcher | None = None  # a copy of `start`, made for the first mask
        self.failure: str | None = None  # why the grammar could not be followed: the request must end

    @property
    def matcher(self) -> Matcher:
        if self._matcher is None:
            self._matcher = self._start.deep_copy()
        return self._matcher

    def advance(self, tokens: Sequence[int]) -> Stop | None:
        """Take sampled tokens. Returns a `Stop` if they end the output, or if the grammar could not be followed (see `failure`)."""
        matcher = self._matcher
        if matcher is None:
            return None
        for count, token in enumerate(tokens):
            if matcher.is_error():
                self.failure = matcher_error(matcher)
                return Stop(keep=count, matched=None)
            if matcher.try_consume_tokens([token]) != 1:
                if matcher.is_error():  # this token exceeded a limit
                    self.failure = matcher_error(matcher)
                # The request's other settings (bad_words, min_tokens ...) exclude all tokens that the grammar allows.
                elif not matcher.is_accepting():
                    self.failure = "no token is allowed by both structured_outputs and the request's other settings"
                return Stop(keep=count, matched=None)
            if matcher.is_stopped() and not matcher.is_error():
                return Stop(keep=count + 1, matched=None)
        return None


class GrammarMasks:
    """Computes the masks of a step, in parallel."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._pool: Any = None  # llguidance's threads, started on first use
        self._width = 0  # int32 words in a mask

    def fill(self, work: Sequence[tuple[int, SequenceGrammar, Sequence[int]]]) -> TokenMasks:
        """The masks of samples, each given as (first logits row, grammar, drafts): one mask per logits row.

        Logits rows after a draft outside the tokenizer's vocabulary have no mask: that draft is rejected, so they are not used. A matcher
        that exceeds a limit allows only EOS; `advance` then reports it.
        """
        if self._pool is None:
            from llguidance import LLExecutor

            self._pool = LLExecutor()
            self._width = -(-self._compiler.num_tokens // 32)
        known = [list(takewhile(lambda token: token < self._compiler.num_tokens, drafts)) for _, _, drafts in work]
        rows = [row + i for (row, _, _), drafts in zip(work, known, strict=True) for i in range(1 + len(drafts))]
        words = np.zeros((len(rows), self._width), np.int32)
        fill_masks(self._pool, [(grammar.matcher, drafts) for (_, grammar, _), drafts in zip(work, known, strict=True)], words)
        return TokenMasks(np.array(rows, np.int64), words)
