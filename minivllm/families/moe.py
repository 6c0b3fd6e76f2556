"""Mixture-of-experts models: Mixtral, Qwen's, OLMoE, gpt-oss and DeepSeek-V2/V3. Some or all layers have experts instead of one MLP."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from minivllm.families import config_json
from minivllm.families.config_json import Config, Key, read
from minivllm.families.family import Family, PerLayer
from minivllm.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from minivllm.families.spec import LatentSpec, MLPSpec, model_error


def num_experts(config: Config) -> int:
    """Transformers 5 writes num_local_experts where Transformers 4 wrote num_experts."""
    return int(read(config, Key("num_local_experts", int, None)) or read(config, Key("num_experts", int)))


def sparse_layers(config: Config) -> Sequence[bool]:
    """Every `decoder_sparse_step`-th layer has experts, except those in `mlp_only_layers`."""
    step, dense = read(config, Key("decoder_sparse_step", int, 1)), read(config, Key("mlp_only_layers", list, []))
    if step < 1:
        raise model_error(f"config.json: decoder_sparse_step must be at least 1, got {step}")
    return [i not in dense and (i + 1) % step == 0 for i in range(config_json.num_layers(config))]


def qwen2_windows(config: Config) -> Sequence[int | None]:
    """Without `layer_types`, every second of the first `max_window_layers` layers has a window if `use_sliding_window` is on."""
    if config.get("layer_types") is None and read(config, Key("use_sliding_window", bool, False)):
        first = read(config, Key("max_window_layers", int, 28))
        types = ["full_attention" if i % 2 or i >= first else "sliding_attention" for i in range(config_json.num_layers(config))]
        config = {**config, "layer_types": types}
    return config_json.windows_by_layer(config)


def qwen3_window(config: Config) -> int | None:
    """One window for every layer, if `use_sliding_window` is on."""
    return config_json.one_window(4096)(config) if read(config, Key("use_sliding_window", bool, False)) else None


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
QWEN_EXPERTS = {
    "num_experts": num_experts,
    "top_k": Key("num_experts_per_tok", int),
    "intermediate_size": Key("moe_intermediate_size", int),
    "renormalize": Key("norm_topk_prob", bool, False),
}


MIXTRAL = MISTRAL.variant(
    model={"norm_eps": Key("rms_norm_eps", float, 1e-5)},
    attention={"window": config_json.one_window(None)},
    moe={
        "num_experts": num_experts,
        "top_k": Key("num_experts_per_tok", int, 2),
        "intermediate_size": Key("intermediate_size", int),
        "renormalize": True,
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
    attention={"window": PerLayer(qwen2_windows), "qkv_bias": Key("qkv_bias", bool, True)},
    moe={**QWEN_EXPERTS, "shared": shared(Key("shared_expert_intermediate_size", int)), "shared_gate": True},
    sparse=PerLayer(sparse_layers),
    names=EXPERT_NAMES,
)
QWEN3_MOE: Family = QWEN3.variant(
    attention={"window": qwen3_window, "head_dim": config_json.head_dim},
    moe=QWEN_EXPERTS,
    sparse=PerLayer(sparse_layers),
    names=EXPERT_NAMES,
)
OLMOE = LLAMA.variant(
    model={"norm_eps": Key("rms_norm_eps", float, 1e-5), "max_model_len": Key("max_position_embeddings", int, 4096)},
    attention={"qk_norm": "width"},
    fixed=(Key("clip_qkv", float, None),),
    moe={**QWEN_EXPERTS, "intermediate_size": Key("intermediate_size", int)},
    sparse=True,
    names=EXPERT_NAMES,
)
GPT_OSS = LLAMA.variant(
    model={"norm_eps": Key("rms_norm_eps", float, 1e-5), "max_model_len": Key("max_position_embeddings", int, 131072)},
    attention={
        "window": PerLayer(config_json.windows_by_type(2)), "sinks": True, "head_dim": Key("head_dim", int, 64),
        "qkv_bias": Key("attention_bias", bool, True), "out_bias": Key("attention_bias", bool, True),
    },
    moe={
        "num_experts": num_experts,
        "top_k": Key("num_experts_per_tok", int, 4),
        "intermediate_size": Key("intermediate_size", int),
        "scoring": "top_softmax",
        "router_bias": True,
        "bias": True,
        "interleaved": True,
        "clamp": lambda config: (read(config, Key("swiglu_alpha", float, 1.702)), read(config, Key("swiglu_limit", float, 7.0))),
    },
    sparse=True,
    names={**EXPERT_NAMES, "router": ("layers.{i}.mlp.router",), "sinks": ("layers.{i}.self_attn.sinks",)},
)


def latent(config: Config) -> LatentSpec:
    """DeepSeek's multi-head latent attention."""
    def size(name: str, default: int) -> int:
        return int(read(config, Key(name, int, default)))
    return LatentSpec(
        q_rank=read(config, Key("q_lora_rank", int, None)), rank=size("kv_lora_rank", 512), nope_dim=size("qk_nope_head_dim", 128),
        rope_dim=size("qk_rope_head_dim", 64), value_dim=size("v_head_dim", 128),
        interleaved=read(config, Key("rope_interleave", bool, True)))


def latent_scale(config: Config) -> float:
    """Factor on the scores: YaRN sharpens them by its `mscale_all_dim`, squared."""
    sizes, params = latent(config), config.get("rope_scaling") or config.get("rope_parameters") or {}
    scale = float((sizes.nope_dim + sizes.rope_dim) ** -0.5)
    sharper = read(params, Key("mscale_all_dim", float, 0.0)) if (params.get("rope_type") or params.get("type")) == "yarn" else 0.0
    factor = read(params, Key("factor", float, 1.0))
    return scale * (0.1 * sharper * math.log(factor) + 1.0) ** 2 if sharper and factor > 1.0 else scale


def after_first(config: Config) -> Sequence[bool]:
    """All layers but the first `first_k_dense_replace`."""
    return [i >= read(config, Key("first_k_dense_replace", int, 0)) for i in range(config_json.num_layers(config))]


def limited(key: str) -> Callable[[Config], int]:
    """n_group or topk_group of DeepSeek-V2: 1 if experts are chosen among all of them."""
    def read_limit(config: Config) -> int:
        method = read(config, Key("topk_method", str, "greedy"))
        if method not in ("greedy", "group_limited_greedy"):
            raise model_error(f"config.json: topk_method {method!r} is not supported; greedy and group_limited_greedy are")
        return 1 if method == "greedy" else int(read(config, Key(key, int)))
    return read_limit


DEEPSEEK_V2 = LLAMA.variant(
    attention={
        "latent": latent, "num_kv_heads": 1, "head_dim": lambda config: latent(config).rank + latent(config).rope_dim,
        "multiplier": latent_scale,
    },
    moe={
        "num_experts": Key("n_routed_experts", int),
        "top_k": Key("num_experts_per_tok", int),
        "intermediate_size": Key("moe_intermediate_size", int),
        "renormalize": config_json.only(False, Key("norm_topk_prob", bool, False)),
        "scale": Key("routed_scaling_factor", float, 1.0),
        "groups": limited("n_group"),
        "top_groups": limited("topk_group"),
        "shared": shared(Key("moe_intermediate_size", int), Key("n_shared_experts", int, 0)),
    },
    sparse=PerLayer(after_first),
    fixed=(Key("moe_layer_freq", int, 1),),
    names={
        **EXPERT_NAMES,
        "shared_gate_up": ("layers.{i}.mlp.shared_experts.gate_proj", "layers.{i}.mlp.shared_experts.up_proj"),
        "shared_down": ("layers.{i}.mlp.shared_experts.down_proj",),
        "q": ("layers.{i}.self_attn.q_proj",),
        "q_a": ("layers.{i}.self_attn.q_a_proj",),
        "q_a_norm": ("layers.{i}.self_attn.q_a_layernorm",),
        "q_b": ("layers.{i}.self_attn.q_b_proj",),
        "kv_a": ("layers.{i}.self_attn.kv_a_proj_with_mqa",),
        "kv_a_norm": ("layers.{i}.self_attn.kv_a_layernorm",),
        "kv_b": ("layers.{i}.self_attn.kv_b_proj",),
    },
)
DEEPSEEK_V3 = DEEPSEEK_V2.variant(
    model={"extra_layers": Key("num_nextn_predict_layers", int, 0)},
    moe={
        "renormalize": Key("norm_topk_prob", bool, True),
        "scale": Key("routed_scaling_factor", float, 2.5),
        "scoring": config_json.only("sigmoid", Key("scoring_func", str, "sigmoid")),
        "correction": True,
        "groups": Key("n_group", int, 8),
        "top_groups": Key("topk_group", int, 4),
        "group_score": "top2",
        "shared": shared(Key("moe_intermediate_size", int), Key("n_shared_experts", int, 1)),
    },
)
