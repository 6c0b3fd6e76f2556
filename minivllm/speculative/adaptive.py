"""How many drafts pay, for one sequence, from the measured share of its drafts that were right.

With k drafts, each right with probability a if those before it are, a step gives 1 + a + a^2 + ... + a^k tokens (Leviathan et al.,
2023). It computes 1 + k tokens of each sequence in place of one. The time of a step of T tokens is modelled as 1 + T / free_tokens, in
units of the time in which the weights are read: a small step takes about that time, whatever it computes. A step with drafts takes
`verify` longer. The numbers are in `kernels/tuning.py`.
"""
from __future__ import annotations

from functools import lru_cache

from minivllm.kernels.tuning import SPECULATION, SpeculationCost
from minivllm.speculative_config import SpeculativeConfig

MEMORY = 0.15  # weight of the newest observation in the running averages
LEAST_GAIN = 1.05  # fewer drafts, or none, unless the model expects at least this
_GRID = 50  # averages are rounded to 1 / 50, so that few different lengths are computed


def cost_of(device: str) -> SpeculationCost:
    """What drafts cost on a device, such as cuda:0."""
    return SPECULATION.get(device.partition(":")[0], SPECULATION["cpu"])


def most_speculative_seqs(config: SpeculativeConfig, device: str) -> int:
    """Sequences of the largest step with drafts."""
    return cost_of(device).most_seqs if config.disable_by_batch_size is None else config.disable_by_batch_size - 1


class Acceptance:
    """What is known about the drafts of one sequence."""

    __slots__ = ("right",)

    def __init__(self, right: float) -> None:
        self.right = right  # share of tested drafts that were right; a draft after a wrong one is not tested

    def tested(self, right: bool) -> None:
        self.right += MEMORY * (right - self.right)

    def length(self, num_seqs: int, most: int, cost: SpeculationCost) -> int:
        """The number of drafts to verify, at most `most`, in a step of so many sequences."""
        return _best_length(round(self.right * _GRID), num_seqs, most, cost)


def expected_gain(right: float, num_seqs: int, length: int, cost: SpeculationCost) -> float:
    """Tokens per second with `length` drafts per sequence, over those without, if each tested draft is right with probability `right`."""
    tokens = sum(right**i for i in range(length + 1))
    return tokens * (1 + num_seqs / cost.free_tokens) / (1 + cost.verify + num_seqs * (1 + length) / cost.free_tokens)


@lru_cache(maxsize=4096)
def _best_length(right: int, num_seqs: int, most: int, cost: SpeculationCost) -> int:
    most = min(most, cost.most_rows // num_seqs - 1)
    gains = {length: expected_gain(min(right / _GRID, 0.98), num_seqs, length, cost) for length in range(1, most + 1)}
    best = max(gains, key=gains.__getitem__, default=0)
    return best if best and gains[best] > LEAST_GAIN else 0
