"""OPT: LayerNorm, learned positions, a plain MLP. OPT-350m also projects its embeddings to the hidden size and back."""
from __future__ import annotations

from minivllm.families import config_json
from minivllm.families.config_json import Config, Key, read
from minivllm.families.family import Family


def _final_norm(config: Config) -> bool:
    return bool(config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False))


def _embed_size(config: Config) -> int:
    return int(read(config, Key("word_embed_proj_dim", int, read(config, Key("hidden_size", int)))))


def _block(config: Config) -> str:
    return "pre" if read(config, Key("do_layer_norm_before", bool, True)) else "post"


OPT = Family(
    model={
        "vocab_size": Key("vocab_size", int),
        "hidden_size": Key("hidden_size", int),
        "max_model_len": Key("max_position_embeddings", int, 2048),
        "tied": Key("tie_word_embeddings", bool, True),
        "norm": "layer",
        "norm_eps": 1e-5,
        "norm_affine": Key("layer_norm_elementwise_affine", bool, True),
        "final_norm": _final_norm,
        "learned_positions": Key("max_position_embeddings", int, 2048),
        "position_offset": 2,  # the first two rows of the table were for padding and are never read
        "embed_size": _embed_size,
    },
    attention={
        "num_heads": Key("num_attention_heads", int),
        "num_kv_heads": Key("num_attention_heads", int),
        "head_dim": config_json.head_dim,
        "window": None,
        "rope": None,
        "qk_norm": None,
        "qkv_bias": Key("enable_bias", bool, True),
        "out_bias": Key("enable_bias", bool, True),
    },
    mlp={
        "intermediate_size": Key("ffn_dim", int),
        "gated": False,
        "activation": config_json.activation(Key("activation_function", str, "relu")),
        "bias": Key("enable_bias", bool, True),
    },
    block=_block,
    names={
        "embed": ("embed_tokens",),
        "positions": ("embed_positions",),
        "project_in": ("project_in",),
        "project_out": ("project_out",),
        "attn_norm": ("layers.{i}.self_attn_layer_norm",),
        "qkv": ("layers.{i}.self_attn.q_proj", "layers.{i}.self_attn.k_proj", "layers.{i}.self_attn.v_proj"),
        "o": ("layers.{i}.self_attn.out_proj",),
        "mlp_norm": ("layers.{i}.final_layer_norm",),
        "up": ("layers.{i}.fc1",),
        "down": ("layers.{i}.fc2",),
        "norm": ("final_layer_norm",),
        "head": ("lm_head",),
    },
)
