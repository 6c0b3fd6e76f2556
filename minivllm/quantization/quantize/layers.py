"""Run the decoder layers of a Transformers model one by one on calibration text, so that only one of them is on the device in float32.

    token ids ─▶ embedding ─▶ (layer 0) ─▶ (layer 1) ─▶ ...          hidden states of all windows between two layers, in host memory
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of a causal language model's decoder layers."""
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    return decoder.h if layers is None else layers  # GPT-J, Falcon and BLOOM call them h


def linears_of(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a decoder layer by name, such as self_attn.q_proj."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


@dataclass(slots=True)
class LayerInputs:
    """Hidden states before a layer, and the other arguments of each layer, which are the same for all windows."""

    hidden: list[Tensor]  # one per window: float32 [1, tokens, hidden], on the CPU
    arguments: list[dict[str, Any]]  # one per layer: attention mask, rotary embedding, ...


def layer_inputs(model: Any, windows: Tensor, device: torch.device) -> LayerInputs:
    """Everything up to the first layer, in float32. windows: int64 [num_samples, seq_len]"""
    decoder, layers, embedding = model.get_decoder(), decoder_layers(model), model.get_input_embeddings()
    for module in decoder.children():
        if module is not layers and module is not embedding:  # the embedding is large, and its rows are converted
            module.float()
    hidden: list[Tensor] = []
    arguments: list[dict[str, Any]] = [{} for _ in layers]

    def record(i: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
            if i == 0:
                hidden.append(hidden_states.cpu())
            arguments[i] = kwargs
            return hidden_states

        return forward

    with _replaced(layers, record), torch.no_grad():
        for ids in windows.split(1):
            decoder(inputs_embeds=embedding(ids).float(), use_cache=False)
    return LayerInputs(hidden, [{name: _moved(value, device) for name, value in kwargs.items()} for kwargs in arguments])


@contextmanager
def _replaced(layers: nn.ModuleList, record: Callable[[int], Callable[..., Tensor]]) -> Iterator[None]:
    """The layers only record their arguments."""
    for i, layer in enumerate(layers):
        layer.forward = record(i)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value


def run_layer(layer: nn.Module, hidden: Sequence[Tensor], arguments: dict[str, Any], device: torch.device) -> Iterator[Tensor]:
    """The layer's outputs for each window, on the CPU."""
    for states in hidden:
        with torch.no_grad():
            out = layer(states.to(device), **arguments)
        yield (out[0] if isinstance(out, tuple) else out).cpu()
