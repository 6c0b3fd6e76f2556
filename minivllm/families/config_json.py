"""Reading config.json: one key at a time, checked for its type, and the keys that several families share.

Transformers 4 and 5 name some keys differently; both spellings are read.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from minivllm.errors import nearest, shown
from minivllm.families.spec import RopeSpec, model_error

Config: TypeAlias = Mapping[str, Any]  # a parsed config.json
REQUIRED = ...

# Smallest and largest value of each number, far beyond real models: a damaged file must not allocate, loop or overflow.
_ANY = 2**31 - 1
LIMITS: Mapping[str, tuple[float, float]] = {
    "num_hidden_layers": (1, 10_000), "hidden_size": (1, 2**20), "word_embed_proj_dim": (1, 2**20), "intermediate_size": (1, 2**24),
    "ffn_dim": (1, 2**24), "num_attention_heads": (1, 2**16), "num_key_value_heads": (1, 2**16), "head_dim": (1, 2**16),
    "vocab_size": (1, 2**26), "max_position_embeddings": (1, _ANY), "original_max_position_embeddings": (1, _ANY),
    "sliding_window": (1, _ANY), "rms_norm_eps": (0.0, 1.0), "norm_epsilon": (0.0, 1.0), "layer_norm_eps": (0.0, 1.0),
    "layer_norm_epsilon": (0.0, 1.0), "partial_rotary_factor": (1e-6, 1.0), "rotary_dim": (2, 2**16), "n_inner": (1, 2**24),
    "ffn_hidden_size": (1, 2**24), "seq_length": (1, _ANY), "num_kv_heads": (1, 2**16), "sliding_window_pattern": (1, 10_000),
    "query_pre_attn_scalar": (1e-6, 1e9), "attention_multiplier": (0.0, 1e6), "attn_logit_softcapping": (1e-3, 1e6),
    "final_logit_softcapping": (1e-3, 1e6), "logit_scale": (0.0, 1e6), "logits_scaling": (1e-6, 1e6), "embedding_multiplier": (0.0, 1e6),
    "residual_multiplier": (1e-6, 1e6),
    "rotary_pct": (1e-6, 1.0), "rotary_emb_base": (1.0, 1e15), "rope_local_base_freq": (1.0, 1e15),
    "rope_theta": (1.0, 1e15), "factor": (1.0, 1e6), "beta_fast": (0.0, 1e6),
    "beta_slow": (0.0, 1e6), "low_freq_factor": (0.0, 1e6), "high_freq_factor": (0.0, 1e6), "attention_factor": (0.0, 1e3),
    "num_experts": (1, 2**16), "num_local_experts": (1, 2**16), "num_experts_per_tok": (1, 2**16), "moe_intermediate_size": (1, 2**24),
    "shared_expert_intermediate_size": (0, 2**24),
    "n_routed_experts": (1, 2**16), "n_shared_experts": (0, 2**10),
    "n_group": (1, 2**16), "topk_group": (1, 2**16), "q_lora_rank": (1, 2**20), "kv_lora_rank": (1, 2**20), "qk_nope_head_dim": (1, 2**16),
    "qk_rope_head_dim": (1, 2**16), "v_head_dim": (1, 2**16), "num_nextn_predict_layers": (0, 10_000),
    "swiglu_limit": (0.0, 1e6), "swiglu_alpha": (0.0, 1e3), "mscale": (0.0, 1e3), "mscale_all_dim": (0.0, 1e3),
}
_DTYPES = {"float32": "float32", "float": "float32", "float64": "float32", "double": "float32", "bfloat16": "bfloat16",
           "float16": "float16", "half": "float16"}


class Key(NamedTuple):
    """Read a field from config.json. A missing (or null) key gets `default`; `REQUIRED` makes it an error. A null bool is False."""

    name: str
    type: type
    default: Any = REQUIRED


def read(config: Config, key: Key) -> Any:
    """The value of one key of config.json. Raises `ModelError` if it is missing or of another type."""
    value: Any = config.get(key.name)
    if value is None:
        if key.default is REQUIRED:
            if key.name in config:
                raise model_error(f"config.json: {key.name!r} must be of type {key.type.__name__}, got null")
            raise model_error(f"config.json has no {key.name!r}{nearest(key.name, config)}")
        return False if key.type is bool and key.name in config else key.default
    if not isinstance(value, (int, float) if key.type is float else key.type) or (isinstance(value, bool) and key.type is not bool):
        raise model_error(f"config.json: {key.name!r} must be of type {key.type.__name__}, got {shown(value)}")
    return value if key.type not in (int, float) else _within_limits(key, value)


def _within_limits(key: Key, value: Any) -> Any:
    low, high = LIMITS.get(key.name, (-_ANY, _ANY))
    if not low <= value <= high:  # NaN is refused too
        raise model_error(f"config.json: {key.name} must be between {low:.10g} and {high:.10g}, got {shown(value)}")
    return key.type(value)


def check_default(config: Config, key: Key) -> None:
    """Raise `ModelError` if `key` has another value than its default."""
    if (found := read(config, key)) != key.default:
        raise model_error(f"config.json: {key.name} {shown(found)} is not supported, only {shown(key.default)} is")


def only(value: Any, key: Key) -> Callable[[Config], Any]:
    """A field with this value, for models whose config.json leaves `key` at its default. Any other value of it is refused."""
    def read_default(config: Config) -> Any:
        check_default(config, key)
        return value
    return read_default


def nullable(name: str, kind: type, default: Any) -> Callable[[Config], Any]:
    """A key whose explicit null means None. A missing key means `default`."""
    return lambda config: read(config, Key(name, kind, None)) if name in config else default


def num_layers(config: Config) -> int:
    return int(read(config, Key("num_hidden_layers", int)))


def dtype(config: Config) -> str:
    """The dtype of the checkpoint's tensors; float32 for wider ones."""
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    known = _DTYPES.get(name.removeprefix("torch.")) if isinstance(name, str) else None
    if known is None:
        raise model_error(f"config.json: dtype {shown(name)} is not supported; float32, bfloat16 and float16 are")
    return known


def token_ids(file: str, config: Config, name: str, vocab_size: int) -> tuple[list[int], list[int]]:
    """A field with one token id, or a list of them -> (the model's tokens, other ids). As in Transformers, an id outside the vocabulary
    (-1 is common) has no effect. `file` names the source of `config` in messages."""
    value = config.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    wrong = [i for i in ids if type(i) is not int]
    if wrong:
        raise model_error(f"{file}: {name} must be a token id or a list of token ids, got {wrong[0]!r}: correct or remove it")
    return [i for i in ids if 0 <= i < vocab_size], [i for i in ids if not 0 <= i < vocab_size]


# --- heads and activations -----------------------------------------------------------------------------------------


def head_dim(config: Config) -> int:
    """As given, else hidden_size / heads."""
    explicit = read(config, Key("head_dim", int, None))
    if explicit is not None:
        return int(explicit)
    hidden, heads = read(config, Key("hidden_size", int)), read(config, Key("num_attention_heads", int))
    if hidden % heads:
        raise model_error(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and head_dim is missing")
    return int(hidden // heads)


def kv_heads(default: int | None = None) -> Callable[[Config], int]:
    """`num_key_value_heads`; an explicit null means as many as attention heads. default: of a missing key; None: as many too."""
    def read_heads(config: Config) -> int:
        if default is not None and "num_key_value_heads" not in config:
            return default
        return int(read(config, Key("num_key_value_heads", int, read(config, Key("num_attention_heads", int)))))
    return read_heads


# config.json's names of activation functions -> ours
_ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


def activation(key: Key) -> Callable[[Config], str]:
    def read_activation(config: Config) -> str:
        name = read(config, key)
        if name not in _ACTIVATIONS:
            raise model_error(f"config.json: {key.name} {shown(name)} is not supported; supported: {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[name]
    return read_activation


# --- sliding windows -----------------------------------------------------------------------------------------------


def one_window(default: int | None) -> Callable[[Config], int | None]:
    """Every layer has the same window. A missing key means `default`, an explicit null means full attention."""
    def read_window(config: Config) -> int | None:
        window: int | None = read(config, Key("sliding_window", int, None)) if "sliding_window" in config else default
        return window
    return read_window


def window_if_used(config: Config) -> int | None:
    """One window for every layer, if `use_sliding_window` is on."""
    return one_window(4096)(config) if read(config, Key("use_sliding_window", bool, False)) else None


def windows_by_layer(config: Config) -> tuple[int | None, ...]:
    """One window per layer, only with `use_sliding_window`: from `layer_types` if given, else in all layers from `max_window_layers`."""
    window = window_if_used(config)
    types, layers = read(config, Key("layer_types", list, None)), num_layers(config)
    if types is None:
        first = read(config, Key("max_window_layers", int, 28))
        return tuple(window if i >= first else None for i in range(layers))
    _check_types(types, layers)
    if window is None and "sliding_attention" in types:
        raise model_error("config.json: layer_types names sliding_attention, but use_sliding_window is off or sliding_window is null: "
                          "set both, or name full_attention only")
    return tuple(window if t == "sliding_attention" else None for t in types)


def _check_types(types: list[Any], layers: int) -> None:
    if len(types) != layers:
        raise model_error(f"config.json: layer_types has {len(types)} entries, but num_hidden_layers is {layers}")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise model_error(f"config.json: layer type {shown(kind)} is not supported; full_attention and sliding_attention are")


def layer_types(config: Config, pattern: int, key: str | None = "sliding_window_pattern") -> list[str]:
    """`layer_types`, or windows in all layers but each `pattern`-th. key: another number for this; None: Transformers reads none."""
    types, layers = read(config, Key("layer_types", list, None)), num_layers(config)
    if types is None:
        each = read(config, Key(key, int, pattern)) if key is not None else pattern
        return ["sliding_attention" if (i + 1) % each else "full_attention" for i in range(layers)]
    _check_types(types, layers)
    return types


def windows_by_type(
    pattern: int, default: int = 4096, key: str | None = "sliding_window_pattern",
) -> Callable[[Config], list[int | None]]:
    """One window per layer: see `layer_types`. A missing `sliding_window` means `default`, an explicit null full attention everywhere."""
    def read_windows(config: Config) -> list[int | None]:
        window = one_window(default)(config)
        return [window if kind == "sliding_attention" else None for kind in layer_types(config, pattern, key)]
    return read_windows


# --- positions -----------------------------------------------------------------------------------------------------


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """A geometric series from 2^(-8 / n), with n heads (Press et al. 2021). If n is no power of two, the other heads are in between."""
    n = 1 << (heads.bit_length() - 1)
    between = (2.0 ** (-4.0 * i / n) for i in range(1, 2 * (heads - n), 2))
    return (*(2.0 ** (-8.0 * i / n) for i in range(1, n + 1)), *between)


# --- rotary embedding ----------------------------------------------------------------------------------------------


def rope(config: Config, max_len: int, *, head: int, partial: float | None = None, dim: int = 0, interleaved: bool = False,
         theta: float = 10000.0, original: int | None = None, missing: Config | None = None) -> tuple[RopeSpec, int]:
    """-> (rotary embedding, context length with its scaling applied). max_len: `max_position_embeddings`, in tokens. head: head_dim.

    partial: default of `partial_rotary_factor`, the part of a head's dimensions that is rotated; None: only 1 is supported. dim: number of
    these dimensions, for families that state it otherwise. interleaved: see `RopeSpec`. theta: default of `rope_theta`. original: of
    `original_max_position_embeddings`, in tokens. missing: the parameters of a config.json without any.
    Transformers 5 writes all keys into `rope_parameters`. Transformers 4 writes `rope_theta` and an optional `rope_scaling`.
    """
    if missing is not None and not config.get("rope_scaling") and config.get("rope_parameters") is None:
        config = {**config, "rope_parameters": missing}
    if original is not None:
        config = _with_original(config, original)
    spec, length = _rope(config, max_len, head, partial, dim, theta)
    return dataclasses.replace(spec, interleaved=interleaved), length


def _rope(config: Config, max_len: int, head: int, partial: float | None, dim: int, theta: float) -> tuple[RopeSpec, int]:
    params = rope_parameters(config)
    if nested := next((key for key, value in params.items() if isinstance(value, Mapping)), None):
        raise model_error(f"config.json: rope_parameters per layer type ({shown(nested)}) are not supported: this architecture has one set")
    both = {**config, **{key: value for key, value in params.items() if value is not None}}  # a key in both has the inner value
    part = read(both, Key("partial_rotary_factor", float, partial or 1.0))
    if partial not in (None, 1.0) and "partial_rotary_factor" in both and both["partial_rotary_factor"] is None:
        raise model_error("config.json: 'partial_rotary_factor' must be of type float, got null: write the number, or remove the key")
    if part != 1.0:
        dim = int(head * part)
        if partial is None:
            raise model_error(f"config.json: partial_rotary_factor {part} is not supported, only 1.0 is")
        if dim < 2:
            raise model_error(f"config.json: partial_rotary_factor {part} rotates less than two of {head} dimensions")
    theta = read(both, Key("rope_theta", float, theta))
    kind = params.get("rope_type") or params.get("type") or "default"
    if kind in ("su", "yarn") and "short_factor" in params:
        kind = "longrope"  # its names in Phi-3's first files
    length = Key("original_max_position_embeddings", int, None)  # a key in both has the outer value, unlike the others
    original = read(config, length) or read(params, length) or max_len
    if kind == "default":
        return RopeSpec(theta=theta, dim=dim, original_max_len=max_len), max_len
    if kind == "longrope":
        return _longrope(RopeSpec(theta=theta, dim=dim, scaling="longrope", original_max_len=original), params, max_len, head), max_len
    if kind not in ("linear", "dynamic", "llama3", "yarn"):
        raise model_error(f"config.json: rope type {shown(kind)} is not supported; default, linear, dynamic, llama3, yarn and longrope are")
    factor = read(params, Key("factor", float, max_len / original if kind == "yarn" else REQUIRED))
    if kind == "llama3":  # max_position_embeddings is already the length after scaling
        low, high = read(params, Key("low_freq_factor", float)), read(params, Key("high_freq_factor", float))
        if not low < high:
            raise model_error(f"config.json: low_freq_factor {low} must be less than high_freq_factor {high}")
        return RopeSpec(theta=theta, dim=dim, scaling="llama3", factor=factor, original_max_len=original, low_freq_factor=low,
                        high_freq_factor=high), max_len
    if kind == "yarn":  # max_position_embeddings may be the length before or after scaling
        fast, slow = read(params, Key("beta_fast", float, 0.0)) or 32.0, read(params, Key("beta_slow", float, 0.0)) or 1.0
        if theta == 1.0:
            raise model_error("config.json: rope_theta must be above 1 for rope type 'yarn'")
        return RopeSpec(theta=theta, dim=dim, scaling="yarn", factor=factor, original_max_len=original, beta_fast=fast, beta_slow=slow,
                        truncate=read(params, Key("truncate", bool, True)),
                        attention_factor=_yarn_attention_factor(params, factor)), max(max_len, _scaled(original, factor))
    if kind == "dynamic" and (dim or head) == 2:
        raise model_error("config.json: head_dim must be above 2 for rope type 'dynamic'")
    return RopeSpec(theta=theta, dim=dim, scaling="linear" if kind == "linear" else "dynamic", factor=factor,
                    original_max_len=max_len), _scaled(max_len, factor)


def _longrope(spec: RopeSpec, params: Config, max_len: int, head: int) -> RopeSpec:
    """LongRoPE (Ding et al. 2024): two lists of divisors, and sharper attention the more the context is extended."""
    def divisors(name: str) -> tuple[float, ...]:
        values, pairs = read(params, Key(name, list)), (spec.dim or head) // 2
        if len(values) != pairs or not all(type(x) in (int, float) and 0 < x < 1e9 for x in values):
            raise model_error(f"config.json: {name} must be a list of {pairs} positive numbers")
        return tuple(map(float, values))

    factor = read(params, Key("factor", float, max(max_len / spec.original_max_len, 1.0)))
    sharper = math.sqrt(1 + math.log(factor) / math.log(max(spec.original_max_len, 2)))
    return dataclasses.replace(spec, factor=factor, attention_factor=read(params, Key("attention_factor", float, sharper)),
                               short_factors=divisors("short_factor"), long_factors=divisors("long_factor"))


def _with_original(config: Config, default: int) -> Config:
    """config.json with `original_max_position_embeddings` outside of the rotary parameters, where alone Transformers reads it."""
    key = Key("original_max_position_embeddings", int, default)
    if key.name not in config and (inner := read(rope_parameters(config), key)) != default:
        raise model_error(f"config.json: {key.name} {shown(inner)} is inside the rotary parameters, where Transformers does not read "
                          "it for this architecture: write it beside them")
    return {key.name: default, **config}


def rope_parameters(config: Config) -> Config:
    """The parameters of a rotary embedding, or of one for each layer type. Raises `ModelError` if they are no object."""
    return read(config, Key("rope_scaling", dict, {})) or read(config, Key("rope_parameters", dict, {}))


def rope_by_type(config: Config, kind: str, base: Key) -> Config:
    """config.json with the rotary parameters of one layer type. base: the key and the default of its `rope_theta`.

    Transformers 5 writes `rope_parameters` with one set for each layer type. Transformers 4 wrote `rope_scaling`, for layers with full
    attention only."""
    both, scaling = read(config, Key("rope_parameters", dict, {})), read(config, Key("rope_scaling", dict, {}))
    if both and not any(isinstance(params, Mapping) for params in both.values()):
        raise model_error("config.json: rope_parameters must have one set of parameters for full_attention and one for sliding_attention")
    params = {**read(both, Key(kind, dict, {})), **(scaling if kind == "full_attention" else {})}
    return {**config, "rope_scaling": None, "rope_parameters": params, "rope_theta": read(config, base)}


def _scaled(length: int, factor: float) -> int:
    """The context length after scaling."""
    if length * factor > _ANY:
        raise model_error(f"config.json: a context of {length} tokens with the rope factor {factor:g} is longer than {_ANY} tokens")
    return int(length * factor)


def _yarn_attention_factor(params: Config, factor: float) -> float:
    """YaRN (Peng et al. 2023, section 3.4) sharpens attention: slightly, and more for a larger factor."""
    explicit = read(params, Key("attention_factor", float, None))
    if explicit is not None:
        return float(explicit)

    def sharpening(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    mscale, all_dim = read(params, Key("mscale", float, 0.0)), read(params, Key("mscale_all_dim", float, 0.0))
    return sharpening(mscale) / sharpening(all_dim) if mscale and all_dim else sharpening(1.0)
