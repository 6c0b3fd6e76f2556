"""Llama and its descendants: RMSNorm before attention and MLP, rotary embedding, a gated MLP."""
from __future__ import annotations

from minivllm.families import config_json
from minivllm.families.config_json import Key
from minivllm.families.family import Family, PerLayer

LLAMA = Family(
    model={
        "vocab_size": Key("vocab_size", int),
        "hidden_size": Key("hidden_size", int),
        "max_model_len": Key("max_position_embeddings", int, 2048),
        "tied": Key("tie_word_embeddings", bool, False),
        "norm": "rms",
        "norm_eps": Key("rms_norm_eps", float, 1e-6),
        "norm_affine": True,
        "final_norm": True,
        "learned_positions": 0,
        "position_offset": 0,
        "embed_size": Key("hidden_size", int),
    },
    attention={
        "num_heads": Key("num_attention_heads", int),
        "num_kv_heads": config_json.kv_heads(),
        "head_dim": config_json.head_dim,
        "window": None,
        "qk_norm": None,
        "qkv_bias": Key("attention_bias", bool, False),
        "out_bias": Key("attention_bias", bool, False),
    },
    mlp={
        "intermediate_size": Key("intermediate_size", int),
        "gated": True,
        "activation": config_json.activation(Key("hidden_act", str, "silu")),
        "bias": Key("mlp_bias", bool, False),
    },
    names={
        "embed": ("embed_tokens",),
        "attn_norm": ("layers.{i}.input_layernorm",),
        "qkv": ("layers.{i}.self_attn.q_proj", "layers.{i}.self_attn.k_proj", "layers.{i}.self_attn.v_proj"),
        "q_norm": ("layers.{i}.self_attn.q_norm",),
        "k_norm": ("layers.{i}.self_attn.k_norm",),
        "o": ("layers.{i}.self_attn.o_proj",),
        "mlp_norm": ("layers.{i}.post_attention_layernorm",),
        "gate_up": ("layers.{i}.mlp.gate_proj", "layers.{i}.mlp.up_proj"),
        "down": ("layers.{i}.mlp.down_proj",),
        "norm": ("norm",),
        "head": ("lm_head",),
    },
)
MISTRAL = LLAMA.variant(
    model={"max_model_len": Key("max_position_embeddings", int, 131072)},
    attention={
        "num_kv_heads": config_json.kv_heads(8), "window": config_json.one_window(4096), "qkv_bias": False, "out_bias": False,
    },
    mlp={"bias": False},
)
QWEN2 = LLAMA.variant(
    model={"max_model_len": Key("max_position_embeddings", int, 32768)},
    attention={
        "num_kv_heads": config_json.kv_heads(32), "window": PerLayer(config_json.windows_by_layer), "qkv_bias": True, "out_bias": False,
    },
    mlp={"bias": False},
)
QWEN3 = QWEN2.variant(attention={
    "qkv_bias": Key("attention_bias", bool, False), "out_bias": Key("attention_bias", bool, False), "qk_norm": "head",
    "head_dim": Key("head_dim", int, 128),
})
