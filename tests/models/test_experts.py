"""Models with a mixture of experts: every storage of experts loads, and no request changes the tokens of another."""
from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minivllm import LLM, LoRARequest, SamplingParams
from minivllm.errors import ModelError, NotSupportedYet
from tests.engine.oracle import Oracle
from tests.lora.adapters import write_folder
from tests.models.paged import Paged
from tests.models.test_parity import MODELS, close
from tests.models.tiny import hf_logits, load, make_hf
from tests.quantization import checkpoints, test_awq, test_fp8, test_gptq

EXPERTS = ("mixtral", "qwen2-moe", "qwen3-moe, a dense layer", "olmoe")
PROMPTS = [[random.Random(n).randrange(97) for _ in range(n)] for n in (1, 5, 16, 23, 40)]
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


@pytest.mark.parametrize("name", EXPERTS)
def test_one_tensor_for_all_experts_loads_as_well_as_one_per_matrix(name: str, tmp_path: Path) -> None:
    family, config = MODELS[name]
    hf = make_hf(family, **config)
    hf.save_pretrained(tmp_path, save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(tmp_path / "model.safetensors"))
    tokens = list(range(20, 40))
    close(Paged(load(tmp_path), 20).run((0, tokens)), hf_logits(hf, tokens))


def test_a_missing_expert_and_one_too_many_are_named(tmp_path: Path) -> None:
    family, config = MODELS["qwen2-moe"]
    make_hf(family, **config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.experts.6.up_proj.weight"] = tensors.pop("model.layers.1.mlp.experts.4.up_proj.weight")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError) as error:
        load(tmp_path)
    assert "missing: model.layers.1.mlp.experts.4.up_proj.weight [24, 48]" in str(error.value)
    assert "unexpected: model.layers.1.mlp.experts.6.up_proj.weight [24, 48]" in str(error.value)


@pytest.mark.parametrize(("config", "quantize"), [
    (test_awq.CONFIG, test_awq.quantizer(32, "shared_expert_gate")),
    (test_gptq.CONFIG | {"desc_act": True, "dynamic": {"-:.*shared_expert": {}}},
     lambda name, weight: None if "shared" in name else test_gptq.quantizer(desc_act=True)(name, weight)),
    (test_fp8.BLOCKS, test_fp8.quantizer((32, 32), "weight_scale_inv", dense=("head", "shared_expert_gate"))),
])
def test_quantized_experts_are_dequantized_and_a_line_says_so(
    config: Any, quantize: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
    checkpoints.check(tmp_path, checkpoints.write(tmp_path, config, quantize, "Qwen2Moe", **sizes))
    assert "are dequantized to float32 while loading: no kernel multiplies packed ones" in capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts")
    family, config = MODELS["qwen2-moe"]
    make_hf(family, **{**config, "hidden_size": 64}).save_pretrained(path)
    return path


def engine(folder: Path, **config: Any) -> LLM:
    return LLM(str(folder), **{"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 64, "num_gpu_blocks_override": 100,
                               "device": "cpu", **config})


def test_tokens_are_those_of_transformers_and_do_not_depend_on_the_batch(folder: Path) -> None:
    with engine(folder) as llm:
        together = [tuple(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]  # type: ignore[arg-type]
    oracle = Oracle(folder)
    for prompt, tokens in zip(PROMPTS, together, strict=True):
        oracle.check_greedy(prompt, tokens)
    with engine(folder, max_num_batched_tokens=16, max_num_seqs=2, enable_prefix_caching=False) as llm:  # chunks, at most two at a time
        outputs = llm.generate(PROMPTS[::-1], GREEDY, use_tqdm=False)  # type: ignore[arg-type]
        assert [tuple(output.outputs[0].token_ids) for output in outputs][::-1] == together


def test_online_quantization_leaves_the_experts_as_they_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with engine(folder, quantization="int8") as llm:
        llm.generate(PROMPTS[:1], GREEDY, use_tqdm=False)  # type: ignore[arg-type]
    assert "the experts' weights are kept in float32: no kernel multiplies packed ones" in capsys.readouterr().err


def test_an_adapter_of_an_expert_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.mlp.experts.1.up_proj"
    tensors = {f"{name}.lora_A.weight": torch.zeros(4, 64), f"{name}.lora_B.weight": torch.zeros(24, 4)}
    write_folder(tmp_path, tensors, {"r": 4, "lora_alpha": 4, "target_modules": ["up_proj"]})
    with engine(folder, enable_lora=True) as llm, pytest.raises(NotSupportedYet, match=r"experts.1.up_proj.*an expert of a mixture"):
        llm.generate(PROMPTS[:1], GREEDY, lora_request=LoRARequest("a", 1, str(tmp_path)), use_tqdm=False)  # type: ignore[arg-type]
