"""Families that differ from Llama in a few fields: SmolLM3, Phi-3 and Phi-4, OLMo, StarCoder2, Granite, GLM-4, EXAONE 4."""
from __future__ import annotations

from collections.abc import Sequence

from minivllm.families import config_json
from minivllm.families.config_json import Config, Key, read
from minivllm.families.family import PerLayer
from minivllm.families.llama import LLAMA
from minivllm.families.spec import RopeSpec, model_error


def _smollm3_rotated(config: Config) -> list[int]:
    """`no_rope_layers` has 1 for each layer whose queries and keys are rotated. By default each fourth is not."""
    interval = read(config, Key("no_rope_layer_interval", int, 4))
    if interval < 1:
        raise model_error(f"config.json: no_rope_layer_interval must be at least 1, got {interval}")
    by_default = [int((i + 1) % interval != 0) for i in range(config_json.num_layers(config))]
    rotated: list[int] = read(config, Key("no_rope_layers", list, None)) or by_default
    if len(rotated) != len(by_default):
        raise model_error(f"config.json: no_rope_layers has {len(rotated)} values for {len(by_default)} layers")
    return rotated


def _smollm3_windows(config: Config) -> Sequence[int | None]:
    """Without `layer_types`, the layers that are not rotated have a window if `use_sliding_window` is on."""
    config = {"sliding_window": None, **config}
    if config.get("layer_types") is None and config_json.window_if_used(config) is not None:
        types = ["full_attention" if rotated else "sliding_attention" for rotated in _smollm3_rotated(config)]
        config = {**config, "layer_types": types}
    return config_json.windows_by_layer(config)


def _granite_eps(config: Config) -> float:
    """Granite adds `residual_multiplier` times each output. Dividing all hidden states by it gives the same model without the factor:
    norms cancel it, if their epsilon is divided by its square."""
    return float(read(config, Key("rms_norm_eps", float, 1e-6)) / read(config, Key("residual_multiplier", float, 1.0)) ** 2)


def _olmo3_ropes(config: Config) -> list[RopeSpec]:
    """Scaling applies to layers with full attention only. A `rope_theta` outside `rope_parameters` is Transformers 4's, for all layers
    (Transformers 5 has its default in those with a window)."""
    by_type = {kind: _olmo3_rope(config, kind)[0] for kind in ("full_attention", "sliding_attention")}
    return [by_type[kind] for kind in config_json.layer_types(config, 4, key=None)]


def _olmo3_rope(config: Config, kind: str) -> tuple[RopeSpec, int]:
    length = read(config, Key("max_position_embeddings", int, 2048))
    params = config_json.rope_by_type(config, kind, Key("rope_theta", float, 500000.0))
    return config_json.rope(params, length, head=config_json.head_dim(config))


def _exaone4_types(config: Config) -> list[str]:
    """The pattern may be a text such as LLLG. Without a window, all layers have full attention."""
    pattern = config.get("sliding_window_pattern")
    if isinstance(pattern, str) and pattern:
        config = {**config, "sliding_window_pattern": len(pattern)}
    if config_json.one_window(4096)(config) is None:
        return ["full_attention"] * config_json.num_layers(config)
    return config_json.layer_types(config, 4)


def _exaone4_windows(config: Config) -> list[int | None]:
    window = config_json.one_window(4096)(config)
    return [window if kind == "sliding_attention" else None for kind in _exaone4_types(config)]


def _exaone4_rotated(config: Config) -> list[bool]:
    """If some layers have a window, only these rotate."""
    return [window is not None or config_json.one_window(4096)(config) is None for window in _exaone4_windows(config)]


SMOLLM3 = LLAMA.variant(
    model={"max_model_len": Key("max_position_embeddings", int, 32768), "tied": Key("tie_word_embeddings", bool, True)},
    attention={"num_kv_heads": config_json.kv_heads(4), "window": PerLayer(_smollm3_windows)},
    rope={"theta": 2000000.0},
    rotated=PerLayer(_smollm3_rotated),
)
PHI3 = LLAMA.variant(
    model={"max_model_len": Key("max_position_embeddings", int, 4096), "norm_eps": Key("rms_norm_eps", float, 1e-5)},
    attention={"window": config_json.one_window(None), "qkv_bias": False, "out_bias": False},
    mlp={"bias": False},
    rope={"partial": 1.0, "original": 4096},
    names={"qkv": ("layers.{i}.self_attn.qkv_proj",), "gate_up": ("layers.{i}.mlp.gate_up_proj",)},
)
OLMO = LLAMA.variant(
    model={"norm": "layer", "norm_affine": False, "norm_eps": 1e-5},
    mlp={"bias": False},
    fixed=(Key("clip_qkv", float, None),),
)
STARCODER2 = LLAMA.variant(
    model={
        "max_model_len": Key("max_position_embeddings", int, 4096),
        "tied": Key("tie_word_embeddings", bool, True),
        "norm": "layer",
        "norm_eps": Key("norm_epsilon", float, 1e-5),
    },
    attention={
        "num_kv_heads": config_json.kv_heads(2),
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
OLMO2 = LLAMA.variant(
    model={"norm_eps": Key("rms_norm_eps", float, 1e-5)},
    attention={"qk_norm": "width"},
    mlp={"bias": False},
    block="output",
    names={"attn_out_norm": ("layers.{i}.post_attention_layernorm",), "mlp_out_norm": ("layers.{i}.post_feedforward_layernorm",)},
)
OLMO3 = OLMO2.variant(
    model={"max_model_len": lambda config: _olmo3_rope(config, "full_attention")[1]},
    attention={"window": PerLayer(config_json.windows_by_type(4, key=None)), "rope": PerLayer(_olmo3_ropes)},
)
EXAONE4 = OLMO2.variant(
    attention={
        "num_kv_heads": config_json.kv_heads(32), "qk_norm": "head", "qkv_bias": False, "out_bias": False,
        "window": PerLayer(_exaone4_windows),
    },
    rotated=PerLayer(_exaone4_rotated),
)
GRANITE = LLAMA.variant(
    model={
        "norm_eps": _granite_eps,
        "embed_scale": lambda config: (read(config, Key("embedding_multiplier", float, 1.0))
                                       / read(config, Key("residual_multiplier", float, 1.0))),
        "logit_scale": lambda config: 1 / read(config, Key("logits_scaling", float, 1.0)),
    },
    attention={"multiplier": Key("attention_multiplier", float, 1.0)},
)
GLM = LLAMA.variant(
    model={"max_model_len": Key("max_position_embeddings", int, 131072), "norm_eps": Key("rms_norm_eps", float, 1.5625e-07)},
    attention={
        "num_kv_heads": config_json.kv_heads(2),
        "head_dim": Key("head_dim", int, 128),
        "qkv_bias": Key("attention_bias", bool, True),
        "out_bias": False,
    },
    mlp={"bias": False},
    rope={"partial": 0.5, "interleaved": True},
    names={"gate_up": ("layers.{i}.mlp.gate_up_proj",)},
)
GLM4 = GLM.variant(
    block="sandwich",
    names={"attn_out_norm": ("layers.{i}.post_self_attn_layernorm",), "mlp_out_norm": ("layers.{i}.post_mlp_layernorm",)},
)
