"""Mixture of experts: the reference against plain Python, and Triton's kernels against the reference."""
from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm.families import MoESpec
from minivllm.kernels import REFERENCE
from minivllm.kernels.layout import ExpertWeights
from minivllm.kernels.reference import moe as reference
from tests.models.paged import Paged, make_build
from tests.models.test_parity import MODELS
from tests.models.tiny import hf_logits, load, make_hf

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLAMP = (1.702, 0.5)


def spec(**fields: Any) -> MoESpec:
    return MoESpec(**{"num_experts": 8, "top_k": 3, "intermediate_size": 4, **fields})


def plain_route(scores: list[float], correction: list[float], s: MoESpec) -> dict[int, float]:
    """One token's experts and their weights, from the router's scores."""
    if s.scoring == "softmax":
        total = sum(math.exp(x) for x in scores)
        scores = [math.exp(x) / total for x in scores]
    elif s.scoring == "sigmoid":
        scores = [1 / (1 + math.exp(-x)) for x in scores]
    choice = [x + c for x, c in zip(scores, correction, strict=True)]
    size = len(scores) // s.groups
    groups = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(s.groups)]
    best = sorted(range(s.groups), key=lambda g: -(groups[g][0] if s.group_score == "max" else groups[g][0] + groups[g][1]))[: s.top_groups]
    ids = sorted((e for e in range(len(scores)) if e // size in best), key=lambda e: -choice[e])[: s.top_k]
    weights = {e: scores[e] for e in ids}
    if s.scoring == "top_softmax":
        weights = {e: math.exp(x) for e, x in weights.items()}
    if s.renormalize or s.scoring == "top_softmax":
        weights = {e: x / sum(weights.values()) for e, x in weights.items()}
    return {e: x * s.scale for e, x in weights.items()}


@pytest.mark.parametrize("s", [
    spec(), spec(renormalize=True), spec(scoring="top_softmax", router_bias=True), spec(top_k=1, renormalize=True, scale=2.5),
    spec(groups=4, top_groups=2, scale=3.0),
    spec(scoring="sigmoid", correction=True, groups=4, top_groups=2, group_score="top2", renormalize=True, scale=2.5),
])
def test_each_way_to_choose_experts_equals_plain_python(s: MoESpec) -> None:
    torch.manual_seed(0)
    x, weight, bias, correction = torch.randn(9, 16), torch.randn(8, 16), torch.randn(8), torch.randn(8)
    ids, weights = reference.route(x, weight, bias if s.router_bias else None, correction if s.correction else None, s)
    assert (ids.shape, ids.dtype, weights.dtype) == ((9, s.top_k), torch.int32, torch.float32)
    for t in range(9):
        scores = (weight @ x[t] + (bias if s.router_bias else 0)).tolist()
        want = plain_route(scores, correction.tolist() if s.correction else [0.0] * 8, s)
        assert dict(zip(ids[t].tolist(), weights[t].tolist(), strict=True)) == pytest.approx(want, rel=1e-4)


def case(tokens: int, num_experts: int, top: int, hidden: int, inner: int, *, bias: bool = False, dtype: torch.dtype = torch.float32,
         used: int | None = None) -> tuple[Tensor, ExpertWeights, Tensor, Tensor, Tensor]:
    """used: only the first experts are chosen, by all tokens alike if it is `top`."""
    torch.manual_seed(tokens + num_experts)
    draw = lambda *shape: torch.randn(shape, device=DEVICE).to(dtype)  # noqa: E731
    experts = ExpertWeights(draw(num_experts, 2 * inner, hidden) / hidden**0.5, draw(num_experts, hidden, inner) / inner**0.5,
                            draw(num_experts, 2 * inner) if bias else None, draw(num_experts, hidden) if bias else None,
                            CLAMP if bias else None)
    ids = torch.rand(tokens, used or num_experts, device=DEVICE).argsort(1)[:, :top].int().contiguous()
    return draw(tokens, hidden), experts, ids, torch.rand(tokens, top, device=DEVICE), draw(tokens, hidden)


@pytest.mark.parametrize("bias", [False, True])
def test_the_reference_is_the_weighted_sum_of_each_tokens_experts(bias: bool) -> None:
    x, w, ids, weights, residual = case(7, 5, 2, 16, 12, bias=bias)
    want = residual.clone()
    for t in range(7):
        for e, weight in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            inner = w.gate_up[e] @ x[t] + (0 if w.gate_up_bias is None else w.gate_up_bias[e])
            gate, up = inner[:12], inner[12:]
            if bias:
                gate, up = gate.clamp(max=CLAMP[1]), up.clamp(-CLAMP[1], CLAMP[1]) + 1
            middle = gate * torch.sigmoid((CLAMP[0] if bias else 1) * gate) * up
            want[t] += weight * (w.down[e] @ middle + (0 if w.down_bias is None else w.down_bias[e]))
    torch.testing.assert_close(reference.fused_experts(x, w, ids, weights, residual), want)


@pytest.mark.parametrize(("tokens", "num_experts", "top", "used", "bias"), [
    (1, 4, 2, None, False), (3, 8, 3, None, True), (34, 1, 1, None, False), (20, 5, 2, 2, True), (40, 2, 1, None, False),
])
def test_triton_computes_the_reference(tokens: int, num_experts: int, top: int, used: int | None, bias: bool) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from minivllm.kernels.triton import moe

    x, w, ids, weights, residual = case(tokens, num_experts, top, 40, 36, bias=bias, used=used)  # not multiples of the tiles
    want = reference.fused_experts(x, w, ids, weights, residual.clone())
    got = moe.fused_experts(x, w, ids, weights, residual.clone())
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    row = slice(tokens // 2, tokens // 2 + 1)  # a token alone has the same result
    torch.testing.assert_close(moe.fused_experts(x[row], w, ids[row], weights[row], residual[row].clone()), got[row], atol=1e-6, rtol=1e-6)


def test_triton_rounds_like_the_reference_in_16_bits() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from minivllm.kernels.triton import moe

    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter has no bfloat16 products
    x, w, ids, weights, residual = case(9, 3, 2, 40, 36, dtype=dtype)
    want = reference.fused_experts(x, w, ids, weights, residual.clone())
    torch.testing.assert_close(moe.fused_experts(x, w, ids, weights, residual.clone()), want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("tokens", "top", "num_experts"), [(1, 1, 1), (5, 2, 3), (400, 3, 4)])
def test_pairs_are_grouped_by_expert_in_their_order(tokens: int, top: int, num_experts: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from minivllm.kernels.triton.moe import group_pairs

    ids = torch.randint(num_experts, (tokens, top), dtype=torch.int32, device=DEVICE)
    order, starts = group_pairs(ids, num_experts)
    flat = ids.flatten().tolist()
    assert order.tolist() == sorted(range(len(flat)), key=lambda p: flat[p])
    assert starts.tolist() == [sum(e < expert for e in flat) for expert in range(num_experts + 1)]


def test_gpt_oss_with_tritons_experts_and_sinks_has_the_logits_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from minivllm.kernels.triton import attention, moe

    family, config = MODELS["gpt-oss"]
    hf = make_hf(family, **config)
    hf.save_pretrained(tmp_path)
    ops = replace(REFERENCE, fused_experts=moe.fused_experts, prepare_attention=attention.prepare_attention,
                  self_attention=attention.self_attention, store_kv=attention.store_kv)
    paged, tokens = Paged(load(tmp_path, build=make_build(device=DEVICE, ops=ops)), 11), [(11 * i) % 97 for i in range(11)]
    got = torch.cat([paged.run((0, tokens[:10])), paged.run((0, tokens[10:]))])
    torch.testing.assert_close(got, hf_logits(hf, tokens), atol=1e-4, rtol=0.0)
