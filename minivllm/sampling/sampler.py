"""One token for each sampled row: parameters per row, work only for the rows that ask for it.

    logits [S, V] --+--> (rows with logprobs) keep the raw logits
                    |
                    +--> masks, bans, bias --> penalties --> temperature --> min-p, top-k, top-p --> draw --> token ids [S]
                         only flagged rows                   one call for greedy rows (temperature 0) and others

The parameters of each row stand in numpy columns filled when the row is admitted, so a step only gathers a few integers on
the host; nothing waits for the device. Logits come in the model's dtype. What calculates with them (bias, penalties,
log-probabilities) does so in float32; other rows are compared by the same values either way.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivllm.core.plan import RowAdmission, TokenLogprobs
from minivllm.kernels import Ops, select
from minivllm.kernels.reference import sampling
from minivllm.kernels.upload import upload
from minivllm.sampling.logits_processors import Constraints, DraftRuns, PenaltyCounts, TokenMasks, apply_constraints
from minivllm.sampling.noise import row_keys, stream_key

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class LogprobColumns:
    """Log-probabilities on the device, one entry per sample that asked."""

    index: Array  # [m] which samples
    k: Array  # [m] how many alternatives each asked for
    token_ids: Tensor  # [m]
    logprob: Tensor  # [m]
    rank: Tensor  # [m]
    top_ids: Tensor  # [m, max k]
    top_logprobs: Tensor  # [m, max k]

    @classmethod
    def of(cls, logits: Tensor, token_ids: Tensor, index: Array, k: Array) -> LogprobColumns:
        """From raw logits [m, V] float32 and chosen tokens [m]."""
        return cls(index, k, token_ids, *sampling.token_logprobs(logits, token_ids, int(k.max())))

    def tensors(self) -> tuple[Tensor, ...]:
        return self.token_ids, self.logprob, self.rank, self.top_ids, self.top_logprobs

    def entries(self, host: Sequence[Tensor]) -> list[TokenLogprobs]:
        """Plain values, from `tensors()` copied to the host."""
        ids, logprob, rank, top_ids, top_logprobs = (t.tolist() for t in host)
        return [TokenLogprobs(ids[j], logprob[j], rank[j], tuple(top_ids[j][:k]), tuple(top_logprobs[j][:k]))
                for j, k in enumerate(self.k.tolist())]


@dataclass(frozen=True, slots=True)
class Choice:
    """What the sampler drew, still on the device."""

    token_ids: Tensor  # [S] int64
    logprobs: LogprobColumns | None


class Sampler:
    """Parameters of every row, and the sampling of a batch of them."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device, eos_token_ids: Sequence[int] = (),
                 ops: Ops | None = None) -> None:
        """`ops`: the kernels of the model; by default the device's."""
        self._device, self._ops = device, ops or select(device)
        self._eos_token_ids = tuple(eos_token_ids)
        self._temperature = np.zeros(num_rows, np.float32)  # 0: greedy
        self._top_k = np.zeros(num_rows, np.int32)
        self._top_p = np.ones(num_rows, np.float32)
        self._min_p = np.zeros(num_rows, np.float32)
        self._repetition = np.ones(num_rows, np.float32)
        self._frequency = np.zeros(num_rows, np.float32)
        self._presence = np.zeros(num_rows, np.float32)
        self._logprobs = np.full(num_rows, -1, np.int32)  # -1: none wanted
        self._streams = np.zeros(num_rows, np.uint64)
        self._plain = np.ones(num_rows, np.bool_)  # asks for the largest logit or a draw, and nothing else
        self._constraints: dict[int, Constraints] = {}
        self._zeros = torch.zeros(num_rows, 2, dtype=torch.int32, device=device)
        self._penalties = PenaltyCounts(num_rows, vocab_size, device)

    def admit(self, admission: RowAdmission) -> None:
        """Overwrite a row's parameters; rebuild its counts from the tokens known so far."""
        row, params = admission.row, admission.params
        self._temperature[row] = 0.0 if params.greedy else params.temperature
        self._top_k[row] = params.top_k
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._repetition[row] = params.repetition_penalty
        self._frequency[row] = params.frequency_penalty
        self._presence[row] = params.presence_penalty
        self._logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self._streams[row] = stream_key(admission.seed, admission.child_index)
        filtered = not params.greedy and (params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0)
        constraints = Constraints.of(params, self._eos_token_ids, admission.num_prompt_tokens)
        if constraints:
            self._constraints[row] = constraints
        else:
            self._constraints.pop(row, None)
        self._plain[row] = not (filtered or constraints or params.has_penalties or params.logprobs is not None)
        self._penalties.admit(row, params.has_penalties, admission.token_ids, admission.num_prompt_tokens)

    def all_plain(self, rows: Array) -> bool:
        """Whether these rows ask for the largest logit or a draw from all of them, and for nothing else."""
        return bool(self._plain[rows].all())

    def plain_columns(self, rows: Array, positions: Array) -> tuple[Array, Array]:
        """What that needs: temperatures [S] and keys [S, 2] of rows [S] at the positions [S] of the tokens to be chosen."""
        return self._temperature[rows], row_keys(self._streams[rows], positions)

    def sample(self, logits: Tensor, rows: Array, positions: Array, tokens: Tensor, masks: TokenMasks | None = None) -> Choice:
        """Choose a token for each of S logits rows and count it.

        logits [S, V] float32 or half (overwritten); rows [S]: whose parameters; positions [S]: of the token being chosen;
        tokens [R, max_model_len]: the token table, for bad words; masks: what grammars allow.

        A sequence with k drafts has 1 + k logits rows, one after another, at consecutive positions and all in one call. The caller has
        written the drafts to the token table: the draft that the token of one logits row is compared with stands at its position. Each
        token is chosen as if the drafts before it were output. It is counted only if they are: if each equals the token chosen there.
        """
        wanted = np.flatnonzero(self._logprobs[rows] >= 0)
        slots = self._penalties.slot[rows]
        penalized = np.flatnonzero(slots >= 0)
        constrained = {i: self._constraints[r] for i, r in enumerate(rows.tolist()) if r in self._constraints} if self._constraints else {}

        raw = None
        if len(wanted):
            altered = bool(masks is not None or constrained or len(penalized))
            raw = logits if len(wanted) == len(rows) and not altered else logits[upload([wanted], logits.device)[0]]
            raw = raw.float()
        if len(penalized) or any(len(c.bias_ids) for c in constrained.values()):
            logits = logits.float()
        if masks is not None:
            masks.apply(logits)
        if constrained:
            apply_constraints(logits, constrained, rows, positions, tokens)
        if len(penalized):
            drafts = DraftRuns.of(rows[penalized], positions[penalized])
            self._penalize(logits, rows, penalized, slots[penalized], drafts, tokens)

        token_ids = self._choose(logits, rows, positions)

        if len(penalized):
            sampled = token_ids[upload([penalized], logits.device)[0]]
            self._penalties.add(slots[penalized], sampled, None if drafts is None else drafts.accepted(sampled, tokens))
        if raw is None:
            return Choice(token_ids, None)
        chosen = token_ids[upload([wanted], logits.device)[0]]
        return Choice(token_ids, LogprobColumns.of(raw, chosen, wanted, self._logprobs[rows[wanted]]))

    def _penalize(self, logits: Tensor, rows: Array, index: Array, slots: Array, drafts: DraftRuns | None, tokens: Tensor) -> None:
        at = rows[index]
        where, slot, repetition, frequency, presence = upload(
            [index, slots, self._repetition[at], self._frequency[at], self._presence[at]], logits.device)
        some = logits[where]
        seen, counts = self._penalties.seen[slot], self._penalties.counts[slot]
        if drafts is not None:
            drafts.count(seen, counts, tokens)
        sampling.apply_penalties(some, seen, counts, repetition, frequency, presence)
        logits[where] = some

    def _choose(self, logits: Tensor, rows: Array, positions: Array) -> Tensor:
        """Greedy rows take the largest logit, the others draw: [S, V] -> [S] int64."""
        temperature = self._temperature[rows]
        drawn = temperature > 0
        if not drawn.any():
            return self._ops.sample(logits, *self._greedy_columns(len(rows)))
        # A greedy row needs no filter: the largest logit survives them all.
        top_k, top_p, min_p = self._top_k[rows], self._top_p[rows], self._min_p[rows]
        keys = row_keys(self._streams[rows], positions)
        t, key, k, p, floor = upload([temperature, keys, top_k, top_p, min_p], logits.device)
        return self._ops.sample(logits, t, key, k if (top_k > 0)[drawn].any() else None, p if (top_p < 1.0)[drawn].any() else None,
                                floor if (min_p > 0.0)[drawn].any() else None)

    def _greedy_columns(self, n: int) -> tuple[Tensor, Tensor]:
        """Temperatures and keys of a batch that draws nothing: always the same, so never uploaded."""
        if len(self._zeros) < n:
            self._zeros = torch.zeros(n, 2, dtype=torch.int32, device=self._device)
        return self._zeros.view(torch.float32).view(-1)[:n], self._zeros[:n]
