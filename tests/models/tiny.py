"""Tiny random models of every family, made by Transformers: each is an oracle, and a checkpoint folder for our loader."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from minivllm.families import ModelSpec, parse_config
from minivllm.layers.build import BuildContext
from minivllm.models.decoder import Decoder
from minivllm.models.loader import load_model
from tests.models.paged import make_build

BASE = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 80,
        "max_position_embeddings": 64}
OPT = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 80, "max_position_embeddings": 64}


def make_hf(family: str, **config: Any) -> transformers.PreTrainedModel:
    """A random model of `family` ("Llama", "OPT", ...) with `config` over the base sizes. No parameter has its default value."""
    base = OPT if family == "OPT" else BASE
    cls = getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM"))
    torch.manual_seed(0)
    config_class = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config"))
    return randomized(cls(config_class(**{**base, **config})))


def randomized(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The model in float32, with random weights of which none has its default value."""
    model = model.eval().float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            # With norm weights of 1 and biases of 0, a test could not see that a weight is swapped, dropped or added twice.
            p.copy_(1 + 0.3 * torch.randn_like(p) if "norm" in name and name.endswith("weight") else 0.2 * torch.randn_like(p))
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.copy_(0.2 * torch.randn_like(buffer))
    return model


def read_spec(folder: Path) -> ModelSpec:
    return parse_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def load(folder: Path, spec: ModelSpec | None = None, build: BuildContext | None = None) -> Decoder:
    return load_model(spec or read_spec(folder), folder, "auto", build or make_build())


def hf_logits(model: transformers.PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """One sequence, no cache: [T, vocab]."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0]
