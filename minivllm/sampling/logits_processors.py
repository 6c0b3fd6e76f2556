"""Changes to logits before a token is sampled, for the few rows that need any.

The order is vLLM's: grammar mask, allowed ids, bad words, minimum length, bias; then penalties. Rows without these parameters are not
read or written. Nothing here waits for the device: even bad words are compared with the last tokens on the device.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivllm.kernels.reference import sampling as ops
from minivllm.kernels.upload import upload
from minivllm.sampling.bad_words import BadWords, WordSet, word_set
from minivllm.sampling_params import SamplingParams

Array = np.ndarray[Any, Any]
_NO_IDS = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Constraints:
    """One row's banned tokens and biases, as arrays. `max_tokens` is not here: the scheduler ends requests."""

    num_prompt_tokens: int
    allowed: Array | None  # [n] the only ids that may be sampled
    banned: Array  # [n] ids that may not be sampled (bad words of one token)
    words: WordSet | None  # bad words of two tokens or more
    min_tokens: int
    ends: Array  # [n] ids that are banned while the output is shorter than min_tokens
    bias_ids: Array  # [n]
    bias_values: Array  # [n] float32

    @classmethod
    def of(cls, params: SamplingParams, eos_token_ids: Sequence[int], num_prompt_tokens: int) -> Constraints | None:
        """The constraints in `params`; None if there are none."""
        if not (params.allowed_token_ids or params.bad_words_token_ids or params.min_tokens or params.logit_bias):
            return None
        bias = params.logit_bias or {}
        return cls(
            num_prompt_tokens=num_prompt_tokens,
            allowed=np.array(params.allowed_token_ids, np.int64) if params.allowed_token_ids else None,
            banned=np.array([w[0] for w in params.bad_words_token_ids if len(w) == 1], np.int64),
            words=word_set(params.bad_words_token_ids),
            min_tokens=params.min_tokens,
            ends=np.array(sorted({*eos_token_ids, *(params.stop_token_ids or ())}), np.int64) if params.min_tokens else _NO_IDS,
            bias_ids=np.fromiter(bias.keys(), np.int64, len(bias)),
            bias_values=np.fromiter(bias.values(), np.float32, len(bias)),
        )


def apply_constraints(logits: Tensor, constraints: Mapping[int, Constraints], rows: Array, positions: Array, tokens: Tensor,
                      bad_words: BadWords) -> None:
    """In place on logits [L, V]. constraints: index of a logits row -> its constraints; rows [L]: of the token table `tokens`
    [R, max_model_len]; positions [L]: of the tokens to be sampled."""
    vocab = logits.shape[-1]
    banned: list[Array] = []
    biased: list[tuple[Array, Array]] = []
    worded: list[tuple[int, WordSet]] = []
    for i, c in constraints.items():
        num_outputs = int(positions[i]) - c.num_prompt_tokens
        if c.allowed is not None:
            (ids,) = upload([c.allowed], logits.device)
            kept = logits[i, ids]
            logits[i].fill_(-math.inf)
            logits[i, ids] = kept
        banned.append(c.banned + i * vocab)
        if num_outputs < c.min_tokens:
            banned.append(c.ends[c.ends < vocab] + i * vocab)
        if c.words is not None:
            worded.append((i, c.words))
        if len(c.bias_ids):
            biased.append((c.bias_ids + i * vocab, c.bias_values))
    if worded:
        index = [i for i, _ in worded]
        starts, prompts = rows[index] * tokens.shape[1], np.array([constraints[i].num_prompt_tokens for i in index])
        bad_words.apply(logits, worded, starts, starts + positions[index], positions[index] - prompts, tokens)
    flat = logits.view(-1)
    at = np.concatenate(banned) if banned else _NO_IDS
    if len(at):
        flat.index_fill_(0, upload([at], logits.device)[0], -math.inf)
    if biased:
        ids, values = upload([np.concatenate([b[0] for b in biased]), np.concatenate([b[1] for b in biased])], logits.device)
        flat.index_add_(0, ids, values)


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """The tokens that grammars allow, as one bit per token, for some logits rows. So 256 rows of a large vocabulary are 5 MB."""

    rows: Array  # [m] int64, ascending: logits rows of the step, in the plan's order
    words: Array  # [m, W] int32: bit t % 32 of word t // 32 is set if token t is allowed

    @classmethod
    def join(cls, masks: Sequence[TokenMasks]) -> TokenMasks:
        """The masks of several parts of a step. The result is in the order of rows."""
        if len(masks) == 1:
            return masks[0]
        rows, words = np.concatenate([mask.rows for mask in masks]), np.concatenate([mask.words for mask in masks])
        order = np.argsort(rows)
        return cls(rows, words) if (order[1:] > order[:-1]).all() else cls(rows[order], words[order])

    def part(self, start: int, stop: int) -> TokenMasks | None:
        """The masks of logits rows [start, stop), with indices relative to start; None if there are none."""
        first, last = np.searchsorted(self.rows, (start, stop)).tolist()
        return TokenMasks(self.rows[first:last] - start, self.words[first:last]) if last > first else None

    def apply(self, logits: Tensor) -> None:
        """In place on logits [L, V]. One upload, one operation."""
        if len(self.rows) == len(logits):
            ops.apply_bitmask(logits, None, upload([self.words], logits.device)[0])
        else:
            index, words = upload([self.rows, self.words], logits.device)
            ops.apply_bitmask(logits, index, words)


class PenaltyCounts:
    """How often each token occurred, for rows with penalties. All memory is allocated at the start: 5 bytes per row and vocabulary entry.

        seen     [R, V] bool: in prompt or output
        counts   [R, V] int32: occurrences in the output
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self.penalized = np.zeros(num_rows, np.bool_)  # other rows of the tables mean nothing
        self.seen = _zeros((num_rows, vocab_size), np.bool_, device)
        self.counts = _zeros((num_rows, vocab_size), np.int32, device)

    @staticmethod
    def num_bytes(num_rows: int, vocab_size: int) -> int:
        return num_rows * vocab_size * 5

    def admit(self, row: int, penalized: bool, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Reset a row: count `token_ids` if it is `penalized`."""
        self.penalized[row] = penalized
        if not penalized:
            return
        self.seen[row].fill_(False)
        self.counts[row].zero_()
        ids = upload([np.array(token_ids, np.int64)], self.counts.device)[0]
        self.seen[row].index_fill_(0, ids, True)
        self.add(np.full(len(token_ids) - num_prompt_tokens, row), ids[num_prompt_tokens:])

    def add(self, rows: Array, token_ids: Tensor, accepted: Tensor | None = None) -> None:
        """Count a token [n] for each row [n], if accepted [n] bool; None: all are."""
        vocab = self.counts.shape[1]
        at = upload([rows * vocab], token_ids.device)[0] + token_ids
        if accepted is None:
            accepted = torch.ones_like(at, dtype=torch.bool)
        else:
            at = torch.where(accepted, at, at[0])  # the first token is always accepted: it may be marked as seen twice
        self.seen.view(-1).index_fill_(0, at, True)
        self.counts.view(-1).index_add_(0, at, accepted.to(torch.int32))


def _zeros(shape: tuple[int, int], dtype: Any, device: torch.device) -> Tensor:
    """On a CPU, pages that are never written take no memory."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(shape, dtype))
    return torch.zeros(shape, dtype=torch.bool if dtype is np.bool_ else torch.int32, device=device)


@dataclass(frozen=True, slots=True)
class DraftRuns:
    """Runs of logits rows: those of one sequence, at consecutive positions. Each logits row but the first follows a draft.

        logits row           0    1    2    3    4    5        sequences with two drafts, none, and one
        first of the run     0    0    0    3    4    4
        drafts before it     -    a    a b  -    -    c        at the positions of the logits rows before it, in the token table
    """

    rows: Array  # [n] of the token table
    positions: Array  # [n] of the tokens to be sampled
    first: Array  # [n] index of the run's first logits row

    @classmethod
    def of(cls, rows: Array, positions: Array) -> DraftRuns | None:
        """None if each sequence has one logits row."""
        follows = np.zeros(len(rows), np.bool_)
        follows[1:] = (rows[1:] == rows[:-1]) & (positions[1:] == positions[:-1] + 1)
        if not follows.any():
            return None
        return cls(rows, positions, np.maximum.accumulate(np.where(follows, 0, np.arange(len(rows)))))

    def count(self, start: int, seen: Tensor, counts: Tensor, tokens: Tensor) -> None:
        """Add the drafts before each of the logits rows from `start` on to its counts, in place: seen [m, V] bool, counts [m, V] int32."""
        part = np.arange(start, start + len(seen))
        before = part - self.first[part]  # number of drafts
        target = np.repeat(part, before)  # for each pair of a logits row and a draft before it: the logits row,
        draft = np.arange(len(target)) - np.repeat(before.cumsum() - before, before) + self.first[target]  # and the one at the draft
        at, index = upload([(target - start) * seen.shape[1], self._table_index(tokens)[draft]], seen.device)
        at += tokens.view(-1)[index]
        seen.view(-1).index_fill_(0, at, True)
        counts.view(-1).index_add_(0, at, torch.ones_like(at, dtype=torch.int32))

    def accepted(self, token_ids: Tensor, tokens: Tensor) -> Tensor:
        """Whether all drafts before each logits row equal the tokens sampled there: token_ids [n] -> [n] bool."""
        first, index = upload([self.first, self._table_index(tokens)], token_ids.device)
        wrong = (tokens.view(-1)[index] != token_ids).cumsum(0)
        wrong = torch.cat((wrong.new_zeros(1), wrong[:-1]))  # number of wrong drafts before each logits row, earlier runs included
        return wrong == wrong[first]

    def _table_index(self, tokens: Tensor) -> Array:
        return self.rows * tokens.shape[1] + self.positions
