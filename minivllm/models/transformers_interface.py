"""How Transformers' modeling code calls this engine's attention, and how this engine calls that code.

    row of T tokens ─▶ Transformers' layers ─▶ AttentionInterface ─▶ `attend` ─▶ Step.attend

A step's cache and metadata travel in the attention mask, the one argument that every model passes down to its attention: the mask that
goes in carries the step (`row`), Transformers builds each layer's mask from it with `_mask`, and what arrives in `attend` is a `LayerMask`.
"""
from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

NAME = "minivllm"  # of this engine's attention in Transformers' interfaces


class Step(Protocol):
    """What happens in one layer's attention."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: LayerMask, scale: float, softcap: float | None,
               others: Mapping[str, Any]) -> Tensor:
        """q: [1, H, T, D], k, v: [1, KV, T, D or the values' own] -> [1, T, H, dimension of a value]."""


@dataclass(frozen=True, slots=True)
class LayerMask:
    """Stands where the mask of a layer would: the step, and which keys a query sees."""

    step: Step
    window: int | None
    visible: Any  # (batch, head, query, key) -> whether this query sees this key, as 0-dimensional tensors


class Unsupported(Exception):
    """Why a model cannot run here, as the end of a sentence."""


def register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _mask)


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, scaling: float | None = None,
           softcap: float | None = None, **others: Any) -> tuple[Tensor, None]:
    """This engine's attention, with the signature of Transformers' AttentionInterface."""
    if not isinstance(attention_mask, LayerMask):
        raise Unsupported("its attention does not get the mask that Transformers' AttentionMaskInterface makes")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise Unsupported(f"its {type(module).__name__} has no layer_idx")
    return attention_mask.step.attend(layer, query, key, value, attention_mask, scale, softcap, others), None


def _mask(*, attention_mask: Any = None, local_size: int | None = None, mask_function: Any = None, **_: Any) -> LayerMask:
    """Transformers' AttentionMaskInterface: one layer's mask, from the one that `row` made."""
    step = getattr(attention_mask, "step", None)
    if step is None:
        raise Unsupported("its code replaces the attention mask")
    return LayerMask(step, local_size, mask_function)


def row(tokens: Tensor, positions: Tensor, step: Step) -> dict[str, Any]:
    """The keyword arguments of a forward pass over T tokens of any number of sequences, as one row."""
    mask = torch.ones((1, len(tokens)), dtype=torch.bool, device=tokens.device)
    mask.step = step  # type: ignore[attr-defined]
    return {"input_ids": tokens[None].long(), "position_ids": positions[None], "attention_mask": mask, "use_cache": False}


class _Given(nn.Module):
    """In place of a decoder: its result is what it gets as embeddings."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _GivenOutput:
        return _GivenOutput(inputs_embeds)


class _GivenOutput:
    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        """Caches, attention weights and routers' logits, of which there are none."""


def head_of(model: nn.Module) -> nn.Module:
    """The model's way from final hidden states to logits, with its scale and its cap: its class around no layers."""
    head = copy.copy(model)
    head._modules = {**model._modules, model.base_model_prefix: _Given()}  # type: ignore[dict-item]
    return head
