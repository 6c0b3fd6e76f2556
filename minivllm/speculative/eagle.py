"""A learned head on the target's hidden states: EAGLE (Li et al. 2024, arXiv 2401.15077), in the layout of its published checkpoints.

    position p:   embedding of token p + 1 ─┐
                  hidden state of p ────────┴▶ fc ─▶ one decoder layer ─▶ feature ─▶ the target's output head ─▶ token p + 2

The first pass has the positions, slots and lengths of the target's own step, with every token replaced by the one after it. So the head's
keys and values lie in the slots of the target's. It fills them for prompts as for decodes, and its feature after the newest token gives
the first draft. Each further draft is a single-token step, in which the feature takes the place of the hidden state.

The slot of position p depends on token p + 1. If a prompt continues a cached prefix with another token than the request that computed it,
the head sees one key per such place that was made with the other token. This may change a draft, and never an output.
"""
from __future__ import annotations

import torch
from torch import Tensor

from minivllm.families import AttentionSpec
from minivllm.kernels.layout import InputBatch, KVLayer
from minivllm.layers.attention import StepContext
from minivllm.layers.linear import Linear
from minivllm.layers.rope import RotaryEmbedding
from minivllm.models.decoder import Decoder, PreNormLayer
from minivllm.sampling.rejection import sample_drafts
from minivllm.speculative.base import DraftTokens, ProposalInput
from minivllm.speculative.shared import final_norm
from minivllm.speculative.steps import MostProbable, SingleTokens, drafts, in_group


class EagleHead:
    """A `DeviceProposer`."""

    needs_hidden, stores = True, True

    def __init__(self, target: Decoder, fc: Linear, layer: PreNormLayer, attention: AttentionSpec, head: Linear, *, num_drafts: int,
                 group: int, rope: RotaryEmbedding | None, vocabulary: Tensor | None = None, probabilistic: bool = False) -> None:
        """group: the target's KV group whose blocks the head uses. head: without a norm. vocabulary: the token of each of its rows, if it
        has only some of the target's."""
        self.num_drafts = num_drafts
        self._target, self._fc, self._layer, self._attention, self._head = target, fc, layer, attention, head
        self._group, self._rope, self._vocabulary, self._probabilistic = group, rope, vocabulary, probabilistic
        self._norm = final_norm(target)

    @torch.inference_mode()
    def propose(self, x: ProposalInput) -> DraftTokens:
        """See `DeviceProposer`."""
        kv = x.kv[len(self._target.spec.layers)]
        feature = self._first_pass(x).index_select(0, x.last)
        steps = SingleTokens(x, self._group, 1, x.lengths - 1, self.num_drafts - 1, self._target.build.ops)
        best = MostProbable(len(feature), feature.device, self._target.build.ops)
        tokens: list[Tensor] = []
        probs: list[Tensor | None] = []
        for i in range(self.num_drafts):
            token, some = self._choose(feature, x, i, best)
            tokens.append(token)
            probs.append(some)
            if i + 1 < self.num_drafts:
                feature = self._run(steps.batch(i, token), feature, kv, x.block_size)
        return drafts(tokens, probs)

    @torch.inference_mode()
    def store(self, x: ProposalInput) -> None:
        """See `DeviceProposer`."""
        self._first_pass(x)

    def _first_pass(self, x: ProposalInput) -> Tensor:
        """The features [T, hidden] of the target's step."""
        assert x.hidden is not None
        batch = in_group(x.batch, self._group, 1, x.next_tokens)
        return self._run(batch, self._norm(x.hidden), x.kv[len(self._target.spec.layers)], x.block_size)

    def _run(self, batch: InputBatch, hidden: Tensor, kv: KVLayer, block_size: int) -> Tensor:
        """hidden: [T, hidden] of the positions of `batch`, whose tokens are the next ones -> features [T, hidden]."""
        a, build = self._attention, self._target.build
        meta = build.ops.prepare_attention(batch, 0, block_size=block_size, num_heads=a.num_heads, num_kv_heads=a.num_kv_heads,
                                           head_dim=a.head_dim, window=None, dtype=build.dtype, cache_dtype=kv.k.dtype)
        rotation = None if self._rope is None else self._rope(batch.positions)
        joined = torch.cat((self._target.embedding.rows(batch.tokens), hidden), dim=1)
        return self._layer(self._fc(joined), StepContext((rotation,), batch.slots, (meta,)), kv)

    def _choose(self, feature: Tensor, x: ProposalInput, i: int, best: MostProbable) -> tuple[Tensor, Tensor | None]:
        """feature: [B, hidden] -> draft i of each sequence [B] int64, and the distribution it is sampled from [B, V]."""
        logits, vocabulary = self._head(feature), self._vocabulary
        if not self._probabilistic:
            token = best(logits)
            return token if vocabulary is None else vocabulary.index_select(0, token), None
        if vocabulary is not None:
            whole = logits.new_full((len(logits), self._target.spec.vocab_size), float("-inf"))
            logits = whole.index_copy_(1, vocabulary, logits)
        return sample_drafts(logits, x.temperature, x.streams, x.lengths + i)
