"""Random LoRA adapters in PEFT's format, written without PEFT."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERY = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def write_adapter(folder: Path, base: Path, *, rank: int = 4, modules: Sequence[str] = EVERY, seed: int = 1, size: float = 1.0,
                  **settings: Any) -> Path:
    """An adapter of a Llama in `base`, so strong that it changes greedy tokens. settings: further ones of adapter_config.json."""
    config = json.loads((base / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q), "gate_proj": (inner, hidden),
              "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    ranks: Mapping[str, int] = settings.get("rank_pattern", {})
    for layer in range(config["num_hidden_layers"]):
        for module in modules:
            outputs, inputs = shapes[module]
            r = ranks.get(module, rank)
            name = f"base_model.model.model.layers.{layer}.{'self_attn' if module in ATTENTION else 'mlp'}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(r, inputs, generator=generator) / inputs**0.5
            tensors[f"{name}.lora_B.weight"] = size * torch.randn(outputs, r, generator=generator) / r**0.5
    write_folder(folder, tensors, {"r": rank, "lora_alpha": rank, "target_modules": list(modules), **settings})
    return folder


def write_folder(folder: Path, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> None:
    """adapter_config.json and adapter_model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.0, "inference_mode": True, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
