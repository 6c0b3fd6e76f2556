"""What is known of a decoder that has no row in the families' table: its code in Transformers is run once, without memory.

    config.json ─▶ Transformers' config ─▶ the model on the meta device ── one forward pass ──▶ ForeignSpec
                                            no memory                      each layer's heads, window, scale, as its attention gets them
"""
from __future__ import annotations

import copy
import functools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minivllm.config import EngineConfig
from minivllm.errors import ModelError, NotSupportedYet, shown
from minivllm.families import FAMILIES, AttentionSpec, LayerSpec, MLPSpec, ModelSpec, parse_config
from minivllm.families.config_json import dtype as dtype_name
from minivllm.families.spec import model_error
from minivllm.models.remote_code import FOLDER, announce_unused, load_class, references
from minivllm.models.transformers_interface import NAME, LayerMask, Unsupported, head_of, register, row

ROPE_BY_LENGTH = ("dynamic", "longrope")  # kinds of rotary embedding whose frequencies depend on the longest position of a batch


class ForeignLayer(NamedTuple):
    """One call of the attention interface."""

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None
    scale: float
    softcap: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignSpec(ModelSpec):
    """A model that runs in Transformers' code. Of its MLPs, norms and checkpoint names it knows nothing: the fields hold placeholders."""

    config: Any = field(repr=False, hash=False, compare=False)  # Transformers' configuration
    model_class: Any = field(repr=False, hash=False, compare=False)  # of Transformers, or of the model's folder


def read_spec(config: EngineConfig, found: Mapping[str, Any], methods: Mapping[str, object]) -> ModelSpec:
    """The model that config.json describes: of the table, or run by Transformers, as `model_impl` says.

    Raises `ModelError` if neither runs it, and `NotSupportedYet` for settings that Transformers' code does not work with."""
    own = references(found, "AutoModelForCausalLM")  # in the model's folder
    names = found.get("architectures") or [reference.rpartition(".")[2] for reference in own]
    in_table = any(name in FAMILIES for name in names if isinstance(name, str)) or not names
    if config.trust_remote_code and own and (in_table or any(isinstance(name, str) and _known(name) for name in names)):
        announce_unused(shown(names[0]), shown(own[0]))
    if config.model_impl in ("minivllm", "vllm") or (config.model_impl == "auto" and in_table) or found.get("quantization_config"):
        spec = parse_config(found, methods=methods)  # names a quantization method that it does not know
        if config.model_impl != "transformers":
            return spec
        raise NotSupportedYet("model_impl 'transformers' does not load quantized weights yet: use the unquantized checkpoint", "model_impl")
    first = names[0] if names and isinstance(names[0], str) else None
    if first is None:
        raise model_error("config.json names no model class under 'architectures': add it, for model_impl 'transformers'")
    code = None
    if not _known(first) and own:
        code = _trusted_folder(config, found, first)
    elif not _known(first):
        parse_config(found, methods=methods)  # says which architectures have a row
        raise model_error(f"the architecture {first} has no causal language model in Transformers: leave model_impl out")
    for name, value, usual in (("quantization", config.quantization, None), ("enable_lora", config.enable_lora, False),
                               ("tensor_parallel_size", config.tensor_parallel_size, 1), ("cpu_offload_gb", config.cpu_offload_gb, 0)):
        if value != usual:
            raise NotSupportedYet(f"{name} {value!r} does not work with {first}, which runs in Transformers' code: leave it out", name)
    if config.speculation is not None and config.speculation.method != "ngram":
        raise NotSupportedYet(f"speculative_config: {first} runs in Transformers' code, which works with method ngram only",
                              "speculative_config")
    spec = describe(first, json.dumps(found, sort_keys=True), code)
    length = config.max_model_len or spec.max_model_len
    for one in _ropes(spec.config):
        kept = one.get("original_max_position_embeddings") or spec.max_model_len
        if one.get("rope_type") in ROPE_BY_LENGTH and length > kept:
            raise NotSupportedYet(f"Transformers' code changes the rotary frequencies of {first} ({one['rope_type']}) with the longest "
                                  f"sequence of a batch: set max_model_len to at most {kept}", "max_model_len")
    return spec


def _trusted_folder(config: EngineConfig, found: Mapping[str, Any], architecture: str) -> Path:
    """The folder whose code may run. Raises `ModelError` without `trust_remote_code`."""
    if not config.trust_remote_code:
        raise ModelError(f"the architecture {architecture} exists only as Python code in the model's folder (auto_map), which is not run: "
                         "read that code, and set trust_remote_code (--trust-remote-code) if you trust it", "trust_remote_code")
    return Path(found[FOLDER])


def _ropes(config: Any) -> Iterator[dict[str, Any]]:
    """The parameters of each rotary embedding."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    yield from (one for one in (rope, *rope.values()) if isinstance(one, dict))


def _known(architecture: str) -> bool:
    """Whether Transformers has this model class."""
    import transformers

    return isinstance(getattr(transformers, architecture, None), type)


@functools.lru_cache(maxsize=8)
def describe(architecture: str, config_json: str, code: Path | None = None) -> ForeignSpec:
    """The specification of a model, from one forward pass of it without memory. Raises `ModelError` with the reason if it cannot run.

    code: the trusted folder with the code of the architecture; None: Transformers has it."""
    config = _config(architecture, json.loads(config_json), code)
    try:
        cls = model_class(architecture, config, json.loads(config_json), code)
        layers, vocabulary, parameters = probe(cls, config)
        if len(sizes := {2 * x.num_kv_heads * x.head_dim for x in layers}) > 1:
            raise Unsupported(f"its layers have KV pages of different sizes ({sorted(sizes)} numbers a token)")
    except Unsupported as reason:
        raise model_error(f"the architecture {architecture} is not supported: {reason}") from None
    except AttributeError as error:
        raise model_error(f"the architecture {architecture} is not supported: {line_of(error)}") from error
    text = config.get_text_config()
    width, length = int(text.hidden_size), getattr(text, "max_position_embeddings", None)
    if not isinstance(length, int):
        raise model_error(f"config.json of {architecture} has no max_position_embeddings: add it, the longest sequence in tokens")
    return ForeignSpec(
        architecture=architecture, vocab_size=vocabulary, hidden_size=width, max_model_len=length,
        dtype=dtype_name(json.loads(config_json)),
        tied=bool(text.tie_word_embeddings), norm="rms", norm_eps=1e-6, norm_affine=True, final_norm=True, learned_positions=0,
        position_offset=0, embed_size=width, names={}, parameters=parameters, config=config, model_class=cls,
        layers=layer_specs(layers, width))


def layer_specs(layers: Sequence[ForeignLayer], width: int) -> tuple[LayerSpec, ...]:
    mlp = MLPSpec(intermediate_size=4 * width, gated=False, activation="gelu", bias=False)
    return tuple(LayerSpec(mlp=mlp, block="pre", attention=AttentionSpec(
        num_heads=x.num_heads, num_kv_heads=x.num_kv_heads, head_dim=x.head_dim, window=x.window, rope=None, qk_norm=None, qkv_bias=False,
        out_bias=False, multiplier=x.scale, softcap=x.softcap)) for x in layers)


def _config(architecture: str, found: Mapping[str, Any], code: Path | None) -> Any:
    from transformers import CONFIG_MAPPING

    kind = found.get("model_type")
    own = references(found, "AutoConfig") if code is not None else []
    if not own and kind not in CONFIG_MAPPING:
        raise model_error(f"config.json: model_type {shown(kind)} of {architecture} is not one of Transformers'")
    cls = load_class(code, own[0]) if code is not None and own else CONFIG_MAPPING[kind]
    try:
        return cls.from_dict(dict(found))
    except Exception as error:  # each configuration class checks its values in another way
        raise model_error(f"config.json is not one of {architecture}: {line_of(error)}") from error


def line_of(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def probe(cls: Any, config: Any) -> tuple[list[ForeignLayer], int, int]:
    """-> (every layer's attention, rows of the output head, number of weights). Raises `Unsupported`."""
    config = copy.deepcopy(config)
    for rope in _ropes(config):
        if rope.get("rope_type") in ROPE_BY_LENGTH:  # they read positions, which have no values here
            rope["rope_type"] = "default"
    register()
    with torch.device("meta"):
        try:
            model = cls._from_config(config, attn_implementation=NAME, dtype=torch.bfloat16).eval()
        except Exception as error:
            raise Unsupported(f"Transformers cannot build it ({line_of(error)})") from error
        base = getattr(model, model.base_model_prefix, None)
        if not isinstance(base, nn.Module):
            raise Unsupported("its output head is not separate from its decoder")
        if layer := next((m for m in model.modules() if isinstance(m, nn.Conv1d)), None):
            raise Unsupported(f"its {type(layer).__name__} layers mix neighboring tokens and keep them beside the KV cache")
        seen, few = _Probe(), torch.zeros(3, dtype=torch.int64)
        try:
            with torch.inference_mode():
                base(**row(few, few, seen))
                vocabulary = head_of(model)(inputs_embeds=torch.zeros((1, 1, config.get_text_config().hidden_size), dtype=torch.bfloat16),
                                          use_cache=False).logits.shape[-1]
        except Unsupported:
            raise
        except Exception as error:
            if LayerMask.__name__ in str(error):
                raise Unsupported("its code computes with the attention mask, and not only through Transformers' "
                                   "AttentionInterface") from error
            raise Unsupported(f"its code does not run on one row of several sequences ({line_of(error)})") from error
    number = config.get_text_config().num_hidden_layers
    if not seen.layers:
        raise Unsupported("its attention does not go through Transformers' AttentionInterface")
    if [x.layer for x in seen.layers] != list(range(number)):
        raise Unsupported(f"its {number} layers call attention {len(seen.layers)} times, and a KV cache needs one call per layer")
    sizes = {id(p): p.numel() for p in model.parameters()}
    return seen.layers, vocabulary, sum(sizes.values())


def model_class(architecture: str, config: Any, found: Mapping[str, Any], code: Path | None) -> Any:
    """The model class. Raises `Unsupported` for one of which its class or configuration says that it cannot run here.

    found: config.json, which names the class in the folder `code`."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    cls = getattr(transformers, architecture) if code is None else load_class(code, references(found, "AutoModelForCausalLM")[0])
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise Unsupported("its class is not one of Transformers' models")
    if getattr(config, "is_encoder_decoder", False):
        raise Unsupported("it is an encoder-decoder, and this engine runs decoders")
    if getattr(cls, "_is_stateful", False) or {"mamba", "conv", "recurrent", "linear_attention"} & set(_layer_types(config)):
        raise Unsupported("it has state-space, linear-attention or convolution layers, whose state is not in the KV cache")
    if any(getattr(config, f"{kind}_config", None) is not None for kind in ("vision", "audio", "text")):
        raise Unsupported("it is multimodal, and this engine takes text only")
    if sparse := [name for name in config.get_text_config().to_dict() if name.startswith("index_topk")]:
        raise Unsupported(f"its attention is sparse ({sparse[0]})")
    if code is None and architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise Unsupported("Transformers does not list it as a causal language model")
    return cls


def _layer_types(config: Any) -> Collection[str]:
    """The kinds of the layers, as far as config.json names them."""
    found = [getattr(config, name, None) or () for name in ("layer_types", "layers_block_type", "block_types")]
    return {kind for kinds in found for kind in kinds if isinstance(kind, str)}


class _Probe:
    """A step that notes what each layer's attention gets."""

    def __init__(self) -> None:
        self.layers: list[ForeignLayer] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: LayerMask, scale: float, softcap: float | None,
               others: Mapping[str, Any]) -> Tensor:
        """See `Step`. Raises `Unsupported` for attention that the paged kernels do not compute."""
        sinks = others.get("s_aux")
        known = {"position_ids", "cache_position", *(("s_aux",) if sinks is not None and sinks.shape == q.shape[1:2] else ())}
        names = [name for name, value in others.items() if isinstance(value, Tensor) and name not in known]
        if names:
            raise Unsupported(f"its attention takes {', '.join(names)}, which the paged kernels do not")
        if others.get("is_causal") is False or not _sees(mask, 5, 5) or _sees(mask, 5, 6):
            raise Unsupported("its attention is not causal")
        window = others.get("sliding_window")
        if mask.window is None and window is not None:
            raise Unsupported(f"its layer {layer} has a window of {window} that is not in its mask")
        last = 2 * (mask.window or 0) - 1  # of a window's width after the first key that a chunk of this size would hide
        if mask.window is not None and (not _sees(mask, last, mask.window) or _sees(mask, last, mask.window - 1)
                                        or not _sees(mask, mask.window, mask.window - 1)):
            raise Unsupported(f"its attention is local in chunks of {mask.window} tokens")
        heads, width = q.shape[1], q.shape[-1]
        if k.shape[-1] != width or v.shape[-1] > width or k.shape[1] != v.shape[1] or heads % k.shape[1]:
            raise Unsupported(f"the shapes of its queries {list(q.shape)}, keys {list(k.shape)} and values {list(v.shape)} do not fit")
        self.layers.append(ForeignLayer(layer, heads, k.shape[1], width, v.shape[-1], mask.window, scale, softcap))
        return v.new_empty((1, q.shape[2], heads, v.shape[-1]))


def _sees(mask: LayerMask, query: int, key: int) -> bool:
    zero, place = torch.zeros((), dtype=torch.int64, device="cpu"), functools.partial(torch.tensor, device="cpu")
    return bool(mask.visible(zero, zero, place(query), place(key)))
