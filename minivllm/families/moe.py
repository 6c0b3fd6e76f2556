"""Mixture-of-experts models: Mixtral, Qwen's, OLMoE and gpt-oss. Some or all layers have experts instead of one MLP."""
from __future__ import annotations

from collections.abc import Callable, Sequence

from minivllm.families import config_json
from minivllm.families.config_json import Config, Key, read
from minivllm.families.family import PerLayer
from minivllm.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from minivllm.families.spec import MLPSpec, model_error


def _num_experts(config: Config) -> int:
    """Transformers 5 writes num_local_experts where Transformers 4 wrote num_experts."""
    return int(read(config, Key("num_local_experts", int, None)) or read(config, Key("num_experts", int)))


def _sparse_layers(config: Config) -> Sequence[bool]:
    """Every `decoder_sparse_step`-th layer has experts, except those in `mlp_only_layers`."""
    step, dense = read(config, Key("decoder_sparse_step", int, 1)), read(config, Key("mlp_only_layers", list, []))
    if step < 1:
        raise model_error(f"config.json: decoder_sparse_step must be at least 1, got {step}")
    return [i not in dense and (i + 1) % step == 0 for i in range(config_json.num_layers(config))]


def _qwen2_windows(config: Config) -> Sequence[int | None]:
    """Without `layer_types`, every second of the first `max_window_layers` layers has a window if `use_sliding_window` is on."""
    if config.get("layer_types") is None and read(config, Key("use_sliding_window", bool, False)):
        first = read(config, Key("max_window_layers", int, 28))
        types = ["full_attention" if i % 2 or i >= first else "sliding_attention" for i in range(config_json.num_layers(config))]
        config = {**config, "layer_types": types}
    return config_json.windows_by_layer(config)


def _gpt_oss_head_dim(config: Config) -> int:
    """A missing key means 64, an explicit null hidden_size / heads."""
    return config_json.head_dim({"head_dim": 64, **config})


def shared(size: Key, count: Key | None = None) -> Callable[[Config], MLPSpec | None]:
    """A shared expert of this size, or of the size of `count` experts. None: there is none."""
    def read_shared(config: Config) -> MLPSpec | None:
        width = read(config, size) * (1 if count is None else read(config, count))
        return MLPSpec(intermediate_size=width, gated=True, activation="silu", bias=False) if width else None
    return read_shared


EXPERT_NAMES = {  # of Qwen, OLMoE and DeepSeek
    "router": ("layers.{i}.mlp.gate",),
    "experts_gate_up": ("layers.{i}.mlp.experts.{e}.gate_proj", "layers.{i}.mlp.experts.{e}.up_proj"),
    "experts_gate_up_fused": ("layers.{i}.mlp.experts.gate_up_proj",),
    "experts_down": ("layers.{i}.mlp.experts.{e}.down_proj",),
    "experts_down_fused": ("layers.{i}.mlp.experts.down_proj",),
    "shared_gate_up": ("layers.{i}.mlp.shared_expert.gate_proj", "layers.{i}.mlp.shared_expert.up_proj"),
    "shared_down": ("layers.{i}.mlp.shared_expert.down_proj",),
    "shared_gate": ("layers.{i}.mlp.shared_expert_gate",),
}
_QWEN_EXPERTS = {
    "num_experts": _num_experts,
    "top_k": Key("num_experts_per_tok", int),
    "intermediate_size": Key("moe_intermediate_size", int),
    "renormalize": Key("norm_topk_prob", bool, False),
    "activation": config_json.activation(Key("hidden_act", str, "silu")),
}
MIXTRAL = MISTRAL.variant(
    model={"norm_eps": Key("rms_norm_eps", float, 1e-5)},
    attention={"window": config_json.one_window(None)},
    rope={"theta": 1000000.0},
    moe={
        "num_experts": _num_experts,
        "top_k": Key("num_experts_per_tok", int, 2),
        "intermediate_size": Key("intermediate_size", int),
        "renormalize": True,
        "activation": config_json.activation(Key("hidden_act", str, "silu")),
    },
    sparse=True,
    names={
        **EXPERT_NAMES,
        "router": ("layers.{i}.block_sparse_moe.gate",),
        "experts_gate_up": ("layers.{i}.block_sparse_moe.experts.{e}.w1", "layers.{i}.block_sparse_moe.experts.{e}.w3"),
        "experts_down": ("layers.{i}.block_sparse_moe.experts.{e}.w2",),
    },
)
QWEN2_MOE = QWEN2.variant(
    attention={"num_kv_heads": config_json.kv_heads(16), "window": PerLayer(_qwen2_windows), "qkv_bias": Key("qkv_bias", bool, True)},
    moe={**_QWEN_EXPERTS, "shared": shared(Key("shared_expert_intermediate_size", int)), "shared_gate": True},
    sparse=PerLayer(_sparse_layers),
    names=EXPERT_NAMES,
)
QWEN3_MOE = QWEN3.variant(
    attention={"num_kv_heads": config_json.kv_heads(4), "window": config_json.window_if_used, "head_dim": config_json.head_dim},
    moe=_QWEN_EXPERTS,
    sparse=PerLayer(_sparse_layers),
    names=EXPERT_NAMES,
)
OLMOE = LLAMA.variant(
    model={"norm_eps": Key("rms_norm_eps", float, 1e-5), "max_model_len": Key("max_position_embeddings", int, 4096)},
    attention={"qk_norm": "width"},
    fixed=(Key("clip_qkv", float, None),),
    moe={**_QWEN_EXPERTS, "intermediate_size": Key("intermediate_size", int)},
    sparse=True,
    names=EXPERT_NAMES,
)
GPT_OSS = LLAMA.variant(
    model={"norm_eps": Key("rms_norm_eps", float, 1e-5), "max_model_len": Key("max_position_embeddings", int, 131072)},
    attention={
        "num_kv_heads": config_json.kv_heads(8), "window": PerLayer(config_json.windows_by_type(2, 128, key=None)), "sinks": True,
        "head_dim": _gpt_oss_head_dim,
        "qkv_bias": Key("attention_bias", bool, True), "out_bias": Key("attention_bias", bool, True),
    },
    moe={
        "num_experts": _num_experts,
        "top_k": Key("num_experts_per_tok", int, 4),
        "intermediate_size": Key("intermediate_size", int),
        "scoring": "top_softmax",
        "router_bias": True,
        "bias": True,
        "interleaved": True,
        "clamp": lambda config: (read(config, Key("swiglu_alpha", float, 1.702)), read(config, Key("swiglu_limit", float, 7.0))),
    },
    sparse=True,
    rope={"theta": 150000.0, "missing": {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}},
    names={**EXPERT_NAMES, "router": ("layers.{i}.mlp.router",), "sinks": ("layers.{i}.self_attn.sinks",)},
)
