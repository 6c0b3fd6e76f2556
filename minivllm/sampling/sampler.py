"""One token for each logits row: each row has its own parameters, and only rows that need an operation get it.

    logits [L, V] --+--> (rows with logprobs) a copy of the raw logits
                    |
                    +--> masks, bans, bias --> penalties --> temperature --> min-p, top-k, top-p --> sample --> token ids [L]
                         only rows that need it             one call for greedy rows (temperature 0) and others

The parameters are numpy columns with one entry per row of the row table, written when a row is admitted. So a step only gathers a few
numbers on the host, and nothing waits for the device. Logits come in the model's dtype. Bias, penalties and log-probabilities are computed
in float32. Other rows have the same values in either dtype.

A sequence with drafts has several logits rows. Their tokens are sampled as if the drafts before them were output, which makes
verification simple: a draft is accepted if it equals the token that is sampled at its position.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivllm.core.plan import RowAdmission, TokenLogprobs
from minivllm.kernels import Ops, select
from minivllm.kernels.reference import sampling
from minivllm.kernels.upload import upload
from minivllm.sampling.bad_words import PAIR_BYTES, BadWords
from minivllm.sampling.logits_processors import Constraints, DraftRuns, PenaltyCounts, TokenMasks, apply_constraints
from minivllm.sampling.noise import device_keys, row_keys, stream_key
from minivllm.sampling.rejection import DraftProbabilities, choose_with_drafts
from minivllm.sampling_params import MAX_STRINGS, SamplingParams

Array = np.ndarray[Any, Any]
# Temperatures and repetition penalties beyond these limits act as the limits do. They keep all products in float32's range.
LEAST, MOST = 1e-20, 1e20
MAX_LOGITS_ROWS = 256  # rows of logits that exist at a time
WIDE_LOGITS = 1 << 22  # logits that are copied to float32 at a time, for penalties, bias and log-probabilities: 27 rows of 151,936 tokens
PENALTY_PARTS = 2  # in which the penalties of these rows are computed, because they need several more copies


@dataclass(frozen=True, slots=True)
class LogprobColumns:
    """Log-probabilities on the device, for the logits rows that need them."""

    index: Array  # [m] of the logits rows
    k: Array  # [m] number of alternatives for each
    token_ids: Tensor  # [m]
    logprob: Tensor  # [m]
    rank: Tensor  # [m]
    top_ids: Tensor  # [m, max k]
    top_logprobs: Tensor  # [m, max k]

    @classmethod
    def of(cls, logits: Tensor, token_ids: Tensor, index: Array, k: Array, most: int | None = None) -> LogprobColumns:
        """From raw logits [m, V] float32 and tokens [m]. most: columns of alternatives, by default the largest k."""
        return cls(index, k, token_ids, *sampling.token_logprobs(logits, token_ids, int(k.max()) if most is None else most))

    @classmethod
    def join(cls, parts: Sequence[LogprobColumns]) -> LogprobColumns:
        """Parts with the same number of columns of alternatives, one after another."""
        if len(parts) == 1:
            return parts[0]
        return cls(np.concatenate([part.index for part in parts]), np.concatenate([part.k for part in parts]),
                   *(torch.cat(tensors) for tensors in zip(*(part.tensors() for part in parts), strict=True)))

    def tensors(self) -> tuple[Tensor, ...]:
        return self.token_ids, self.logprob, self.rank, self.top_ids, self.top_logprobs

    def entries(self, host: Sequence[Tensor]) -> list[TokenLogprobs]:
        """Plain values, from `tensors()` copied to the host."""
        ids, logprob, rank, top_ids, top_logprobs = (t.tolist() for t in host)
        return [TokenLogprobs(ids[j], logprob[j], rank[j], tuple(top_ids[j][:k]), tuple(top_logprobs[j][:k]))
                for j, k in enumerate(self.k.tolist())]


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """The sampler's result, still on the device."""

    token_ids: Tensor  # [L] int64
    logprobs: LogprobColumns | None


class Sampler:
    """Holds the sampling parameters of all rows, and samples tokens for some of them."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device, eos_token_ids: Sequence[int] = (),
                 ops: Ops | None = None, draft_probs: DraftProbabilities | None = None) -> None:
        """`ops`: the kernels of the model; by default the device's. draft_probs: where a proposer keeps the distributions of its drafts."""
        self.draft_probs = draft_probs
        self._ops = ops or select(device)
        self.wide_rows = wide_rows(vocab_size)
        self._eos_token_ids = tuple(eos_token_ids)
        self._temperature = np.zeros(num_rows, np.float32)  # 0: greedy
        self._top_k = np.zeros(num_rows, np.int32)
        self._top_p = np.ones(num_rows, np.float32)
        self._min_p = np.zeros(num_rows, np.float32)
        self._repetition = np.ones(num_rows, np.float32)
        self._frequency = np.zeros(num_rows, np.float32)
        self._presence = np.zeros(num_rows, np.float32)
        self._logprobs = np.full(num_rows, -1, np.int32)  # number of alternatives; -1: no logprobs
        self._streams = np.zeros(num_rows, np.uint64)
        self._plain = np.ones(num_rows, np.bool_)  # greedy or with a temperature, and no other parameter
        self._constraints: dict[int, Constraints] = {}
        self._last_params: SamplingParams | None = None  # of the row that was admitted last
        self._last_prompt = 0
        self._last_constraints: Constraints | None = None
        self._bad_words = BadWords(device)
        self._zeros = torch.zeros(max(num_rows, MAX_LOGITS_ROWS), 2, dtype=torch.int32, device=device)
        self._penalties = PenaltyCounts(num_rows, vocab_size, device)

    @staticmethod
    def num_bytes(num_rows: int, vocab_size: int) -> int:
        """Device memory that a sampler keeps, with all rows in use: nothing grows beyond it while requests are served."""
        pairs = min(num_rows, MAX_LOGITS_ROWS) * 2 * MAX_STRINGS  # each bad word at the start of a text and after a space
        return PenaltyCounts.num_bytes(num_rows, vocab_size) + pairs * PAIR_BYTES + max(num_rows, MAX_LOGITS_ROWS) * 8

    @staticmethod
    def peak_bytes(vocab_size: int, itemsize: int) -> int:
        """Estimated device memory of the largest sampling call, in which all rows have penalties and log-probabilities.

        The logits; of `wide_rows` rows, the raw ones in float32 and those that penalties change; and for a part of these, 26 bytes per
        token at a time: their own copy, the tokens' counts, factors and products.
        """
        wide = min(wide_rows(vocab_size), MAX_LOGITS_ROWS)
        return vocab_size * (MAX_LOGITS_ROWS * itemsize + wide * 8 + -(-wide // PENALTY_PARTS) * 26)

    def reset(self) -> None:
        """Forget all rows; their memory stays."""
        self._constraints.clear()
        self._last_params = self._last_constraints = None
        self._bad_words.reset()
        self._penalties.penalized.fill(False)
        self._logprobs.fill(-1)
        self._plain.fill(True)
        self._temperature.fill(0.0)

    def admit(self, admission: RowAdmission) -> None:
        """Overwrite a row's parameters, and count its tokens again if it has penalties."""
        row, params = admission.row, admission.params
        if self.draft_probs is not None:
            self.draft_probs.forget(row)
        self._temperature[row] = 0.0 if params.greedy else min(params.temperature, MOST)
        self._top_k[row] = params.top_k
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._repetition[row] = min(max(params.repetition_penalty, LEAST), MOST)
        self._frequency[row] = params.frequency_penalty
        self._presence[row] = params.presence_penalty
        self._logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self._streams[row] = stream_key(admission.seed, admission.child_index)
        filtered = not params.greedy and (params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0)
        if params is not self._last_params or admission.num_prompt_tokens != self._last_prompt:  # the children of a request share one copy
            self._last_params, self._last_prompt = params, admission.num_prompt_tokens
            self._last_constraints = Constraints.of(params, self._eos_token_ids, admission.num_prompt_tokens)
        constraints = self._last_constraints
        if constraints:
            self._constraints[row] = constraints
        else:
            self._constraints.pop(row, None)
        self._plain[row] = not (filtered or constraints or params.has_penalties or params.logprobs is not None)
        self._penalties.admit(row, params.has_penalties, admission.token_ids, admission.num_prompt_tokens)

    def all_plain(self, rows: Array) -> bool:
        """Whether these rows are sampled plainly: greedily or with a temperature, without any other parameter."""
        return bool(self._plain[rows].all())

    def plain_columns(self, rows: Array, positions: Array) -> tuple[Array, Array]:
        """What plain sampling needs: temperatures [L] and noise keys [L, 2], for rows [L] and positions [L] of the tokens to be sampled."""
        return self._temperature[rows], row_keys(self._streams[rows], positions)

    def temperatures(self, rows: Array) -> Array:
        """[n] float32; 0: greedy."""
        return self._temperature[rows]

    def streams(self, rows: Array) -> Array:
        """The noise streams of rows [n]: [n] int64, the bits of a uint64."""
        return self._streams[rows].view(np.int64)

    def sample(self, logits: Tensor, rows: Array, positions: Array, tokens: Tensor, masks: TokenMasks | None = None,
               shift: Tensor | None = None) -> SampledTokens:
        """Sample a token for each of L logits rows, and count it.

        logits [L, V] float32 or half (overwritten); rows [L]: of the row table, whose parameters apply; positions [L]: of the tokens to be
        sampled; tokens [R, max_model_len]: the token table; masks: the tokens that grammars allow.

        A sequence with k drafts has 1 + k logits rows, one after another, at consecutive positions, all in one call. The caller has written
        the drafts to the token table: a draft is at the position of the token that it is compared with. Each token is sampled as if the
        drafts before it were output. It is counted only if all of these drafts are accepted.

        shift [L] int64: on the device, by how much `positions` exceed the true ones, because drafts of an earlier step may have been
        rejected. Only rows whose parameters do not depend on positions may have a shift other than 0 (see `core.scheduler_state`).
        """
        logprobs = self._logprobs[rows]
        all_wide = self._penalties.penalized[rows].any() or self._biased(rows)  # logits of one step have one dtype
        if (len(rows) if all_wide else (logprobs >= 0).sum()) <= self.wide_rows:
            return self._sample(logits, rows, positions, tokens, masks, shift)
        parts = [(part.start, self._sample(logits[part], rows[part], positions[part], tokens,
                                           None if masks is None else masks.part(part.start, part.stop),
                                           None if shift is None else shift[part], int(logprobs.max())))
                 for part in parts_of(rows, positions, self.wide_rows)]
        columns = [replace(found.logprobs, index=found.logprobs.index + start) for start, found in parts if found.logprobs is not None]
        return SampledTokens(torch.cat([found.token_ids for _, found in parts]), LogprobColumns.join(columns) if columns else None)

    def _biased(self, rows: Array) -> bool:
        """Whether a row has a bias."""
        return bool(self._constraints) and any(len(c.bias_ids) for c in map(self._constraints.get, rows.tolist()) if c is not None)

    def _sample(self, logits: Tensor, rows: Array, positions: Array, tokens: Tensor, masks: TokenMasks | None,
                shift: Tensor | None, most: int | None = None) -> SampledTokens:
        """As `sample`, of rows that may all be copied to float32. most: columns of alternatives in the log-probabilities."""
        with_logprobs = np.flatnonzero(self._logprobs[rows] >= 0)
        penalized = np.flatnonzero(self._penalties.penalized[rows])
        constrained = {i: self._constraints[r] for i, r in enumerate(rows.tolist()) if r in self._constraints} if self._constraints else {}

        raw = None
        if len(with_logprobs):
            altered = bool(masks is not None or constrained or len(penalized))
            raw = logits if len(with_logprobs) == len(rows) and not altered else logits[upload([with_logprobs], logits.device)[0]]
            raw = raw.float()
        if len(penalized) or any(len(c.bias_ids) for c in constrained.values()):
            logits = logits.float()
        if masks is not None:
            masks.apply(logits)
        if constrained:
            apply_constraints(logits, constrained, rows, positions, tokens, self._bad_words)
        if len(penalized):
            drafts = DraftRuns.of(rows[penalized], positions[penalized])
            step = -(-self.wide_rows // PENALTY_PARTS)
            for start in range(0, len(penalized), step):
                self._penalize(logits, rows, penalized[start : start + step], start, drafts, tokens)

        token_ids = self._choose(logits, rows, positions, shift)
        if self.draft_probs is not None:
            token_ids = self._reject(self.draft_probs, token_ids, logits, rows, positions, tokens, shift)

        if len(penalized):
            sampled = token_ids[upload([penalized], logits.device)[0]]
            self._penalties.add(rows[penalized], sampled, None if drafts is None else drafts.accepted(sampled, tokens))
        if raw is None:
            return SampledTokens(token_ids, None)
        chosen = token_ids[upload([with_logprobs], logits.device)[0]]
        return SampledTokens(token_ids, LogprobColumns.of(raw, chosen, with_logprobs, self._logprobs[rows[with_logprobs]], most))

    def _penalize(self, logits: Tensor, rows: Array, index: Array, start: int, drafts: DraftRuns | None, tokens: Tensor) -> None:
        """index: of some of the logits rows with penalties; the first one is number `start` of all of these."""
        at = rows[index]
        where, row, repetition, frequency, presence = upload(
            [index, at, self._repetition[at], self._frequency[at], self._presence[at]], logits.device)
        some = logits[where]
        seen, counts = self._penalties.seen[row], self._penalties.counts[row]
        if drafts is not None:
            drafts.count(start, seen, counts, tokens)
        sampling.apply_penalties(some, seen, counts, repetition, frequency, presence)
        logits[where] = some

    def _reject(self, kept: DraftProbabilities, token_ids: Tensor, logits: Tensor, rows: Array, positions: Array, tokens: Tensor,
                shift: Tensor | None) -> Tensor:
        """Choose the tokens at drafts with a distribution by rejection sampling: token_ids [L], as sampled without drafts -> [L]."""
        runs = DraftRuns.of(rows, positions)
        if runs is None:
            return token_ids
        before_next = np.append(runs.first[1:] != np.arange(1, len(rows)), False)  # whether a draft follows the logits row
        index = np.flatnonzero(before_next & (self._temperature[rows] > 0))
        token_ids, step = token_ids.clone(), -(-self.wide_rows // PENALTY_PARTS)
        for start in range(0, len(index), step):
            part = index[start : start + step]
            at = rows[part]
            where, row, position, stream, t, k, p, floor = upload([
                part, at, positions[part], self.streams(at), self._temperature[at], self._top_k[at], self._top_p[at], self._min_p[at]],
                logits.device)
            if shift is not None:
                position = position - shift[where]
            q, valid = kept.find(row, position)
            drafts = tokens.view(-1)[row * tokens.shape[1] + position].long()
            token_ids[where] = choose_with_drafts(token_ids[where], logits[where], t, k, p, floor, q, valid, drafts, stream, position)
        return token_ids

    def _choose(self, logits: Tensor, rows: Array, positions: Array, shift: Tensor | None = None) -> Tensor:
        """Greedy rows take the largest logit, other rows are sampled: [L, V] -> [L] int64."""
        temperature = self._temperature[rows]
        random = temperature > 0
        if not random.any():
            return self._ops.sample(logits, *self._greedy_columns(len(rows)))
        # Filters of greedy rows can be ignored: no filter removes the largest logit.
        top_k, top_p, min_p = self._top_k[rows], self._top_p[rows], self._min_p[rows]
        if shift is None:
            t, key, k, p, floor = upload([temperature, row_keys(self._streams[rows], positions), top_k, top_p, min_p], logits.device)
        else:
            t, stream, position, k, p, floor = upload([temperature, self.streams(rows), positions, top_k, top_p, min_p], logits.device)
            key = device_keys(stream, position - shift)
        return self._ops.sample(logits, t, key, k if (top_k > 0)[random].any() else None, p if (top_p < 1.0)[random].any() else None,
                                floor if (min_p > 0.0)[random].any() else None)

    def _greedy_columns(self, n: int) -> tuple[Tensor, Tensor]:
        """Temperatures and keys of a batch of greedy rows: all zeros, which are on the device already."""
        assert n <= len(self._zeros), "the caller samples at most MAX_LOGITS_ROWS at a time"
        return self._zeros.view(torch.float32).view(-1)[:n], self._zeros[:n]


def wide_rows(vocab_size: int) -> int:
    """Logits rows that are copied to float32 at a time."""
    return max(1, WIDE_LOGITS // vocab_size)


def parts_of(rows: Array, positions: Array, limit: int) -> Iterator[slice]:
    """Logits rows, at most `limit` at a time; rows of one sequence with drafts, at consecutive positions, stay together."""
    total, start, last = len(rows), 0, 0
    follows = (rows[1:] == rows[:-1]) & (positions[1:] == positions[:-1] + 1)
    for end in [*(np.flatnonzero(~follows) + 1).tolist(), total]:  # of samples
        if end - start > limit and last > start:
            yield slice(start, last)
            start = last
        last = end
    yield slice(start, total)
