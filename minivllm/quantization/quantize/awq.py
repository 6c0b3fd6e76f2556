"""AWQ: before rounding, scale up the weights of input channels with large activations, and divide those activations by the same factors.

    y = x W^T = (x / s) (W s)^T         a larger weight in the same grid has a smaller relative error

The division costs nothing at run time, because it is folded into the operation that produces x: a norm's weight, or the rows of the linear
layer before. s = |x|^ratio, where |x| is the mean magnitude of a channel and the ratio is searched in a grid. Then each group's range is
searched too: clipping its largest weights makes the grid finer for all others.

Both searches minimize the squared error of the layer's outputs on calibration text, trace(dW H dW^T) with H = x^T x.

Source: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", and its code, llm-awq.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minivllm.quantization.quantize.groups import Grid, RoundedWeight, nearest_values, round_to_nearest
from minivllm.quantization.quantize.statistics import InputStatistics, output_error

RATIOS = tuple(i / 20 for i in range(20))
CLIPS = tuple(1 - i / 20 for i in range(10))  # fractions of a group's largest magnitude


@dataclass(frozen=True, slots=True)
class Fold:
    """Linear layers of a decoder layer with the same input, and the module that takes the division of it."""

    before: str  # a norm, or a linear layer whose outputs are multiplied elementwise or averaged, so that rows can be divided
    linears: tuple[str, ...]


LLAMA = (
    Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Fold("self_attn.v_proj", ("self_attn.o_proj",)),
    Fold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Fold("mlp.up_proj", ("mlp.down_proj",)),
)
OPT = (  # with ReLU: relu(x / s) = relu(x) / s
    Fold("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Fold("self_attn.v_proj", ("self_attn.out_proj",)),
    Fold("final_layer_norm", ("fc1",)),
    Fold("fc1", ("fc2",)),
)
FOLDS: Mapping[str, tuple[Fold, ...]] = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "opt": OPT}  # by model_type
NOT_CLIPPED = ("q_proj", "k_proj")  # their outputs are multiplied with each other, so output errors are no good measure


def awq(layer: Any, statistics: Mapping[str, InputStatistics], folds: Sequence[Fold], grid: Grid) -> dict[str, RoundedWeight]:
    """Quantize every linear layer of a decoder layer (float32). The folds change its norms and weights, and `statistics`."""
    for fold in folds:
        if _is_exact(layer, fold):
            _apply(layer, fold, statistics, _search_scales(layer, fold, statistics, grid))
    found = {}
    for name, stats in statistics.items():
        weight = layer.get_submodule(name).weight.data
        limit = None if name.endswith(NOT_CLIPPED) else _search_clips(weight, stats.hessian, grid)
        found[name] = round_to_nearest(weight, grid, limit)
    return found


def _is_exact(layer: Any, fold: Fold) -> bool:
    """Whether the fold leaves the layer's outputs unchanged. It does in all models of a `model_type`, except OPT's with other settings."""
    before = layer.get_submodule(fold.before)
    if isinstance(before, nn.LayerNorm):
        return before.elementwise_affine and layer.do_layer_norm_before
    return fold.before != "fc1" or isinstance(layer.activation_fn, nn.ReLU)


def _search_scales(layer: Any, fold: Fold, statistics: Mapping[str, InputStatistics], grid: Grid) -> Tensor:
    """The best factors of the fold's input channels. -> [K]"""
    weights = [layer.get_submodule(name).weight.data for name in fold.linears]
    stats = statistics[fold.linears[0]]
    magnitude = _by_row(layer, fold, stats.magnitude / stats.tokens).mean(1, keepdim=True)
    magnitude = magnitude.expand(_by_row(layer, fold, stats.magnitude).shape).flatten()
    best, least = torch.ones_like(magnitude), None
    for ratio in RATIOS:
        scales = magnitude.pow(ratio).clamp_min(1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = sum(float(output_error(nearest_values(weight * scales, grid) / scales - weight, stats.hessian))
                    for weight in weights)
        if least is None or error < least:
            best, least = scales, error
    return best


def _by_row(layer: Any, fold: Fold, channels: Tensor) -> Tensor:
    """Input channels [K] as [.., repeats, ..]: those in the middle dimension are copies of one row of the module before.

    With grouped-query attention, several heads of the output projection's inputs are averages of the same rows of v_proj.
    """
    repeats = len(channels) // len(layer.get_submodule(fold.before).weight)
    return channels.view(-1, repeats, layer.self_attn.head_dim if repeats > 1 else 1)


def _apply(layer: Any, fold: Fold, statistics: Mapping[str, InputStatistics], scales: Tensor) -> None:
    """Multiply the weights' columns by `scales`: [K], and divide what produces the inputs."""
    before = layer.get_submodule(fold.before)
    rows = _by_row(layer, fold, scales)[:, 0].flatten()
    before.weight.data /= rows.view(-1, *[1] * (before.weight.dim() - 1))
    if getattr(before, "bias", None) is not None:
        before.bias.data /= rows
    for stats in {id(statistics[name]): statistics[name] for name in fold.linears}.values():
        stats.divide_inputs(scales)
    for name in fold.linears:
        layer.get_submodule(name).weight.data *= scales


def _search_clips(weight: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
    """The best largest magnitude of each group. weight: [N, K] -> [N, K / group_size]

    The error of a group counts alone, without its products with the errors of others.
    """
    groups = grid.split(weight)  # [N, G, g]
    blocks = hessian.view(groups.shape[1], grid.group_size, groups.shape[1], grid.group_size).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    largest = groups.abs().amax(-1)
    best, least = largest.clone(), torch.full_like(largest, torch.inf)
    for fraction in CLIPS:
        limit = largest * fraction
        change = grid.split(nearest_values(weight, grid, limit)) - groups
        error = torch.einsum("ngk,gkl,ngl->ng", change, blocks, change)
        better = error < least
        best, least = torch.where(better, limit, best), torch.where(better, error, least)
    return best
