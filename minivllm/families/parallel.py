"""Families with LayerNorms, most of which compute attention and MLP from the same hidden states: Phi, GPT-NeoX, GPT-J, Cohere, StableLM."""
from __future__ import annotations

from minivllm.families import config_json
from minivllm.families.config_json import Config, Key, read
from minivllm.families.family import PerLayer
from minivllm.families.llama import LLAMA
from minivllm.families.spec import RopeSpec

_LAYER_NORM = {"norm": "layer", "norm_eps": Key("layer_norm_eps", float, 1e-5)}


def _choice(key: Key, if_true: str | None, if_false: str | None) -> object:
    return lambda config: if_true if read(config, key) else if_false


def _inner(key: str, hidden: str = "hidden_size") -> object:
    """The width of an MLP: 4 * hidden unless stated."""
    return lambda config: read(config, Key(key, int, 4 * read(config, Key(hidden, int))))


def _cohere2_ropes(config: Config) -> list[RopeSpec | None]:
    """Only layers with a window rotate."""
    length = read(config, Key("max_position_embeddings", int, 8192))
    rope = config_json.rope({"rope_theta": 500000.0, **config}, length, head=config_json.head_dim(config), interleaved=True)[0]
    return [rope if kind == "sliding_attention" else None for kind in config_json.layer_types(config, 4)]


PHI = LLAMA.variant(
    model={**_LAYER_NORM, "head_bias": True},
    attention={"qk_norm": _choice(Key("qk_layernorm", bool, False), "layer", None), "qkv_bias": True, "out_bias": True},
    mlp={"gated": False, "activation": config_json.activation(Key("hidden_act", str, "gelu_new")), "bias": True},
    block="parallel_one_norm",
    rope={"partial": 0.5},
    names={
        "q_norm": ("layers.{i}.self_attn.q_layernorm",),
        "k_norm": ("layers.{i}.self_attn.k_layernorm",),
        "o": ("layers.{i}.self_attn.dense",),
        "up": ("layers.{i}.mlp.fc1",),
        "down": ("layers.{i}.mlp.fc2",),
        "norm": ("final_layernorm",),
    },
)
GPT_NEOX = LLAMA.variant(
    model=_LAYER_NORM,
    attention={"qkv_bias": Key("attention_bias", bool, True), "out_bias": Key("attention_bias", bool, True), "grouped_qkv": True},
    mlp={"gated": False, "activation": config_json.activation(Key("hidden_act", str, "gelu")), "bias": True},
    block=_choice(Key("use_parallel_residual", bool, True), "parallel", "pre"),
    rope={"partial": 0.25},
    aliases={"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"},
    names={
        "embed": ("embed_in",),
        "qkv": ("layers.{i}.attention.query_key_value",),
        "o": ("layers.{i}.attention.dense",),
        "up": ("layers.{i}.mlp.dense_h_to_4h",),
        "down": ("layers.{i}.mlp.dense_4h_to_h",),
        "norm": ("final_layer_norm",),
        "head": ("embed_out",),
    },
)
GPT_J = LLAMA.variant(
    model={"norm": "layer", "norm_eps": Key("layer_norm_epsilon", float, 1e-5), "head_bias": True},
    attention={"qkv_bias": False, "out_bias": False},
    mlp={
        "intermediate_size": _inner("n_inner"),
        "gated": False,
        "activation": config_json.activation(Key("activation_function", str, "gelu_new")),
        "bias": True,
    },
    block="parallel_one_norm",
    rope={"dim": Key("rotary_dim", int, 64), "interleaved": True},
    aliases={"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
             "max_position_embeddings": "n_positions"},
    names={
        "embed": ("wte",),
        "attn_norm": ("h.{i}.ln_1",),
        "qkv": ("h.{i}.attn.q_proj", "h.{i}.attn.k_proj", "h.{i}.attn.v_proj"),
        "o": ("h.{i}.attn.out_proj",),
        "up": ("h.{i}.mlp.fc_in",),
        "down": ("h.{i}.mlp.fc_out",),
        "norm": ("ln_f",),
    },
)
COHERE = LLAMA.variant(
    model={
        **_LAYER_NORM,
        "max_model_len": Key("max_position_embeddings", int, 8192),
        "norm_bias": False,
        "tied": Key("tie_word_embeddings", bool, True),
        "logit_scale": Key("logit_scale", float, 0.0625),
    },
    attention={"qk_norm": _choice(Key("use_qk_norm", bool, False), "layer_by_head", None)},
    mlp={"bias": False},
    block="parallel_one_norm",
    rope={"interleaved": True},
)
COHERE2 = COHERE.variant(
    attention={"qk_norm": None, "window": PerLayer(config_json.windows_by_type(4)), "rope": PerLayer(_cohere2_ropes)},
)
STABLELM = LLAMA.variant(
    model={**_LAYER_NORM, "max_model_len": Key("max_position_embeddings", int, 4096)},
    attention={
        "qk_norm": _choice(Key("qk_layernorm", bool, False), "layer_by_head", None),
        "qkv_bias": Key("use_qkv_bias", bool, False),
        "out_bias": False,
    },
    mlp={"bias": False},
    block=_choice(Key("use_parallel_residual", bool, False), "parallel_one_norm", "pre"),
    rope={"partial": 0.25},
    names={"q_norm": ("layers.{i}.self_attn.q_layernorm.norms.{h}",), "k_norm": ("layers.{i}.self_attn.k_layernorm.norms.{h}",)},
)
