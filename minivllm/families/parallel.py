"""Families with LayerNorms, most with attention and MLP in parallel: Phi, GPT-NeoX, GPT-J, Cohere, StableLM, Falcon; GPT-2, BLOOM."""
from __future__ import annotations

from collections.abc import Callable

from minivllm.errors import shown
from minivllm.families import config_json
from minivllm.families.config_json import Config, Key, read
from minivllm.families.family import PerLayer
from minivllm.families.llama import LLAMA
from minivllm.families.spec import model_error

_LAYER_NORM = {"norm": "layer", "norm_eps": Key("layer_norm_eps", float, 1e-5)}


def _choice(key: Key, if_true: str | None, if_false: str | None) -> object:
    return lambda config: if_true if read(config, key) else if_false


def _inner(key: str, hidden: str = "hidden_size") -> object:
    """The width of an MLP: 4 * hidden unless stated."""
    return lambda config: read(config, Key(key, int, 4 * read(config, Key(hidden, int))))


def _falcon_two_norms(config: Config) -> bool:
    new = read(config, Key("new_decoder_architecture", bool, False))
    return bool(new and read(config, Key("num_ln_in_parallel_attn", int, 2)) == 2)


def _falcon_block(config: Config) -> str:
    new = read(config, Key("new_decoder_architecture", bool, False))
    if not new and not read(config, Key("parallel_attn", bool, True)):
        return "pre"
    return "parallel" if _falcon_two_norms(config) else "parallel_one_norm"


def _falcon_kv_heads(config: Config) -> int:
    heads = read(config, Key("num_attention_heads", int))
    if not read(config, Key("new_decoder_architecture", bool, False)) and read(config, Key("multi_query", bool, True)):
        return 1
    return int(read(config, Key("num_kv_heads", int, heads)))


def _falcon_alibi(config: Config) -> tuple[float, ...] | None:
    """Falcon scales the bias like the scores."""
    scale = config_json.head_dim(config) ** -0.5
    slopes = config_json.alibi_slopes(read(config, Key("num_attention_heads", int)))
    return tuple(scale * slope for slope in slopes) if read(config, Key("alibi", bool, False)) else None


def _gpt2_multipliers(config: Config) -> list[float]:
    scale = config_json.head_dim(config) ** -0.5 if read(config, Key("scale_attn_weights", bool, True)) else 1.0
    by_layer = read(config, Key("scale_attn_by_inverse_layer_idx", bool, False))
    return [scale / (i + 1 if by_layer else 1) for i in range(config_json.num_layers(config))]


def _neox_key(name: str, default: float, usual: str) -> Callable[[Config], float]:
    """A rotary parameter under GPT-NeoX's own name. Beside `rope_parameters`, Transformers does not read the usual name."""
    def read_own(config: Config) -> float:
        value = float(read(config, Key(name, float, default)))
        if (other := read(config, Key(usual, float, value))) != value:
            raise model_error(f"config.json: {usual} {shown(other)} differs from {name} {shown(value)}, which is in use: correct {name}")
        return value
    return read_own


def _cohere2_rotated(config: Config) -> list[bool]:
    """Only layers with a window rotate."""
    return [kind == "sliding_attention" for kind in config_json.layer_types(config, 4)]


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
    attention={
        "num_kv_heads": Key("num_attention_heads", int),
        "qkv_bias": Key("attention_bias", bool, True),
        "out_bias": Key("attention_bias", bool, True),
        "grouped_qkv": True,
    },
    mlp={"gated": False, "activation": config_json.activation(Key("hidden_act", str, "gelu")), "bias": True},
    block=_choice(Key("use_parallel_residual", bool, True), "parallel", "pre"),
    rope={"partial": _neox_key("rotary_pct", 0.25, "partial_rotary_factor"), "theta": _neox_key("rotary_emb_base", 10000.0, "rope_theta")},
    names={
        "embed": ("embed_in",),
        "qkv": ("layers.{i}.attention.query_key_value",),
        "o": ("layers.{i}.attention.dense",),
        "up": ("layers.{i}.mlp.dense_h_to_4h",),
        "down": ("layers.{i}.mlp.dense_4h_to_h",),
        "norm": ("final_layer_norm",),
    },
)
GPT_J = LLAMA.variant(
    model={"norm": "layer", "norm_eps": Key("layer_norm_epsilon", float, 1e-5), "head_bias": True},
    attention={"num_kv_heads": Key("num_attention_heads", int), "qkv_bias": False, "out_bias": False},
    mlp={
        "intermediate_size": _inner("n_inner"),
        "gated": False,
        "activation": config_json.activation(Key("activation_function", str, "gelu_new")),
        "bias": True,
    },
    block="parallel_one_norm",
    rope={"dim": Key("rotary_dim", int, 64), "interleaved": True},
    fixed=(Key("rope_theta", float, 10000.0), Key("rope_scaling", dict, None), Key("rope_parameters", dict, None)),
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
    rope={"interleaved": True, "theta": 500000.0},
)
COHERE2 = COHERE.variant(
    rope={"theta": 10000.0},
    attention={"qk_norm": None, "window": PerLayer(config_json.windows_by_type(4))},
    rotated=PerLayer(_cohere2_rotated),
)
STABLELM = LLAMA.variant(
    model={**_LAYER_NORM, "max_model_len": Key("max_position_embeddings", int, 4096)},
    attention={
        "num_kv_heads": config_json.kv_heads(32),
        "qk_norm": _choice(Key("qk_layernorm", bool, False), "layer_by_head", None),
        "qkv_bias": Key("use_qkv_bias", bool, False),
        "out_bias": False,
    },
    mlp={"bias": False},
    block=_choice(Key("use_parallel_residual", bool, False), "parallel_one_norm", "pre"),
    rope={"partial": 0.25},
    names={"q_norm": ("layers.{i}.self_attn.q_layernorm.norms.{h}",), "k_norm": ("layers.{i}.self_attn.k_layernorm.norms.{h}",)},
)
FALCON = LLAMA.variant(
    model={
        "tied": Key("tie_word_embeddings", bool, True),
        "norm": "layer",
        "norm_eps": Key("layer_norm_epsilon", float, 1e-5),
    },
    attention={
        "num_kv_heads": _falcon_kv_heads,
        "alibi": _falcon_alibi,
        "qkv_bias": Key("bias", bool, False),
        "out_bias": Key("bias", bool, False),
        "grouped_qkv": True,
    },
    mlp={
        "intermediate_size": _inner("ffn_hidden_size"),
        "gated": False,
        "activation": config_json.activation(Key("activation", str, "gelu")),
        "bias": Key("bias", bool, False),
    },
    block=_falcon_block,
    rotated=lambda config: not read(config, Key("alibi", bool, False)),
    aliases={"hidden_size": "n_embed", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "num_kv_heads": "n_head_kv"},
    names={
        "embed": ("word_embeddings",),
        "attn_norm": lambda config: ("h.{i}.ln_attn" if _falcon_two_norms(config) else "h.{i}.input_layernorm",),
        "mlp_norm": lambda config: ("h.{i}.ln_mlp" if _falcon_two_norms(config) else "h.{i}.post_attention_layernorm",),
        "qkv": ("h.{i}.self_attention.query_key_value",),
        "o": ("h.{i}.self_attention.dense",),
        "up": ("h.{i}.mlp.dense_h_to_4h",),
        "down": ("h.{i}.mlp.dense_4h_to_h",),
        "norm": ("ln_f",),
    },
)
BLOOM = FALCON.variant(
    model={"max_model_len": Key("seq_length", int, 2048), "embed_norm": True},
    attention={
        "num_kv_heads": Key("num_attention_heads", int),
        "rope": None,
        "alibi": lambda config: config_json.alibi_slopes(read(config, Key("num_attention_heads", int))),
        "qkv_bias": True,
        "out_bias": True,
    },
    mlp={"intermediate_size": lambda config: 4 * read(config, Key("hidden_size", int)), "activation": "gelu_tanh", "bias": True},
    block="pre",
    fixed=(Key("apply_residual_connection_post_layernorm", bool, False),),
    names={
        "embed_norm": ("word_embeddings_layernorm",),
        "attn_norm": ("h.{i}.input_layernorm",),
        "mlp_norm": ("h.{i}.post_attention_layernorm",),
    },
)
GPT2 = GPT_J.variant(
    model={
        "tied": Key("tie_word_embeddings", bool, True),
        "max_model_len": Key("max_position_embeddings", int, 1024),
        "learned_positions": Key("max_position_embeddings", int, 1024),
        "head_bias": False,
        "transposed": True,
    },
    attention={
        "rope": None,
        "multiplier": PerLayer(_gpt2_multipliers),
        "qkv_bias": True,
        "out_bias": True,
    },
    block="pre",
    fixed=(Key("add_cross_attention", bool, False),),
    names={
        "positions": ("wpe",),
        "qkv": ("h.{i}.attn.c_attn",),
        "o": ("h.{i}.attn.c_proj",),
        "mlp_norm": ("h.{i}.ln_2",),
        "up": ("h.{i}.mlp.c_fc",),
        "down": ("h.{i}.mlp.c_proj",),
    },
)
