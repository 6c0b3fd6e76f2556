"""The self-check of a GPU's figures, run on a CPU: correct kernels pass, each kind of wrong kernel fails."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench import models
from bench.kernel_check import TOKEN_TOLERANCE, TOLERANCE, Trial, apart, check, twin_with
from minivllm import LLM, SamplingParams
from minivllm.benchmarks.workloads import WorkloadRequest, check_requests
from minivllm.kernels import REFERENCE, Ops
from minivllm.models import loader

Greedy = Callable[[list[WorkloadRequest]], list[list[int]]]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("tiny")
    models.write_config("tiny", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "DUMMY_STD", 0.2)  # with smaller weights, the attention of such a narrow model is uniform
        llm = LLM(model=str(folder), load_format="dummy", device="cpu", dtype="float32", skip_tokenizer_init=True,
                  num_gpu_blocks_override=64)
    with llm:
        yield llm


def greedy(llm: LLM) -> Greedy:
    def generate(requests: list[WorkloadRequest]) -> list[list[int]]:
        prompts = [{"prompt_token_ids": list(r.prompt_token_ids)} for r in requests]
        params = [SamplingParams(temperature=0, max_tokens=r.output_len, ignore_eos=True, detokenize=False) for r in requests]
        return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, params, use_tqdm=False)]
    return generate


def runner(llm: LLM) -> Any:
    return llm.llm_engine.core.executor.runner  # type: ignore[attr-defined]


def test_correct_kernels_pass_with_the_engines_own_tokens(llm: LLM) -> None:
    result = check(runner(llm).model, runner(llm).kv.layout, greedy(llm))
    assert "refused" not in result and result["logits_apart"] < 1e-3 and result["tokens_short_of_best"] < 1e-3


def test_a_twin_model_shares_the_weights_and_uses_only_the_other_kernels(llm: LLM) -> None:
    model = runner(llm).model
    other = Ops(**{f.name: (lambda *args, name=f.name, **options: pytest.fail(name)) for f in dataclasses.fields(Ops)})
    twin = twin_with(model, other)
    assert twin.layers[1].mlp.down._matmul.weight is model.layers[1].mlp.down._matmul.weight
    held = [twin.build.ops, twin.ropes[0]._angles, twin.head._matmul._fused_linear, twin.head._norm._norm,
            twin.layers[0].attention._self_attention, twin.layers[1].attention.qkv._matmul._fused_linear, twin.layers[0].mlp.up._norm._norm,
            twin.layers[0].mlp.up._activation]
    assert held == [other, other.rope_angles, other.fused_linear, other.rms_norm, other.self_attention, other.fused_linear, other.rms_norm,
                    other.silu_and_mul]
    assert model.head._matmul._fused_linear is model.build.ops.fused_linear is not other.fused_linear  # the model itself is unchanged


WRONG: dict[str, Callable[[Ops], Ops]] = {
    "the rotation turns backwards": lambda ops: dataclasses.replace(
        ops, rope_angles=lambda *args: (lambda cos, sin: (cos, -sin))(*REFERENCE.rope_angles(*args))),
    "a gated product without its norm": lambda ops: dataclasses.replace(
        ops, fused_linear=lambda *args, **o: REFERENCE.fused_linear(*args, **(o | ({"norm": None} if o.get("gated") else {})))),
    "the last layer forgets a prompt's keys": lambda ops: dataclasses.replace(ops, store_kv=lambda *args, **o: None),
    "heads in another order": lambda ops: dataclasses.replace(
        ops, self_attention=lambda *args, **o: REFERENCE.self_attention(*args, **o).roll(16, -1)),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_kernel_is_refused(llm: LLM, kind: str) -> None:
    model = twin_with(runner(llm).model, REFERENCE)
    wrong = twin_with(model, WRONG[kind](REFERENCE))
    logits = [Trial(each, runner(llm).kv.layout).run() for each in (wrong, model)]
    distance = max(apart(*pair) for pair in zip(*logits, strict=True))
    assert distance > TOLERANCE


def test_tokens_that_are_not_greedy_are_refused(llm: LLM) -> None:
    right = greedy(llm)

    def one_wrong(requests: list[WorkloadRequest]) -> list[list[int]]:
        outputs = right(requests)
        outputs[2][7] = (outputs[2][7] + 1) % 12000
        return outputs

    result = check(runner(llm).model, runner(llm).kv.layout, one_wrong)
    assert result["tokens_short_of_best"] > TOKEN_TOLERANCE and "greedy token" in result["refused"]
    assert sum(r.output_len for r in check_requests()) == 64


def test_the_distance_to_nan_is_infinite() -> None:
    want = torch.randn(2, 50)
    assert apart(want, want) == 0.0 and apart(want.index_fill(1, torch.tensor([3]), math.nan), want) == math.inf
