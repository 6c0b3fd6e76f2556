"""Gemma 1, 2 and 3 (text): scaled embeddings, norm weights stored as w - 1, a GELU gate; from Gemma 2 on also norms of outputs."""
from __future__ import annotations

from minivllm.families import config_json
from minivllm.families.config_json import Config, Key, read
from minivllm.families.family import PerLayer
from minivllm.families.llama import LLAMA
from minivllm.families.spec import RopeSpec


def _activation(config: Config) -> str:
    """Files of the first Gemma name GELU and mean its tanh approximation."""
    name = config_json.activation(Key("hidden_act", str, "gelu_pytorch_tanh"))(config)
    return "gelu_tanh" if name == "gelu" else name


def _multiplier(config: Config) -> float:
    return float(read(config, Key("query_pre_attn_scalar", float, 256.0)) ** -0.5)


def _gemma3_ropes(config: Config) -> list[RopeSpec]:
    """`max_position_embeddings` is the context length after scaling."""
    by_type, length, head = {}, read(config, Key("max_position_embeddings", int, 131072)), read(config, Key("head_dim", int, 256))
    for kind, base in (("full_attention", Key("rope_theta", float, 1e6)), ("sliding_attention", Key("rope_local_base_freq", float, 1e4))):
        by_type[kind] = config_json.rope(config_json.rope_by_type(config, kind, base), length, head=head)[0]
    return [by_type[kind] for kind in config_json.layer_types(config, 6)]


GEMMA = LLAMA.variant(
    model={
        "max_model_len": Key("max_position_embeddings", int, 8192),
        "tied": Key("tie_word_embeddings", bool, True),
        "norm_offset": 1.0,
        "embed_scale": lambda config: read(config, Key("hidden_size", int)) ** 0.5,
    },
    attention={"num_kv_heads": config_json.kv_heads(16), "head_dim": Key("head_dim", int, 256)},
    mlp={"activation": _activation, "bias": False},
    fixed=(Key("use_bidirectional_attention", bool, False),),
)
GEMMA2 = GEMMA.variant(
    model={"logit_softcap": config_json.nullable("final_logit_softcapping", float, 30.0)},
    attention={
        "multiplier": _multiplier,
        "softcap": config_json.nullable("attn_logit_softcapping", float, 50.0),
        "window": PerLayer(config_json.windows_by_type(2, key=None)),
        "num_kv_heads": config_json.kv_heads(4),
    },
    mlp={"activation": config_json.activation(Key("hidden_activation", str, "gelu_pytorch_tanh"))},
    block="sandwich",
    names={
        "attn_out_norm": ("layers.{i}.post_attention_layernorm",),
        "mlp_norm": ("layers.{i}.pre_feedforward_layernorm",),
        "mlp_out_norm": ("layers.{i}.post_feedforward_layernorm",),
    },
)
GEMMA3 = GEMMA2.variant(
    model={
        "max_model_len": Key("max_position_embeddings", int, 131072),
        "logit_softcap": config_json.nullable("final_logit_softcapping", float, None),
    },
    attention={
        "qk_norm": "head",
        "softcap": None,
        "window": PerLayer(config_json.windows_by_type(6)),
        "rope": PerLayer(_gemma3_ropes),
    },
    fixed=(Key("attn_logit_softcapping", float, None),),  # Transformers reads this key and does not use it
)
# The models from 4B on also read images. Their text_config leaves out what has the default value.
GEMMA3_WITH_IMAGES = GEMMA3.variant(
    model={"vocab_size": Key("vocab_size", int, 262208)},
    attention={"num_heads": Key("num_attention_heads", int, 8), "num_kv_heads": Key("num_key_value_heads", int, 4)},
    text_config=True,
    fixed=(Key("final_logit_softcapping", float, None),),  # Transformers caps the logits of the classes without images only
)
