"""The self-check of a GPU's figures, run on a CPU: correct kernels pass, each kind of wrong kernel fails."""
from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench import models
from bench.kernel_check import Trial, apart, check, tolerances, twin_with
from bench.unpacked import quantizes_input, reference_ops, unpack
from minivllm import LLM, SamplingParams
from minivllm.benchmarks.workloads import WorkloadRequest, check_requests
from minivllm.families import parse_config
from minivllm.kernels import REFERENCE, Ops
from minivllm.kernels.grouped import dequantize
from minivllm.kernels.reference import grouped as reference
from minivllm.layers.build import BuildContext
from minivllm.models import loader
from minivllm.planning.what_if import quantization_config
from minivllm.quantization.methods import METHODS, ONLINE, method_of
from minivllm.worker.kv_cache import KVLayout
from tests.kernels.test_grouped import KINDS, random_weight

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

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
    assert distance > tolerances(model)[0] == pytest.approx(0.106, abs=1e-3)


def test_tokens_that_are_not_greedy_are_refused(llm: LLM) -> None:
    right = greedy(llm)

    def one_wrong(requests: list[WorkloadRequest]) -> list[list[int]]:
        outputs = right(requests)
        outputs[2][7] = (outputs[2][7] + 1) % 12000
        return outputs

    result = check(runner(llm).model, runner(llm).kv.layout, one_wrong)
    assert result["tokens_short_of_best"] > result["token_tolerance"] == 0.532 and "greedy token" in result["refused"]
    assert sum(r.output_len for r in check_requests()) == 64


def test_the_distance_to_nan_is_infinite() -> None:
    want = torch.randn(2, 50)
    assert apart(want, want) == 0.0 and apart(want.index_fill(1, torch.tensor([3]), math.nan), want) == math.inf


# --- packed weights ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def triton_ops() -> Ops:
    fast = pytest.importorskip("minivllm.kernels.triton")
    return dataclasses.replace(REFERENCE, pack_groups=fast.packed_weight.pack_groups, grouped_linear=fast.grouped.grouped_linear,
                               grouped_rows=fast.grouped.grouped_rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [256, 1280])
def test_unpacking_inverts_packing(triton_ops: Ops, kind: str, k: int) -> None:
    weight = random_weight(kind, k=k)
    packed = triton_ops.pack_groups(weight)
    assert not isinstance(packed, reference.PackedGroups)
    again = unpack(packed)
    assert torch.equal(again.codes.float(), weight.codes.float()) and torch.equal(dequantize(again), dequantize(weight))


def test_unpacking_inverts_packing_of_padded_inputs_and_divided_groups(triton_ops: Ops) -> None:
    from tests.kernels.test_triton_grouped import UNUSUAL, weight_of

    for bits, group, k, zeros in UNUSUAL:
        weight = weight_of(bits, group, k, zeros=zeros)
        packed = triton_ops.pack_groups(weight)
        if not isinstance(packed, reference.PackedGroups):
            assert torch.equal(dequantize(unpack(packed)), dequantize(weight)), (bits, group, k)


SHAPE = {**models.config_of("tiny"), "num_hidden_layers": 1, "vocab_size": 64}
FEW_STEPS = (((0, 70), (1, 9)), ((0, 1), (1, 1)))


@pytest.mark.parametrize(("stored", "tolerance"), [("awq", 0.426), ("Q8_0", 0.106), ("fp8", 0.7)])
def test_a_model_with_packed_weights_has_a_twin(
    triton_ops: Ops, stored: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "DUMMY_STD", 0.1)
    spec = parse_config(SHAPE)
    config = {"quantization_config": dict(quantization_config(stored, spec, METHODS))} if stored not in ONLINE else {}
    # float16, because the interpreter multiplies no bfloat16 matrices.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    build = BuildContext(device, torch.float16, triton_ops, method_of(config, wanted=stored if stored in ONLINE else None))
    model = loader.load_model(spec, None, "dummy", build)  # type: ignore[arg-type]
    if isinstance(model.embedding.table, torch.Tensor):
        model.embedding.table *= 0.1  # so that the one narrow layer decides the logits
    layout = KVLayout.of(spec, 16, torch.float16)
    twin = twin_with(model, reference_ops())
    assert twin.layers[0].mlp.down._matmul is not model.layers[0].mlp.down._matmul
    got, want = (Trial(each, layout, FEW_STEPS, forks={}).run() for each in (model, twin))
    assert max(apart(*pair) for pair in zip(got, want, strict=True)) < 0.02
    assert tolerances(model)[0] == pytest.approx(tolerance, abs=1e-3)
    correct = reference_ops()
    wrong = dataclasses.replace(correct, grouped_linear=lambda x, *args, **options: correct.grouped_linear(-x, *args, **options))
    distance = max(apart(*pair) for pair in zip(Trial(twin_with(twin, wrong), layout, FEW_STEPS, forks={}).run(), want, strict=True))
    assert distance > tolerance


def test_inputs_of_fp8_products_are_quantized_where_the_kernels_do_it(triton_ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    from minivllm.kernels.triton import grouped

    monkeypatch.setattr(grouped, "_multiplies_fp8", lambda x, form: True)
    weight = dataclasses.replace(random_weight("fp8 per output"), quantize_input=True)
    packed, dense = triton_ops.pack_groups(weight), dequantize(weight)
    x, norm = torch.randn(70, 256) * 3, (torch.rand(256) + 0.5, 1e-5)
    assert quantizes_input(x, packed) and not quantizes_input(x[:8], packed)
    codes, scales = reference.quantize_rows(REFERENCE.rms_norm(x, *norm))
    want = codes.float() * scales @ dense.t()
    torch.testing.assert_close(reference_ops().grouped_linear(x, packed, norm=norm), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(reference_ops().grouped_linear(x[:8], packed), x[:8] @ dense.t(), atol=1e-4, rtol=1e-4)
