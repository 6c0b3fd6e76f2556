"""A decoder in Transformers' code, around this engine's paged attention.

    InputBatch ─▶ one row of T tokens ─▶ Transformers' layers ─▶ AttentionInterface ─▶ `attend` ─▶ PagedStep
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minivllm.families import kv_groups
from minivllm.kernels.layout import InputBatch, KVLayer
from minivllm.layers.build import BuildContext
from minivllm.models.transformers_interface import LayerMask, head_of, row
from minivllm.models.transformers_spec import ForeignSpec


@dataclass(frozen=True, slots=True)
class PagedStep:
    """A forward pass over the paged cache."""

    kv: Sequence[KVLayer]
    slots: tuple[Tensor, ...]  # [G] of [T]
    metas: tuple[Any, ...]  # [G] from ops.prepare_attention
    group_of: Sequence[int]  # layer -> KV group
    self_attention: Any

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: LayerMask, scale: float, softcap: float | None,
               others: Mapping[str, Any]) -> Tensor:
        """See `Step`. Values that are narrower than keys are padded in the cache."""
        tokens, width, group = q.shape[2], v.shape[-1], self.group_of[layer]
        if width < q.shape[-1]:
            v = nn.functional.pad(v, (0, q.shape[-1] - width))
        qkv = torch.cat([x[0].transpose(0, 1).reshape(tokens, -1) for x in (q, k, v)], dim=1)
        sinks = others.get("s_aux")
        heads = self.self_attention(qkv, self.kv[layer], self.slots[group], self.metas[group], scale=scale, softcap=softcap,
                                    sinks=None if sinks is None else sinks.float())
        return heads.view(1, tokens, q.shape[1], -1)[..., :width]


class TransformersModel:
    """A `LanguageModel` in Transformers' code."""

    def __init__(self, spec: ForeignSpec, build: BuildContext, model: nn.Module) -> None:
        self.spec, self.build, self.groups = spec, build, kv_groups(spec)
        self._base, self._head = getattr(model, str(model.base_model_prefix)), head_of(model)
        self._group_of = {layer: g for g, group in enumerate(self.groups) for layer in group.layers}

    def without_repetition(self) -> TransformersModel:
        """The whole model: its layers cannot be taken apart."""
        return self

    @torch.inference_mode()
    def forward(self, batch: InputBatch, kv: Sequence[KVLayer], block_size: int) -> Tensor:
        """-> hidden states after the final norm: [T, hidden], or [B, hidden] if `batch.last_only`."""
        metas = tuple(self.build.ops.prepare_attention(
            batch, g, block_size=block_size, num_heads=group.num_heads, num_kv_heads=group.kv_heads, head_dim=group.head_dim,
            window=group.window, dtype=self.build.dtype, cache_dtype=kv[group.layers[0]].k.dtype) for g, group in enumerate(self.groups))
        step = PagedStep(kv, batch.slots, metas, self._group_of, self.build.ops.self_attention)  # type: ignore[arg-type]
        hidden: Tensor = self._base(**row(batch.tokens, batch.positions, step))[0][0]
        return hidden.index_select(0, batch.last_tokens()[0]) if batch.last_only else hidden

    def final_hidden(self, hidden: Tensor) -> Tensor:
        """`forward` has applied the final norm."""
        return hidden

    def settle(self) -> None:
        """Nothing is streamed."""

    @torch.inference_mode()
    def logits(self, hidden: Tensor, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """hidden: [L, hidden] of `forward`, only the needed rows -> [L, vocab] in `dtype`; None: in the dtype of the output head."""
        logits: Tensor = self._head(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits if dtype is None else logits.to(dtype)
