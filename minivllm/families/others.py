"""Families that differ from Llama in a few fields: SmolLM3, Phi-3 and Phi-4, OLMo, StarCoder2."""
from __future__ import annotations

from minivllm.families import config_json
from minivllm.families.config_json import Config, Key, read
from minivllm.families.family import PerLayer
from minivllm.families.llama import LLAMA
from minivllm.families.spec import RopeSpec, model_error


def _smollm3_rope(config: Config) -> tuple[RopeSpec, int]:
    return config_json.rope({"rope_theta": 2000000.0, **config}, read(config, Key("max_position_embeddings", int, 32768)))


def _every_fourth_without(config: Config) -> tuple[RopeSpec | None, ...]:
    """`no_rope_layers` has 1 for each layer whose queries and keys are rotated. By default each fourth is not."""
    layers, rope = config_json.num_layers(config), _smollm3_rope(config)[0]
    interval = read(config, Key("no_rope_layer_interval", int, 4))
    if interval < 1:
        raise model_error(f"config.json: no_rope_layer_interval must be at least 1, got {interval}")
    rotated = read(config, Key("no_rope_layers", list, None)) or [int((i + 1) % interval != 0) for i in range(layers)]
    return tuple(rope if each else None for each in rotated)


SMOLLM3 = LLAMA.variant(
    model={"max_model_len": lambda config: _smollm3_rope(config)[1], "tied": Key("tie_word_embeddings", bool, True)},
    attention={"window": config_json.only(None, Key("use_sliding_window", bool, False)), "rope": PerLayer(_every_fourth_without)},
)
PHI3 = LLAMA.variant(
    model={"max_model_len": Key("max_position_embeddings", int, 4096), "norm_eps": Key("rms_norm_eps", float, 1e-5)},
    attention={"window": config_json.one_window(None), "qkv_bias": False, "out_bias": False},
    mlp={"bias": False},
    names={"qkv": ("layers.{i}.self_attn.qkv_proj",), "gate_up": ("layers.{i}.mlp.gate_up_proj",)},
)
OLMO = LLAMA.variant(
    model={"norm": "layer", "norm_affine": False, "norm_eps": 1e-5},
    attention={"window": config_json.only(None, Key("clip_qkv", float, None))},
    mlp={"bias": False},
)
STARCODER2 = LLAMA.variant(
    model={
        "max_model_len": Key("max_position_embeddings", int, 4096),
        "tied": Key("tie_word_embeddings", bool, True),
        "norm": "layer",
        "norm_eps": Key("norm_epsilon", float, 1e-5),
    },
    attention={
        "num_kv_heads": Key("num_key_value_heads", int, 2),
        "window": config_json.one_window(None),
        "qkv_bias": Key("use_bias", bool, True),
        "out_bias": Key("use_bias", bool, True),
    },
    mlp={
        "gated": False,
        "activation": config_json.activation(Key("hidden_act", str, "gelu_pytorch_tanh")),
        "bias": Key("use_bias", bool, True),
    },
    names={"up": ("layers.{i}.mlp.c_fc",), "down": ("layers.{i}.mlp.c_proj",)},
)
