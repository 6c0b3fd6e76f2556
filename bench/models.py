"""Model folders for benchmarks without a download: real shapes and random weights, in one file for all engines."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 1536, "vocab_size": 49152,
        "max_position_embeddings": 8192, "rope_theta": 100000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936,
        "max_position_embeddings": 40960, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    },
    "mistral-7b": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336, "vocab_size": 32768,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "sliding_window": None,
    },
    "tiny": {  # for tests of the benchmark itself
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128, "vocab_size": 12000,
        "max_position_embeddings": 4096, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    },
}
SHAPES["bytes"] = {**SHAPES["tiny"], "vocab_size": 320}  # enough for a tokenizer of single bytes, for work with text
COMMON = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 0}


def config_of(shape: str) -> dict[str, Any]:
    """config.json of a named shape."""
    return {**COMMON, **SHAPES[shape]}


def write_config(shape: str, folder: Path) -> None:
    """config.json alone: enough for an engine that makes its own random weights (`load_format="dummy"`)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(shape), indent=1))


def write_random_model(shape: str, folder: Path, seed: int = 0) -> None:
    """config.json and model.safetensors (bfloat16) with random weights of a named shape. Imports torch and transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    write_config(shape, folder)
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norm weights are 1. The rest is as large as in trained models, so that the best logit is clearly the best.
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, 0.04)
            assert parameter.device.type == "cpu", name
    model.tie_weights()
    model.save_pretrained(folder)
