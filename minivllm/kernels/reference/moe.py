"""Mixture of experts: choose each token's experts, and compute them (Shazeer et al. 2017; Fedus et al. 2022)."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minivllm.families import MoESpec
from minivllm.kernels.layout import ExpertWeights


def route(x: Tensor, weight: Tensor, bias: Tensor | None, correction: Tensor | None, spec: MoESpec) -> tuple[Tensor, Tensor]:
    """x: [T, H], weight: [E, H] and bias, correction: [E] in fp32 -> each token's experts: (ids [T, k] int32, weights [T, k] fp32)."""
    scores = F.linear(x.float(), weight, bias)
    if spec.scoring == "softmax":
        scores = scores.softmax(-1)
    elif spec.scoring == "sigmoid":
        scores = scores.sigmoid()
    choice = scores if correction is None else scores + correction
    if spec.groups > 1:
        choice = _in_best_groups(choice, spec)
    ids = choice.topk(spec.top_k, sorted=True).indices
    weights = scores.gather(1, ids)
    if spec.scoring == "top_softmax":
        weights = weights.softmax(-1)
    if spec.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids.int(), weights * spec.scale


def _in_best_groups(choice: Tensor, spec: MoESpec) -> Tensor:
    """Scores [T, E] with -inf outside of each token's best groups (DeepSeek-V2, section 2.2.2)."""
    grouped = choice.unflatten(1, (spec.groups, -1))
    best = grouped.amax(-1) if spec.group_score == "max" else grouped.topk(2).values.sum(-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(spec.top_groups).indices, True)
    return grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)


def fused_experts(x: Tensor, experts: ExpertWeights, ids: Tensor, weights: Tensor, residual: Tensor) -> Tensor:
    """residual + the sum over a token's k experts of weight * expert(x). residual: [T, H]; it may be overwritten.

    x: [T, H]; ids, weights: [T, k] of `route`. The sum has the order of `ids`, so it does not depend on other tokens.
    """
    outputs = x.new_empty(*ids.shape, x.shape[1])
    for e in ids.unique().tolist():
        token, place = (ids == e).nonzero(as_tuple=True)
        inner = F.linear(x[token], experts.gate_up[e], None if experts.gate_up_bias is None else experts.gate_up_bias[e])
        outputs[token, place] = F.linear(gated(inner, experts.clamp), experts.down[e],
                                         None if experts.down_bias is None else experts.down_bias[e])
    return residual.add_((outputs.float() * weights[..., None]).sum(1))


def gated(inner: Tensor, clamp: tuple[float, float] | None) -> Tensor:
    """The middle of an expert: inner = [gate | up]: [T, 2 I] -> [T, I]. clamp: (alpha, limit) of gpt-oss."""
    gate, up = inner.chunk(2, -1)
    if clamp is None:
        return F.silu(gate) * up
    alpha, limit = clamp
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * (alpha * gate).sigmoid() * (up + 1)
