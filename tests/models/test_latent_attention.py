"""Latent attention in the engine: the cached vectors, and what is refused."""
from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minivllm import LLM, LoRARequest, SamplingParams
from minivllm.errors import InvalidInput, ModelError
from minivllm.families import kv_groups
from minivllm.parallel.shard import shard_spec
from minivllm.quantization.kv_cache import LatentKV
from minivllm.worker.kv_cache import KVLayout
from tests.engine.oracle import Oracle
from tests.lora.adapters import write_folder
from tests.models.test_parity import MODELS
from tests.models.tiny import make_hf, read_spec
from tests.quantization import checkpoints, test_fp8

PROMPTS = [[random.Random(n).randrange(97) for _ in range(n)] for n in (1, 5, 16, 23, 40)]
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("latent")
    family, config = MODELS["deepseek-v3, yarn"]
    make_hf(family, **config).save_pretrained(path)
    return path


def engine(folder: Path, **config: Any) -> LLM:
    return LLM(str(folder), **{"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 64, "num_gpu_blocks_override": 100,
                               "device": "cpu", **config})


def test_a_token_takes_one_vector_per_layer_that_is_key_and_value(folder: Path) -> None:
    spec = read_spec(folder)
    layout = KVLayout.of(spec, 16, torch.float32)
    assert [group.layers for group in kv_groups(spec)] == [(0, 1, 2)] and layout.specs == (LatentKV(16 + 8, torch.float32),)
    assert (layout.token_bytes, layout.block_bytes) == (24 * 4, 3 * 16 * 24 * 4)
    layer = layout.views(layout.allocate(5, torch.device("cpu")))[1]
    assert layer.k.shape == layer.v.shape == (5, 16, 1, 24) and layer.k.data_ptr() == layer.v.data_ptr()


def test_tokens_are_those_of_transformers_with_chunks_preemption_and_offload(folder: Path) -> None:
    oracle = Oracle(folder)
    with engine(folder) as llm:
        together = [tuple(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]  # type: ignore[arg-type]
    for prompt, tokens in zip(PROMPTS, together, strict=True):
        oracle.check_greedy(prompt, tokens)
    with engine(folder, max_num_batched_tokens=16, num_gpu_blocks_override=20, block_size=4, kv_offloading_size=0.001) as llm:
        outputs = llm.generate(PROMPTS[::-1], GREEDY, use_tqdm=False)  # type: ignore[arg-type]
        assert [tuple(output.outputs[0].token_ids) for output in outputs][::-1] == together


def test_fp8_checkpoints_of_deepseek_are_read_in_blocks(tmp_path: Path) -> None:
    family, config = MODELS["deepseek-v3, yarn"]
    quantize = test_fp8.quantizer((32, 32), "weight_scale_inv", dense=("head",))
    checkpoints.check(tmp_path, checkpoints.write(tmp_path, test_fp8.BLOCKS, quantize, family, **config))


def test_layers_that_predict_further_tokens_are_not_used(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors | {"model.layers.3.eh_proj.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with engine(tmp_path):
        assert "the layers that predict further tokens (num_nextn_predict_layers) are not used" in capsys.readouterr().err
    save_file(tensors | {"model.layers.4.eh_proj.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"unexpected: model.layers.4.eh_proj.weight"):
        engine(tmp_path)


def test_what_latent_attention_does_not_have_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="not supported for latent attention"):
        engine(folder, kv_cache_dtype="int8")
    with pytest.raises(InvalidInput, match="its attention is latent"):
        shard_spec(read_spec(folder), 2)
    name = "base_model.model.model.layers.0.self_attn.kv_b_proj"
    write_folder(tmp_path, {f"{name}.lora_A.weight": torch.zeros(4, 16), f"{name}.lora_B.weight": torch.zeros(88, 4)},
                 {"r": 4, "lora_alpha": 4, "target_modules": ["kv_b_proj"]})
    with engine(folder, enable_lora=True) as llm, pytest.raises(InvalidInput, match=r"kv_b_proj.*no such linear layer"):
        llm.generate(PROMPTS[:1], GREEDY, lora_request=LoRARequest("a", 1, str(tmp_path)), use_tqdm=False)  # type: ignore[arg-type]
