"""Rejection sampling of drafts that were sampled from a distribution (Leviathan et al., 2023; Chen et al., 2023).

A draft d was sampled from q, and the target's distribution at its position is p: after temperature, filters, penalties, bias and masks.

    accept d with probability min(1, p(d) / q(d))             else a sample of max(0, p - q), normalized

The result is a sample of p, whatever q is. A rejected draft has p(d) < q(d), so the second case never gives d again. A draft is therefore
accepted exactly if it equals the chosen token, as for drafts without a distribution, and nothing else depends on how it was chosen.

Everything runs on the device. The noise is a function of counters: each position has four keys (`sampling/noise.py`), of which the draft's
sample, the comparison and the second case use one each. So the three are independent of each other and of the target's own sample.
"""
from __future__ import annotations

import torch
from torch import Tensor

from minivllm.kernels.reference.sampling import gumbel, noise_words, probabilities
from minivllm.kernels.tuning import MAX_DRAFT_PROBS_ROWS
from minivllm.sampling.noise import Purpose, device_keys

SAMPLING_COPIES = 14  # tensors of the logits' size, in float32, that `sample_drafts` allocates at once (measured)


def sample_drafts(logits: Tensor, temperature: Tensor, streams: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Drafts and the distributions that they are sampled from: logits [B, V], the rest [B] -> [B] int64, [B, V] float32.

    positions: of the drafts. With temperature 0 a draft is the most probable token, and its distribution has only this token.
    """
    greedy = (temperature == 0)[:, None]
    z = logits.float() / torch.where(greedy, 1.0, temperature[:, None])
    noise = _gumbel_noise(streams, positions, Purpose.DRAFT, z.shape[-1])
    tokens = (z + noise.masked_fill_(greedy, 0.0)).argmax(dim=-1)
    one = torch.zeros_like(z).scatter_(1, tokens[:, None], 1.0)
    return tokens, torch.where(greedy, one, z.softmax(dim=-1))


def choose_or_recover(p: Tensor, q: Tensor, drafts: Tensor, streams: Tensor, positions: Tensor) -> Tensor:
    """The tokens at the positions of drafts: p, q [n, V] float32, the rest [n] -> [n] int64."""
    accepted = _uniform(streams, positions) * q.gather(1, drafts[:, None])[:, 0] < p.gather(1, drafts[:, None])[:, 0]
    rest = (p - q).clamp_min_(0.0)
    score = rest.log().add_(_gumbel_noise(streams, positions, Purpose.RECOVERY, p.shape[-1]))
    recovered = torch.where(rest.amax(dim=-1) > 0, score.argmax(dim=-1), drafts)  # p and q are equal but for rounding: the draft
    return torch.where(accepted, drafts, recovered)


def _gumbel_noise(streams: Tensor, positions: Tensor, purpose: Purpose, size: int) -> Tensor:
    return gumbel(noise_words(device_keys(streams, positions, purpose), torch.arange(size, dtype=torch.int32, device=streams.device)))


def _uniform(streams: Tensor, positions: Tensor) -> Tensor:
    """[n] float32 in (0, 1)."""
    words = noise_words(device_keys(streams, positions, Purpose.ACCEPTANCE), torch.zeros(1, dtype=torch.int32, device=streams.device))
    return ((words[:, 0].long() & 0xFFFFFFFF).float() + 0.5) * 2.0**-32


def rows_kept(max_num_seqs: int) -> int:
    """Rows whose distributions are kept."""
    return min(max_num_seqs, MAX_DRAFT_PROBS_ROWS)


class DraftProbabilities:
    """The distributions of the newest drafts, by row of the row table. Rows from `num_rows` on have none: their drafts count as certain."""

    def __init__(self, num_rows: int, num_drafts: int, vocab_size: int, device: torch.device) -> None:
        self.num_rows, self.num_drafts = num_rows, num_drafts
        self._probs = torch.zeros((num_rows + 1, num_drafts, vocab_size), device=device)  # the last one takes those of other rows
        self._first = torch.full((num_rows + 1,), -1 - num_drafts, dtype=torch.int64, device=device)  # position of each row's first draft

    @staticmethod
    def num_bytes(max_num_seqs: int, num_drafts: int, vocab_size: int) -> int:
        """What is kept for the rows that `rows_kept` allows."""
        return (rows_kept(max_num_seqs) + 1) * num_drafts * vocab_size * 4 if num_drafts else 0

    @staticmethod
    def peak_bytes(max_num_seqs: int, num_drafts: int, vocab_size: int) -> int:
        """What sampling the drafts of a step allocates: the distribution of each draft twice, and those of `sample_drafts`."""
        return rows_kept(max_num_seqs) * (2 * num_drafts + SAMPLING_COPIES) * vocab_size * 4 if num_drafts else 0

    def store(self, rows: Tensor, first: Tensor, probs: Tensor) -> None:
        """rows [B] int64; first [B]: position of the first draft; probs [B, k, V]."""
        at = rows.clamp_max(self.num_rows)
        self._probs.index_copy_(0, at, probs)
        self._first.index_copy_(0, at, first)

    def forget(self, row: int) -> None:
        """The row belongs to another sequence now, or its drafts are lost."""
        if row < self.num_rows:
            self._first[row] = -1 - self.num_drafts

    def find(self, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """For rows [n] and positions [n]: the distributions of the drafts there [n, V], and whether there is one [n] bool."""
        at = rows.clamp_max(self.num_rows)
        number = positions - self._first[at]
        valid = (rows < self.num_rows) & (number >= 0) & (number < self.num_drafts)
        return self._probs[at, torch.where(valid, number, 0)], valid


def choose_with_drafts(
    sampled: Tensor, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
    q: Tensor, valid: Tensor, drafts: Tensor, streams: Tensor, positions: Tensor,
) -> Tensor:
    """Replace sampled tokens [n] by those of rejection sampling where a draft has a distribution (`valid` [n]): logits [n, V] processed."""
    p = probabilities(logits.float(), temperature, top_k, top_p, min_p)
    return torch.where(valid & (temperature > 0), choose_or_recover(p, q, drafts, streams, positions), sampled)
