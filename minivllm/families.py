"""Model families as a table of flags, and what follows from a row: every parameter's shape, shard and checkpoint name.

There is one decoder (`models/decoder.py`). What makes a Qwen3 of it is a row here:

    config.json --parse_config: the row of its architecture--> ModelSpec --parameters--> our name -> shape, checkpoint tensors
                                                                         --kv_groups---> which layers share a block table

A row gives each field of `ModelSpec` a value, or the `Key` of config.json to read it from, or a function of config.json, so
the next family is a few lines (docs/adding_a_model.md). This file never imports torch: the loader, the layers and the
planner read it, and the planner must run where no model could.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from minivllm.errors import ModelError, NotSupportedYet, nearest

Config: TypeAlias = Mapping[str, Any]  # a parsed config.json


_SIZES = (
    "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "max_model_len", "embed_size",
)


def _error(message: str) -> ModelError:
    return ModelError(message, "model")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding: the base, and how its frequencies are stretched for contexts longer than trained on."""

    theta: float = 10000.0
    scaling: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_len: int = 0  # context length before stretching
    low_freq_factor: float = 1.0  # llama3: wavelengths above original / low are stretched by `factor` ...
    high_freq_factor: float = 4.0  # ... those below original / high not at all, those in between partly
    beta_fast: float = 32.0  # yarn: dimensions that turn more often than this over the original length are kept ...
    beta_slow: float = 1.0  # ... those that turn less often than this are stretched by `factor`
    truncate: bool = True  # yarn: round these two borders outwards to whole dimensions
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by it


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model's architecture. Valid once constructed."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_model_len: int  # the model's own limit; dataclasses.replace() it by the length that is served
    dtype: str  # of the checkpoint: float32, bfloat16 or float16
    tied: bool  # the output head is the embedding table
    norm: Literal["rms", "layer"]
    norm_eps: float
    norm_affine: bool  # norms have weights
    norm_first: bool  # x + f(norm(x)); False: norm(x + f(x)), the older order
    final_norm: bool
    mlp: Literal["gated", "plain"]  # down(act(gate(x)) * up(x)), or down(act(up(x)))
    activation: str  # a key of ACTIVATIONS
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over each head of q and k, before the rotation
    rope: RopeSpec | None
    learned_positions: int  # positions in the learned table; 0: there is no table
    position_offset: int  # row of position 0 in that table
    embed_size: int  # width of the embedding table; projected in and out if it is not hidden_size
    windows: tuple[int | None, ...]  # [num_layers] keys a query sees, its own included; None: all
    names: Mapping[str, tuple[str, ...]] = dataclasses.field(repr=False, hash=False)  # module -> checkpoint modules

    def __post_init__(self) -> None:
        for name in _SIZES:
            self._require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        self._require(self.num_heads % self.num_kv_heads == 0,
                      f"{self.num_heads} heads cannot share {self.num_kv_heads} key-value heads evenly")
        self._require(self.rope is None or self.head_dim % 2 == 0, f"a rotary head_dim must be even, got {self.head_dim}")
        self._require(self.activation in ACTIVATIONS.values(), f"activation {self.activation!r} is not supported")
        self._require(self.mlp == "plain" or self.activation == "silu",
                      f"a gated MLP with activation {self.activation!r} is not supported, only with 'silu'")
        self._require(not self.learned_positions or self.max_model_len <= self.learned_positions,
                      f"max_model_len {self.max_model_len} exceeds the {self.learned_positions} learned positions; lower it")
        self._require(all(w is None or w >= 1 for w in self.windows), f"a sliding window must be at least 1, got {self.windows}")
        self._require(len(self.windows) == self.num_layers, f"{len(self.windows)} layer types for {self.num_layers} layers")

    def _require(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise _error(f"{self.architecture}: {otherwise}")

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """Read a field from config.json. A missing (or null) key gets `default`; `REQUIRED` makes it an error."""

    name: str
    type: type
    default: Any = ...


REQUIRED = ...
# config.json's names of activation functions -> ours
ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}


class Family(NamedTuple):
    """A row: where each field of ModelSpec comes from, and how checkpoints name the modules ({i}: layer number)."""

    fields: Mapping[str, Any]
    names: Mapping[str, tuple[str, ...]]


def read(config: Config, key: Key) -> Any:
    """The value of one key of config.json, checked for its type."""
    value = config.get(key.name)
    if value is None:
        if key.default is REQUIRED:
            raise _error(f"config.json has no {key.name!r}{nearest(key.name, config)}")
        return key.default
    if key.type is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, key.type) or (isinstance(value, bool) and key.type is not bool):
        raise _error(f"config.json: {key.name!r} must be of type {key.type.__name__}, got {value!r}")
    return value


def _head_dim(config: Config) -> int:
    """hidden_size / heads unless the configuration says otherwise."""
    explicit = read(config, Key("head_dim", int, None))
    if explicit is not None:
        return int(explicit)
    hidden, heads = read(config, Key("hidden_size", int)), read(config, Key("num_attention_heads", int))
    if heads < 1 or hidden % heads:
        raise _error(f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}, and head_dim is missing")
    return int(hidden // heads)


def _kv_heads(config: Config) -> int:
    return int(read(config, Key("num_key_value_heads", int, read(config, Key("num_attention_heads", int)))))


def _activation(key: Key) -> Callable[[Config], str]:
    def activation(config: Config) -> str:
        name = read(config, key)
        if name not in ACTIVATIONS:
            raise _error(f"config.json: {key.name} {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]
    return activation


def no_windows(config: Config) -> tuple[int | None, ...]:
    return (None,) * int(read(config, Key("num_hidden_layers", int)))


def one_window(default: int | None) -> Callable[[Config], tuple[int | None, ...]]:
    """Mistral: every layer has the same window. A missing key means the default, an explicit null no window."""
    def windows(config: Config) -> tuple[int | None, ...]:
        window = read(config, Key("sliding_window", int, None)) if "sliding_window" in config else default
        return (window,) * int(read(config, Key("num_hidden_layers", int)))
    return windows


def windows_by_layer(config: Config) -> tuple[int | None, ...]:
    """Qwen2 and Qwen3: `layer_types` if given, otherwise the layers from `max_window_layers` on; only if switched on."""
    layers = read(config, Key("num_hidden_layers", int))
    on = read(config, Key("use_sliding_window", bool, False))
    window = read(config, Key("sliding_window", int, None)) if on and "sliding_window" in config else (4096 if on else None)
    types = read(config, Key("layer_types", list, None))
    if types is None:
        first = read(config, Key("max_window_layers", int, 28))
        return tuple(window if i >= first else None for i in range(layers))
    unknown = sorted({str(t) for t in types} - {"full_attention", "sliding_attention"})
    if unknown:
        raise _error(f"config.json: layer type {unknown[0]!r} is not supported; full_attention and sliding_attention are")
    if window is None and "sliding_attention" in types:
        raise _error("config.json: layer_types names sliding_attention, but use_sliding_window is off or sliding_window is null")
    return tuple(window if t == "sliding_attention" else None for t in types)


LLAMA = Family(
    fields={
        "vocab_size": Key("vocab_size", int),
        "hidden_size": Key("hidden_size", int),
        "num_layers": Key("num_hidden_layers", int),
        "num_heads": Key("num_attention_heads", int),
        "num_kv_heads": _kv_heads,
        "head_dim": _head_dim,
        "intermediate_size": Key("intermediate_size", int),
        "max_model_len": Key("max_position_embeddings", int, 2048),
        "tied": Key("tie_word_embeddings", bool, False),
        "norm": "rms",
        "norm_eps": Key("rms_norm_eps", float, 1e-6),
        "norm_affine": True,
        "norm_first": True,
        "final_norm": True,
        "mlp": "gated",
        "activation": _activation(Key("hidden_act", str, "silu")),
        "qkv_bias": Key("attention_bias", bool, False),
        "out_bias": Key("attention_bias", bool, False),
        "mlp_bias": Key("mlp_bias", bool, False),
        "qk_norm": False,
        "learned_positions": 0,
        "position_offset": 0,
        "embed_size": Key("hidden_size", int),
        "windows": no_windows,
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
NO_BIAS = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}
MISTRAL = Family({
    **LLAMA.fields, **NO_BIAS, "max_model_len": Key("max_position_embeddings", int, 131072), "windows": one_window(4096),
}, LLAMA.names)
QWEN2 = Family({
    **LLAMA.fields, **NO_BIAS, "qkv_bias": True, "max_model_len": Key("max_position_embeddings", int, 32768), "windows": windows_by_layer,
}, LLAMA.names)
QWEN3 = Family({
    **QWEN2.fields, "qkv_bias": Key("attention_bias", bool, False), "out_bias": Key("attention_bias", bool, False), "qk_norm": True,
    "head_dim": Key("head_dim", int, 128),
}, LLAMA.names)
OPT = Family(
    fields={
        **LLAMA.fields,
        "num_kv_heads": Key("num_attention_heads", int),
        "intermediate_size": Key("ffn_dim", int),
        "tied": Key("tie_word_embeddings", bool, True),
        "norm": "layer",
        "norm_eps": 1e-5,
        "norm_affine": Key("layer_norm_elementwise_affine", bool, True),
        "norm_first": Key("do_layer_norm_before", bool, True),
        "final_norm": lambda config: bool(config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False)),
        "mlp": "plain",
        "activation": _activation(Key("activation_function", str, "relu")),
        "qkv_bias": Key("enable_bias", bool, True),
        "out_bias": Key("enable_bias", bool, True),
        "mlp_bias": Key("enable_bias", bool, True),
        "rope": None,
        "learned_positions": Key("max_position_embeddings", int, 2048),
        "position_offset": 2,  # the table's first two rows were padding's; nothing reads them
        "embed_size": lambda config: read(config, Key("word_embed_proj_dim", int, read(config, Key("hidden_size", int)))),
    },
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
FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "OPTForCausalLM": OPT,
}


# ---------------------------------------------------------------------------------------------------------------------
# config.json -> ModelSpec
# ---------------------------------------------------------------------------------------------------------------------


def parse_config(config: Config, families: Mapping[str, Family] = FAMILIES) -> ModelSpec:
    """The architecture a parsed config.json describes (Transformers 4 and 5 name some keys differently; both are read)."""
    architecture = _architecture(config, families)
    if quantization := read(config, Key("quantization_config", dict, {})):
        method = quantization.get("quant_method", "of an unknown kind")
        raise NotSupportedYet(f"quantized weights ({method}) are not supported yet: use the model's unquantized checkpoint", "model")
    row = families[architecture]
    fields: dict[str, Any] = {}
    for name, source in row.fields.items():
        fields[name] = read(config, source) if isinstance(source, Key) else source(config) if callable(source) else source
    if "rope" not in fields:
        fields["rope"], fields["max_model_len"] = _rope(config, fields["max_model_len"])
    return ModelSpec(architecture=architecture, dtype=_dtype(config), names=row.names, **fields)


def _architecture(config: Config, families: Mapping[str, Family]) -> str:
    named = config.get("architectures")
    if not isinstance(named, list) or not named:
        raise _error(f"config.json names no model class under 'architectures'; supported: {', '.join(families)}")
    for name in named:
        if name in families:
            return str(name)
    raise _error(f"the architecture {named[0]} is not supported; supported: {', '.join(families)}")


def _dtype(config: Config) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise _error(f"config.json: dtype {name!r} is not supported; float32, bfloat16 and float16 are")
    return name


def _rope(config: Config, max_len: int) -> tuple[RopeSpec, int]:
    """-> (rotary embedding, context length with its scaling applied).

    Transformers 5 writes everything into `rope_parameters`; 4 writes `rope_theta` beside an optional `rope_scaling`.
    """
    params = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(params, Mapping) or any(isinstance(v, Mapping) for v in params.values()):
        raise _error("config.json: rotary parameters per layer type are not supported")
    both = {**config, **{key: value for key, value in params.items() if value is not None}}  # the inner place wins
    partial = read(both, Key("partial_rotary_factor", float, 1.0))
    if partial != 1.0:
        raise _error(f"config.json: partial_rotary_factor {partial} is not supported, only 1.0 is")
    theta = read(both, Key("rope_theta", float, 10000.0))
    kind = params.get("rope_type") or params.get("type") or "default"
    original = read(both, Key("original_max_position_embeddings", int, max_len))
    if original < 1 or not 0.0 < theta < math.inf:
        raise _error(f"config.json: rope_theta {theta} and the original context length {original} must be positive")
    if kind == "default":
        return RopeSpec(theta=theta, original_max_len=max_len), max_len
    if kind not in ("linear", "dynamic", "llama3", "yarn"):
        raise _error(f"config.json: rope type {kind!r} is not supported; default, linear, dynamic, llama3 and yarn are")
    factor = read(params, Key("factor", float, max_len / original if kind == "yarn" else REQUIRED))
    if not 1.0 <= factor < math.inf:
        raise _error(f"config.json: the rope factor must be at least 1, got {factor}")
    if kind == "llama3":  # max_position_embeddings is the stretched length already
        low, high = read(params, Key("low_freq_factor", float)), read(params, Key("high_freq_factor", float))
        if not low < high:
            raise _error(f"config.json: low_freq_factor {low} must be less than high_freq_factor {high}")
        return RopeSpec(theta=theta, scaling="llama3", factor=factor, original_max_len=original, low_freq_factor=low,
                        high_freq_factor=high), max_len
    if kind == "yarn":  # max_position_embeddings may be either length
        fast, slow = read(params, Key("beta_fast", float, 0.0)) or 32.0, read(params, Key("beta_slow", float, 0.0)) or 1.0
        return RopeSpec(theta=theta, scaling="yarn", factor=factor, original_max_len=original, beta_fast=fast, beta_slow=slow,
                        truncate=read(params, Key("truncate", bool, True)),
                        attention_factor=_yarn_attention_factor(params, factor)), max(max_len, int(original * factor))
    return RopeSpec(theta=theta, scaling="linear" if kind == "linear" else "dynamic", factor=factor,
                    original_max_len=max_len), int(max_len * factor)


def _yarn_attention_factor(params: Config, factor: float) -> float:
    """YaRN (Peng et al. 2023, section 3.4) sharpens attention a little, the more the longer the stretch."""
    explicit = read(params, Key("attention_factor", float, None))
    if explicit is not None:
        return float(explicit)

    def sharpening(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    mscale, all_dim = read(params, Key("mscale", float, 0.0)), read(params, Key("mscale_all_dim", float, 0.0))
    return sharpening(mscale) / sharpening(all_dim) if mscale and all_dim else sharpening(1.0)


# ---------------------------------------------------------------------------------------------------------------------
# ModelSpec -> parameters
# ---------------------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """One tensor of a checkpoint, named without the prefix ("model." and the like) that varies between exporters."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One of our parameters: one checkpoint tensor, or several stacked along their rows.

    qkv.weight [q + 2 kv rows, hidden]     |   q_proj   | k_proj | v_proj |   read once, multiplied in one product
    """

    shape: tuple[int, ...]
    kind: Literal["matrix", "table", "bias", "scale"]  # table: looked up by row; scale: a norm's weight
    sources: tuple[Source, ...]
    shard_dim: int | None = None  # split over tensor-parallel ranks along this dimension (of each source); None: replicated


def parameters(spec: ModelSpec) -> dict[str, ParamSpec]:
    """Every parameter of the model under our own name, e.g. `layers.3.qkv.weight`."""
    out: dict[str, ParamSpec] = {}

    def add(module: str, kind: Literal["matrix", "table", "bias", "scale"], rows: tuple[int, ...], rest: tuple[int, ...] = (),
            shard: int | None = None, layer: int | None = None) -> None:
        suffix = "bias" if kind == "bias" else "weight"
        names = [f"{name.format(i=layer)}.{suffix}" for name in spec.names[module]]
        if len(names) == 1:  # the checkpoint has the parts fused already, or there is only one
            sources: tuple[Source, ...] = (Source(names[0], (sum(rows), *rest)),)
        else:
            sources = tuple(Source(name, (n, *rest)) for name, n in zip(names, rows, strict=True))
        ours = f"{module}.{suffix}" if layer is None else f"layers.{layer}.{module}.{suffix}"
        out[ours] = ParamSpec((sum(rows), *rest), kind, sources, shard)

    def linear(module: str, rows: tuple[int, ...], cols: int, bias: bool, shard: int | None, layer: int | None = None) -> None:
        add(module, "matrix", rows, (cols,), shard, layer)
        if bias:  # split with the rows; a matrix split along its columns adds its bias once, after the sum
            add(module, "bias", rows, (), 0 if shard == 0 else None, layer)

    def norm(module: str, layer: int | None = None) -> None:
        if spec.norm_affine:
            add(module, "scale", (spec.hidden_size,), layer=layer)
            if spec.norm == "layer":
                add(module, "bias", (spec.hidden_size,), layer=layer)

    hidden, inner = spec.hidden_size, spec.intermediate_size
    add("embed", "table", (spec.vocab_size,), (spec.embed_size,), shard=0)
    if spec.learned_positions:
        add("positions", "table", (spec.learned_positions + spec.position_offset,), (hidden,))
    if spec.embed_size != hidden:
        linear("project_in", (hidden,), spec.embed_size, bias=False, shard=None)
    for i in range(spec.num_layers):
        norm("attn_norm", i)
        linear("qkv", (spec.q_size, spec.kv_size, spec.kv_size), hidden, spec.qkv_bias, 0, i)
        if spec.qk_norm:
            add("q_norm", "scale", (spec.head_dim,), layer=i)
            add("k_norm", "scale", (spec.head_dim,), layer=i)
        linear("o", (hidden,), spec.q_size, spec.out_bias, 1, i)
        norm("mlp_norm", i)
        if spec.mlp == "gated":
            linear("gate_up", (inner, inner), hidden, spec.mlp_bias, 0, i)
        else:
            linear("up", (inner,), hidden, spec.mlp_bias, 0, i)
        linear("down", (hidden,), inner, spec.mlp_bias, 1, i)
    if spec.final_norm:
        norm("norm")
    if spec.embed_size != hidden:
        linear("project_out", (spec.embed_size,), hidden, bias=False, shard=None)
    if not spec.tied:
        add("head", "matrix", (spec.vocab_size,), (spec.embed_size,), shard=0)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# ModelSpec -> KV groups
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KVSpec:
    """Layers that share one block table: tensor j of the KV cache holds layer layers[j] of every group.

    6 layers, every third with full attention:     tensor     0   1
                                         group 0 (window)     0   1        a physical block belongs to one group at a time;
                                         group 1 (window)     3   4        all groups have the same tensors, so any block
                                         group 2 (full)       2   5        can serve any group
    """

    kind: Literal["full", "window"]
    kv_heads: int
    head_dim: int
    window: int | None
    layers: tuple[int, ...]


def kv_groups(spec: ModelSpec) -> tuple[KVSpec, ...]:
    """Group the layers by window, into groups of (nearly) equal size so that few of the cache's tensors stay unused."""
    layers_of: dict[int | None, list[int]] = {}
    for i, window in enumerate(spec.windows):
        # A window that no sequence outgrows is none: its blocks would never be freed early.
        layers_of.setdefault(None if window is None or window >= spec.max_model_len else window, []).append(i)
    counts = [len(layers) for layers in layers_of.values()]

    def unused(size: int) -> int:  # places for layers that do not exist
        return sum(-n % size for n in counts)

    # The largest size that leaves at most an eighth unused: every group costs a block table and a gather per step.
    size = max(s for s in range(1, max(counts) + 1) if unused(s) * 8 <= spec.num_layers)
    return tuple(
        KVSpec("full" if window is None else "window", spec.num_kv_heads, spec.head_dim, window, tuple(layers[at : at + size]))
        for window, layers in layers_of.items()
        for at in range(0, len(layers), size)
    )


def num_kv_tensors(groups: tuple[KVSpec, ...]) -> int:
    """Key (and value) tensors of the cache: the layers of the largest group."""
    return max(len(group.layers) for group in groups)
