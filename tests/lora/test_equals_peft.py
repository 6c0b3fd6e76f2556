"""Logits of batches that mix the base model and several adapters, against PEFT."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from minivllm import LLM, LoRARequest, SamplingParams
from minivllm.lora.peft_config import APPLIED, INERT, REFUSED, AdaptedModules
from tests.lora.adapters import ATTENTION, EVERY, write_adapter
from tests.models.tiny import make_hf

PROMPT = [11, 12, 13, 14, 15, 16, 17, 18, 19]
# (rank, modules, further settings): 8 adapters of different ranks and modules
VARIANTS = (
    (1, EVERY, {}), (2, ("q_proj",), {}), (3, ("k_proj", "up_proj"), {"lora_alpha": 7}),
    (4, ATTENTION, {"use_rslora": True, "target_modules": r".*\.self_attn\.[qkvo]_proj"}),
    (8, ("gate_proj", "down_proj"), {}),
    (5, EVERY, {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"v_proj": 9, "layers.1.*up_proj": 3, "model.layers.0.mlp.down_proj": 11}}),
    (16, ("v_proj", "o_proj"), {"lora_alpha": 4}), (12, EVERY, {"target_modules": "all-linear"}),
)


def write_all(folder: Path, base: Path, size: float) -> list[Path]:
    return [write_adapter(folder / str(i), base, rank=rank, modules=modules, seed=i, size=size, **settings)
            for i, (rank, modules, settings) in enumerate(VARIANTS)]


def check(base: Path, adapters: list[Path], prompts: list[list[int]]) -> None:
    """Prompt log-probabilities of one batch with the base model and every adapter are PEFT's, each alone."""
    peft = pytest.importorskip("peft", reason="PEFT is an extra for tests")
    hf = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    wanted = []
    with torch.no_grad():
        wanted.append(hf(torch.tensor([prompts[0]])).logits[0].log_softmax(-1))
        model = None
        for i, folder in enumerate(adapters):
            name = f"a{i}"
            if model is None:
                model = peft.PeftModel.from_pretrained(hf, folder, adapter_name=name)
            else:
                model.load_adapter(folder, adapter_name=name)
            model.set_adapter(name)
            wanted.append(model(torch.tensor([prompts[i + 1]])).logits[0].log_softmax(-1))
    with LLM(str(base), dtype="float32", skip_tokenizer_init=True, enable_lora=True, max_loras=8, max_lora_rank=16,
             max_model_len=64, num_gpu_blocks_override=256) as llm:
        requests = [None, *(LoRARequest(f"a{i}", i + 1, str(folder)) for i, folder in enumerate(adapters))]
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=4)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False, lora_request=requests)
    for output, logprobs, prompt, request in zip(outputs, wanted, prompts, requests, strict=True):
        assert output.lora_request is request
        assert output.prompt_logprobs is not None
        for position, entry in enumerate(output.prompt_logprobs[1:]):
            assert entry is not None
            assert prompt[position + 1] in entry
            for token, found in entry.items():
                assert abs(found.logprob - logprobs[position, token].item()) < 1e-4, (request, position)
        assert output.outputs[0].token_ids == [int(logprobs[-1].argmax())]


@pytest.mark.parametrize(("family", "settings", "modules"), [
    ("GPTNeoX", {}, ["query_key_value", "dense", "dense_h_to_4h"]), ("Glm", {"num_key_value_heads": 2}, ["q_proj", "k_proj", "v_proj"]),
    ("Gemma2", {"num_key_value_heads": 2, "head_dim": 16}, ["q_proj", "gate_proj", "up_proj", "down_proj"]),
])
def test_adapters_of_layers_with_reordered_rows_or_another_gate_equal_peft(
    family: str, settings: dict[str, Any], modules: list[str], tmp_path: Path,
) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is an extra for tests")
    hf = make_hf(family, **{"hidden_size": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, **settings})
    hf.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(hf, peft.LoraConfig(r=4, lora_alpha=4, target_modules=modules, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    check(tmp_path / "base", [tmp_path / "adapter"], [PROMPT, PROMPT[2:]])


NAMES = [f"model.layers.{layer}.{module}" for layer in (0, 1, 11) for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")]


@pytest.mark.parametrize("settings", [
    {"target_modules": ["q_proj", "mlp.up_proj"]}, {"target_modules": ["proj"]}, {"target_modules": r".*\.1\.mlp\..*|.*q_proj"},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj", "model.layers.0.self_attn.q_proj"]},
    {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.1.*"}, {"target_modules": ["up_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [1, 11], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "blocks"]}, {"target_modules": "proj"},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
])
def test_the_modules_of_an_adapter_are_those_of_peft(settings: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is an extra for tests")
    from peft.tuners.tuners_utils import check_target_module_exists

    ours, theirs = AdaptedModules.of(settings, Path("adapter_config.json")), peft.LoraConfig(**settings)
    assert [name in ours for name in NAMES] == [bool(check_target_module_exists(theirs, name)) for name in NAMES]


def test_every_setting_of_peft_is_applied_or_refused_or_changes_nothing() -> None:
    """A field that a later PEFT adds is refused by name when it is set, until it is in one of these lists."""
    peft = pytest.importorskip("peft", reason="PEFT is an extra for tests")
    assert {f.name for f in fields(peft.LoraConfig)} <= APPLIED | INERT | REFUSED.keys()
    assert not APPLIED & INERT and not (APPLIED | INERT) & REFUSED.keys()


def test_a_mixed_batch_of_a_tiny_model_equals_peft(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_llama()
    prompts = [[t + i for t in PROMPT[i % 3 :]] for i in range(len(VARIANTS) + 1)]
    check(base, write_all(tmp_path, base, 0.3), prompts)


def test_a_mixed_batch_of_the_default_model_equals_peft(default_float32: Path, tmp_path: Path) -> None:
    prompts = [[1, 4093 + i, 198, 1780 + i, 314, 260, 3575] for i in range(len(VARIANTS) + 1)]
    check(default_float32, write_all(tmp_path, default_float32, 0.01), prompts)
