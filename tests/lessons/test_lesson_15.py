"""Lesson 15: it routes like minivllm, and its experts compute what minivllm's and Transformers' compute."""
from __future__ import annotations

from types import ModuleType

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from minivllm.families import MoESpec
from minivllm.kernels.layout import ExpertWeights
from minivllm.kernels.reference import moe
from tests.lessons.loading import Mistake

PLACE = "outputs[places] = experts.compute(e, x[places // ids.shape[1]])"
MISTAKES = [
    Mistake(1, "return ids, weights / weights.sum(-1, keepdim=True)", "return ids, weights", "add up to"),
    Mistake(1, "return ids, weights / weights.sum(-1, keepdim=True)", "return weights / weights.sum(-1, keepdim=True), ids",
            "in this order"),
    Mistake(1, "F.linear(x, router).softmax(-1)", "F.linear(x, router)", "they are probabilities"),
    Mistake(1, "probabilities.topk(top_k, dim=-1)", "probabilities.topk(top_k, dim=-1, largest=False)", "SMALLEST"),
    Mistake(2, "ids.flatten().argsort(stable=True)", "torch.arange(ids.numel())", "must be next to each other"),
    Mistake(2, "ids.flatten().argsort(stable=True)", "ids.flatten().argsort(stable=True, descending=True)", "ascending order, 0 first"),
    Mistake(2, "F.pad(counts.cumsum(0), (1, 0))", "F.pad(counts.cumsum(0), (0, 1))", "gives the ENDS"),
    Mistake(2, "minlength=num_experts)\n    return order, F.pad", "minlength=0)\n    return order, F.pad", "An expert may have none"),
    Mistake(3, PLACE, "outputs[places] = experts.compute(e, x[places % len(x)])", "a // k"),
    Mistake(3, PLACE, "outputs[begins[e]:begins[e + 1]] = experts.compute(e, x[places // ids.shape[1]])", "belongs at place a"),
    Mistake(3, PLACE, "outputs[places] = experts.compute(e, x)[places // ids.shape[1]]", "an expert's own tokens"),
    Mistake(4, "    return grouped(x, experts, ids, weights)\n\n\ndef rows",
            "    return with_capacity(x, experts, ids, weights, 1.0)[0]\n\n\ndef rows", "must not mean another result"),
]


def test_lesson_and_package_route_and_compute_alike(lesson: ModuleType) -> None:
    x, router, experts = lesson.example(40)
    ids, weights = lesson.route(x, router, 3)
    spec = MoESpec(num_experts=len(experts), top_k=3, intermediate_size=lesson.INNER, renormalize=True)
    their_ids, their_weights = moe.route(x, router, None, None, spec)
    assert torch.equal(ids.int(), their_ids)
    torch.testing.assert_close(weights, their_weights)
    theirs = moe.fused_experts(x, ExpertWeights(experts.gate_up, experts.down), their_ids, their_weights, torch.zeros_like(x))
    torch.testing.assert_close(lesson.grouped(x, experts, ids, weights), theirs, atol=1e-4, rtol=1e-4)


def test_lesson_computes_the_block_of_mixtral(lesson: ModuleType) -> None:
    x, router, experts = lesson.example(20)
    config = MixtralConfig(hidden_size=lesson.HIDDEN, intermediate_size=lesson.INNER, num_local_experts=len(experts), num_experts_per_tok=2)
    block = MixtralSparseMoeBlock(config).eval()
    with torch.no_grad():
        block.gate.weight.copy_(router)
        block.experts.gate_up_proj.copy_(experts.gate_up)
        block.experts.down_proj.copy_(experts.down)
        theirs = block(x[None])
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    torch.testing.assert_close(lesson.grouped(x, experts, *lesson.route(x, router, 2)), theirs[0], atol=1e-4, rtol=1e-4)


def test_a_token_has_the_same_output_in_any_batch(lesson: ModuleType) -> None:
    x, router, experts = lesson.example(30)
    ids, weights = lesson.route(x, router, 2)
    whole = lesson.grouped(x, experts, ids, weights)
    for i in range(0, 30, 7):
        one = slice(i, i + 1)
        torch.testing.assert_close(whole[one], lesson.grouped(x[one], experts, ids[one], weights[one]), atol=1e-5, rtol=1e-5)


def test_the_answers_of_the_questions_are_correct(lesson: ModuleType) -> None:
    assert lesson.experts_read(2, 8, 2) < 4 < lesson.experts_read(3, 8, 2)
    assert lesson.experts_read(10, 128, 8) < 64 < lesson.experts_read(11, 128, 8)
