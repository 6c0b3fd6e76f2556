"""DeepSeek-V2 and V3: latent attention, and experts that are chosen from a few groups."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from minivllm.families import config_json
from minivllm.families.config_json import Config, Key, read
from minivllm.families.family import PerLayer
from minivllm.families.llama import LLAMA
from minivllm.families.moe import EXPERT_NAMES, shared
from minivllm.families.spec import LatentSpec, model_error


def _latent(config: Config) -> LatentSpec:
    """DeepSeek's multi-head latent attention."""
    def size(name: str, default: int) -> int:
        return int(read(config, Key(name, int, default)))
    rotated = size("qk_rope_head_dim", 64)
    if (head := size("head_dim", rotated)) != rotated:
        raise model_error(f"config.json: head_dim {head} must be qk_rope_head_dim {rotated}: correct or remove it")
    return LatentSpec(
        q_rank=config_json.nullable("q_lora_rank", int, 1536)(config), rank=size("kv_lora_rank", 512),
        nope_dim=size("qk_nope_head_dim", 128), rope_dim=rotated, value_dim=size("v_head_dim", 128))


def _latent_scale(config: Config) -> float:
    """Factor on the scores: scaled positions sharpen them by `mscale_all_dim`, squared."""
    sizes, params = _latent(config), config_json.rope_parameters(config)
    scale = float((sizes.nope_dim + sizes.rope_dim) ** -0.5)
    scaled = (params.get("rope_type") or params.get("type") or "default") != "default"
    sharper = read(params, Key("mscale_all_dim", float, 0.0)) if scaled else 0.0
    factor = read(params, Key("factor", float, 1.0))
    return scale * (0.1 * sharper * math.log(factor) + 1.0) ** 2 if sharper and factor > 1.0 else scale


def _after_first(default: int) -> Callable[[Config], Sequence[bool]]:
    """All layers but the first `first_k_dense_replace`."""
    def read_sparse(config: Config) -> Sequence[bool]:
        return [i >= read(config, Key("first_k_dense_replace", int, default)) for i in range(config_json.num_layers(config))]
    return read_sparse


def _limited(key: str) -> Callable[[Config], int]:
    """n_group or topk_group of DeepSeek-V2: 1 if experts are chosen among all of them."""
    def read_limit(config: Config) -> int:
        method = read(config, Key("topk_method", str, "greedy"))
        if method not in ("greedy", "group_limited_greedy"):
            raise model_error(f"config.json: topk_method {method!r} is not supported; greedy and group_limited_greedy are")
        return 1 if method == "greedy" else int(read(config, Key(key, int)))
    return read_limit


DEEPSEEK_V2 = LLAMA.variant(
    attention={
        "latent": _latent, "num_kv_heads": 1, "head_dim": lambda config: _latent(config).rank + _latent(config).rope_dim,
        "multiplier": _latent_scale,
    },
    rope={"head": lambda config: _latent(config).rope_dim, "interleaved": True},
    moe={
        "num_experts": Key("n_routed_experts", int),
        "top_k": Key("num_experts_per_tok", int),
        "intermediate_size": Key("moe_intermediate_size", int),
        "renormalize": config_json.only(False, Key("norm_topk_prob", bool, False)),
        "scale": Key("routed_scaling_factor", float, 1.0),
        "groups": _limited("n_group"),
        "top_groups": _limited("topk_group"),
        "activation": config_json.activation(Key("hidden_act", str, "silu")),
        "shared": shared(Key("moe_intermediate_size", int), Key("n_shared_experts", int, 2)),
    },
    sparse=PerLayer(_after_first(0)),
    fixed=(Key("moe_layer_freq", int, 1), Key("mlp_bias", bool, False)),
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
    model={"max_model_len": Key("max_position_embeddings", int, 4096), "extra_layers": Key("num_nextn_predict_layers", int, 1)},
    rope={"interleaved": Key("rope_interleave", bool, True)},
    sparse=PerLayer(_after_first(3)),
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
