"""A draft model: a smaller model with the target's vocabulary, whose layers use the target's KV blocks.

Each step first runs the draft over the tokens of the target's step, so that its keys and values exist wherever the target's do, whatever
happened before: a prompt chunk, a cached prefix, steps without drafts, or all drafts accepted. Then the newest token and each draft take a
single-token step.
"""
from __future__ import annotations

import torch
from torch import Tensor

from minivllm.models.decoder import Decoder
from minivllm.sampling.rejection import sample_drafts
from minivllm.speculative.base import DraftTokens, ProposalInput
from minivllm.speculative.steps import MostProbable, SingleTokens, drafts, in_group


class DraftModel:
    """A `DeviceProposer`."""

    needs_hidden, stores = False, True

    def __init__(self, model: Decoder, *, num_target_layers: int, num_drafts: int, group: int, probabilistic: bool = False) -> None:
        """group: the target's KV group whose blocks the draft uses."""
        self.num_drafts = num_drafts
        self._model, self._first, self._group, self._probabilistic = model, num_target_layers, group, probabilistic

    @torch.inference_mode()
    def propose(self, x: ProposalInput) -> DraftTokens:
        """See `DeviceProposer`."""
        self.store(x)
        kv, count = x.kv[self._first :], len(self._model.groups)
        steps = SingleTokens(x, self._group, count, x.lengths - 1, self.num_drafts, self._model.build.ops)
        best = MostProbable(len(x.newest), x.newest.device, self._model.build.ops)
        token, tokens, probs = x.newest, list[Tensor](), list[Tensor | None]()
        for i in range(self.num_drafts):
            token, some = self._choose(self._model.forward(steps.batch(i, token), kv, x.block_size), x, i, best)
            tokens.append(token)
            probs.append(some)
        return drafts(tokens, probs)

    @torch.inference_mode()
    def store(self, x: ProposalInput) -> None:
        """See `DeviceProposer`."""
        self._model.forward(in_group(x.batch, self._group, len(self._model.groups)), x.kv[self._first :], x.block_size)

    def _choose(self, hidden: Tensor, x: ProposalInput, i: int, best: MostProbable) -> tuple[Tensor, Tensor | None]:
        """hidden: [B, hidden] -> draft i of each sequence [B] int64, and the distribution it is sampled from [B, V]."""
        logits = self._model.logits(hidden, dtype=None)
        if not self._probabilistic:
            return best(logits), None
        return sample_drafts(logits, x.temperature, x.streams, x.lengths + i)
