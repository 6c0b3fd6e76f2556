"""Decoders that have no row in the families' table: Transformers' modeling code around this engine's paged attention.

    config.json ─▶ Transformers' config ─▶ the model on the meta device ── one forward pass ──▶ ForeignSpec
                                            no memory                      each layer's heads, window, scale, as its attention gets them
    InputBatch ─▶ one row of T tokens ─▶ Transformers' layers ─▶ AttentionInterface ─▶ `attend`: stores keys and values, paged attention

A step's cache and metadata travel in the attention mask, the one argument that every model passes down to its attention: the mask that
goes in carries the step, Transformers builds each layer's mask from it with `_mask`, and what arrives in `attend` is a `LayerMask`.
"""
from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from minivllm.config import EngineConfig
from minivllm.errors import ModelError, NotSupportedYet, shown
from minivllm.families import FAMILIES, AttentionSpec, LayerSpec, MLPSpec, ModelSpec, kv_groups, parse_config
from minivllm.families.config_json import dtype as dtype_name
from minivllm.families.spec import model_error
from minivllm.kernels import REFERENCE
from minivllm.kernels.layout import InputBatch, KVLayer
from minivllm.layers.build import BuildContext

NAME = "minivllm"  # of this engine's attention in Transformers' interfaces
CHECK_PARAMETERS = 100_000_000  # the self-check is skipped for a model that stays larger than this
CHECK_TOLERANCE = 1e-3  # of the largest logit
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


class Step(Protocol):
    """What happens in one layer's attention."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: LayerMask, scale: float, softcap: float | None,
               others: Mapping[str, Any]) -> Tensor:
        """q: [1, H, T, D], k, v: [1, KV, T, D or the values' own] -> [1, T, H, dimension of a value]."""


@dataclass(frozen=True, slots=True)
class LayerMask:
    """Stands where the mask of a layer would: the step, and which keys a query sees."""

    step: Step
    window: int | None
    visible: Any  # (batch, head, query, key) -> whether this query sees this key, as 0-dimensional tensors


class _Unsupported(Exception):
    """Why a model cannot run here, as the end of a sentence."""


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, scaling: float | None = None,
           softcap: float | None = None, **others: Any) -> tuple[Tensor, None]:
    """This engine's attention, with the signature of Transformers' AttentionInterface."""
    if not isinstance(attention_mask, LayerMask):
        raise _Unsupported("its attention does not get the mask that Transformers' AttentionMaskInterface makes")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise _Unsupported(f"its {type(module).__name__} has no layer_idx")
    return attention_mask.step.attend(layer, query, key, value, attention_mask, scale, softcap, others), None


def _mask(*, attention_mask: Any = None, local_size: int | None = None, mask_function: Any = None, **_: Any) -> LayerMask:
    """Transformers' AttentionMaskInterface: one layer's mask, from the one that `_row` made."""
    step = getattr(attention_mask, "step", None)
    if step is None:
        raise _Unsupported("its code replaces the attention mask")
    return LayerMask(step, local_size, mask_function)


def _row(tokens: Tensor, positions: Tensor, step: Step) -> dict[str, Any]:
    """The keyword arguments of a forward pass over T tokens of any number of sequences, as one row."""
    mask = torch.ones((1, len(tokens)), dtype=torch.bool, device=tokens.device)
    mask.step = step  # type: ignore[attr-defined]
    return {"input_ids": tokens[None].long(), "position_ids": positions[None], "attention_mask": mask, "use_cache": False}


# --- What a model is -----------------------------------------------------------------------------------------------


def read_spec(config: EngineConfig, found: Mapping[str, Any], methods: Mapping[str, object]) -> ModelSpec:
    """The model that config.json describes: of the table, or run by Transformers, as `model_impl` says.

    Raises `ModelError` if neither runs it, and `NotSupportedYet` for settings that Transformers' code does not work with."""
    names = found.get("architectures") or []
    in_table = any(name in FAMILIES for name in names if isinstance(name, str)) or not names
    if config.model_impl in ("minivllm", "vllm") or (config.model_impl == "auto" and in_table) or found.get("quantization_config"):
        spec = parse_config(found, methods=methods)  # names a quantization method that it does not know
        if config.model_impl != "transformers":
            return spec
        raise NotSupportedYet("model_impl 'transformers' does not load quantized weights yet: use the unquantized checkpoint", "model_impl")
    first = names[0] if names and isinstance(names[0], str) else None
    if first is None:
        raise model_error("config.json names no model class under 'architectures': add it, for model_impl 'transformers'")
    if not _known(first):
        if found.get("auto_map"):
            raise model_error(f"the architecture {first} exists only as Python code in the model's folder (auto_map), which is never run")
        parse_config(found, methods=methods)  # says which architectures have a row
        raise model_error(f"the architecture {first} has no causal language model in Transformers: leave model_impl out")
    for name, value, usual in (("quantization", config.quantization, None), ("enable_lora", config.enable_lora, False),
                               ("tensor_parallel_size", config.tensor_parallel_size, 1), ("cpu_offload_gb", config.cpu_offload_gb, 0)):
        if value != usual:
            raise NotSupportedYet(f"{name} {value!r} does not work with {first}, which runs in Transformers' code: leave it out", name)
    if config.speculation is not None and config.speculation.method != "ngram":
        raise NotSupportedYet(f"speculative_config: {first} runs in Transformers' code, which works with method ngram only",
                              "speculative_config")
    spec = describe(first, json.dumps(found, sort_keys=True))
    length = config.max_model_len or spec.max_model_len
    for one in _ropes(spec.config):
        kept = one.get("original_max_position_embeddings") or spec.max_model_len
        if one.get("rope_type") in ROPE_BY_LENGTH and length > kept:
            raise NotSupportedYet(f"Transformers' code changes the rotary frequencies of {first} ({one['rope_type']}) with the longest "
                                  f"sequence of a batch: set max_model_len to at most {kept}", "max_model_len")
    return spec


def _ropes(config: Any) -> Iterator[dict[str, Any]]:
    """The parameters of each rotary embedding."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    yield from (one for one in (rope, *rope.values()) if isinstance(one, dict))


def _known(architecture: str) -> bool:
    """Whether Transformers has this model class."""
    import transformers

    return isinstance(getattr(transformers, architecture, None), type)


@functools.lru_cache(maxsize=8)
def describe(architecture: str, config_json: str) -> ForeignSpec:
    """The specification of a model, from one forward pass of it without memory. Raises `ModelError` with the reason if it cannot run."""
    config = _config(architecture, json.loads(config_json))
    try:
        layers, vocabulary, parameters = _probe(architecture, config)
        if len(sizes := {2 * x.num_kv_heads * x.head_dim for x in layers}) > 1:
            raise _Unsupported(f"its layers have KV pages of different sizes ({sorted(sizes)} numbers a token)")
    except _Unsupported as reason:
        raise model_error(f"the architecture {architecture} is not supported: {reason}") from None
    text = config.get_text_config()
    width, length = int(text.hidden_size), getattr(text, "max_position_embeddings", None)
    if not isinstance(length, int):
        raise model_error(f"config.json of {architecture} has no max_position_embeddings: add it, the longest sequence in tokens")
    return ForeignSpec(
        architecture=architecture, vocab_size=vocabulary, hidden_size=width, max_model_len=length,
        dtype=dtype_name(json.loads(config_json)),
        tied=bool(text.tie_word_embeddings), norm="rms", norm_eps=1e-6, norm_affine=True, final_norm=True, learned_positions=0,
        position_offset=0, embed_size=width, names={}, parameters=parameters, config=config,
        layers=_layer_specs(layers, width))


def _layer_specs(layers: Sequence[ForeignLayer], width: int) -> tuple[LayerSpec, ...]:
    mlp = MLPSpec(intermediate_size=4 * width, gated=False, activation="gelu", bias=False)
    return tuple(LayerSpec(mlp=mlp, block="pre", attention=AttentionSpec(
        num_heads=x.num_heads, num_kv_heads=x.num_kv_heads, head_dim=x.head_dim, window=x.window, rope=None, qk_norm=None, qkv_bias=False,
        out_bias=False, multiplier=x.scale, softcap=x.softcap)) for x in layers)


def _config(architecture: str, found: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    kind = found.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise model_error(f"config.json: model_type {shown(kind)} of {architecture} is not one of Transformers'")
    try:
        return CONFIG_MAPPING[kind].from_dict(dict(found))
    except Exception as error:  # each configuration class checks its values in another way
        raise model_error(f"config.json is not one of {architecture}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _probe(architecture: str, config: Any) -> tuple[list[ForeignLayer], int, int]:
    """-> (every layer's attention, rows of the output head, number of weights). Raises `_Unsupported`."""
    cls, config = _class(architecture, config), copy.deepcopy(config)
    for rope in _ropes(config):
        if rope.get("rope_type") in ROPE_BY_LENGTH:  # they read positions, which have no values here
            rope["rope_type"] = "default"
    with _without_memory():
        try:
            model = cls._from_config(config, attn_implementation=NAME, dtype=torch.bfloat16).eval()
        except Exception as error:
            raise _Unsupported(f"Transformers cannot build it ({_line(error)})") from error
        base = getattr(model, model.base_model_prefix, None)
        if not isinstance(base, nn.Module):
            raise _Unsupported("its output head is not separate from its decoder")
        if layer := next((m for m in model.modules() if isinstance(m, nn.Conv1d)), None):
            raise _Unsupported(f"its {type(layer).__name__} layers mix neighboring tokens and keep them beside the KV cache")
        probe, few = _Probe(), torch.zeros(3, dtype=torch.int64)
        try:
            with torch.inference_mode():
                base(**_row(few, few, probe))
                vocabulary = _head(model)(inputs_embeds=torch.zeros((1, 1, config.get_text_config().hidden_size), dtype=torch.bfloat16),
                                          use_cache=False).logits.shape[-1]
        except _Unsupported:
            raise
        except Exception as error:
            if LayerMask.__name__ in str(error):
                raise _Unsupported("its code computes with the attention mask, and not only through Transformers' "
                                   "AttentionInterface") from error
            raise _Unsupported(f"its code does not run on one row of several sequences ({_line(error)})") from error
    number = config.get_text_config().num_hidden_layers
    if not probe.layers:
        raise _Unsupported("its attention does not go through Transformers' AttentionInterface")
    if [x.layer for x in probe.layers] != list(range(number)):
        raise _Unsupported(f"its {number} layers call attention {len(probe.layers)} times, and a KV cache needs one call per layer")
    seen = {id(p): p.numel() for p in model.parameters()}
    return probe.layers, vocabulary, sum(seen.values())


def _class(architecture: str, config: Any) -> Any:
    """The model class. Raises `_Unsupported` for one of which its class or configuration says that it cannot run here."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    cls: Any = getattr(transformers, architecture)
    if getattr(config, "is_encoder_decoder", False):
        raise _Unsupported("it is an encoder-decoder, and this engine runs decoders")
    if getattr(cls, "_is_stateful", False) or {"mamba", "conv", "recurrent", "linear_attention"} & set(_layer_types(config)):
        raise _Unsupported("it has state-space, linear-attention or convolution layers, whose state is not in the KV cache")
    if any(getattr(config, f"{kind}_config", None) is not None for kind in ("vision", "audio", "text")):
        raise _Unsupported("it is multimodal, and this engine takes text only")
    if sparse := [name for name in config.get_text_config().to_dict() if name.startswith("index_topk")]:
        raise _Unsupported(f"its attention is sparse ({sparse[0]})")
    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise _Unsupported("Transformers does not list it as a causal language model")
    return cls


def _layer_types(config: Any) -> Collection[str]:
    """The kinds of the layers, as far as config.json names them."""
    found = [getattr(config, name, None) or () for name in ("layer_types", "layers_block_type", "block_types")]
    return {kind for kinds in found for kind in kinds if isinstance(kind, str)}


@contextlib.contextmanager
def _without_memory() -> Iterator[None]:
    """Tensors on the meta device, and this engine's attention known to Transformers."""
    _register()
    with torch.device("meta"):
        yield


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _mask)


class _Probe:
    """A step that notes what each layer's attention gets."""

    def __init__(self) -> None:
        self.layers: list[ForeignLayer] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: LayerMask, scale: float, softcap: float | None,
               others: Mapping[str, Any]) -> Tensor:
        """See `Step`. Raises `_Unsupported` for attention that the paged kernels do not compute."""
        sinks = others.get("s_aux")
        known = {"position_ids", "cache_position", *(("s_aux",) if sinks is not None and sinks.shape == q.shape[1:2] else ())}
        names = [name for name, value in others.items() if isinstance(value, Tensor) and name not in known]
        if names:
            raise _Unsupported(f"its attention takes {', '.join(names)}, which the paged kernels do not")
        if others.get("is_causal") is False or not _sees(mask, 5, 5) or _sees(mask, 5, 6):
            raise _Unsupported("its attention is not causal")
        window = others.get("sliding_window")
        if mask.window is None and window is not None:
            raise _Unsupported(f"its layer {layer} has a window of {window} that is not in its mask")
        last = 2 * (mask.window or 0) - 1  # of a window's width after the first key that a chunk of this size would hide
        if mask.window is not None and (not _sees(mask, last, mask.window) or _sees(mask, last, mask.window - 1)
                                        or not _sees(mask, mask.window, mask.window - 1)):
            raise _Unsupported(f"its attention is local in chunks of {mask.window} tokens")
        heads, width = q.shape[1], q.shape[-1]
        if k.shape[-1] != width or v.shape[-1] > width or k.shape[1] != v.shape[1] or heads % k.shape[1]:
            raise _Unsupported(f"the shapes of its queries {list(q.shape)}, keys {list(k.shape)} and values {list(v.shape)} do not fit")
        self.layers.append(ForeignLayer(layer, heads, k.shape[1], width, v.shape[-1], mask.window, scale, softcap))
        return v.new_empty((1, q.shape[2], heads, v.shape[-1]))


def _sees(mask: LayerMask, query: int, key: int) -> bool:
    zero, place = torch.zeros((), dtype=torch.int64, device="cpu"), functools.partial(torch.tensor, device="cpu")
    return bool(mask.visible(zero, zero, place(query), place(key)))


# --- The model -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PagedStep:
    """A forward pass over the paged cache."""

    kv: Sequence[KVLayer]
    slots: tuple[Tensor, ...]  # [G] of [T]
    metas: tuple[Any, ...]  # [G] from ops.prepare_attention
    group_of: Sequence[int]  # layer -> KV group
    self_attention: Any

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: LayerMask, scale: float, softcap: float | None,
               others: Mapping[str, Any]) -> Tensor:
        """See `Step`. Values that are narrower than keys are padded in the cache."""
        tokens, width, group = q.shape[2], v.shape[-1], self.group_of[layer]
        if width < q.shape[-1]:
            v = nn.functional.pad(v, (0, q.shape[-1] - width))
        qkv = torch.cat([x[0].transpose(0, 1).reshape(tokens, -1) for x in (q, k, v)], dim=1)
        sinks = others.get("s_aux")
        heads = self.self_attention(qkv, self.kv[layer], self.slots[group], self.metas[group], scale=scale, softcap=softcap,
                                    sinks=None if sinks is None else sinks.float())
        return heads.view(1, tokens, q.shape[1], -1)[..., :width]


class _Given(nn.Module):
    """In place of a decoder: its result is what it gets as embeddings."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _GivenOutput:
        return _GivenOutput(inputs_embeds)


class _GivenOutput:
    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        """Caches, attention weights and routers' logits, of which there are none."""


def _head(model: nn.Module) -> nn.Module:
    """The model's way from final hidden states to logits, with its scale and its cap: its class around no layers."""
    head = copy.copy(model)
    head._modules = {**model._modules, model.base_model_prefix: _Given()}  # type: ignore[dict-item]
    return head


class TransformersModel:
    """A `LanguageModel` in Transformers' code."""

    def __init__(self, spec: ForeignSpec, build: BuildContext, model: nn.Module) -> None:
        self.spec, self.build, self.groups = spec, build, kv_groups(spec)
        self._base, self._head = getattr(model, str(model.base_model_prefix)), _head(model)
        self._group_of = {layer: g for g, group in enumerate(self.groups) for layer in group.layers}

    def without_repetition(self) -> TransformersModel:
        """The whole model: its layers cannot be taken apart."""
        return self

    @torch.inference_mode()
    def forward(self, batch: InputBatch, kv: Sequence[KVLayer], block_size: int) -> Tensor:
        """-> hidden states after the final norm: [T, hidden], or [B, hidden] if `batch.last_only`."""
        metas = tuple(self.build.ops.prepare_attention(
            batch, g, block_size=block_size, num_heads=group.num_heads, num_kv_heads=group.kv_heads, head_dim=group.head_dim,
            window=group.window, dtype=self.build.dtype, cache_dtype=kv[group.layers[0]].k.dtype) for g, group in enumerate(self.groups))
        step = PagedStep(kv, batch.slots, metas, self._group_of, self.build.ops.self_attention)  # type: ignore[arg-type]
        hidden: Tensor = self._base(**_row(batch.tokens, batch.positions, step))[0][0]
        return hidden.index_select(0, batch.last_tokens()[0]) if batch.last_only else hidden

    def final_hidden(self, hidden: Tensor) -> Tensor:
        """`forward` has applied the final norm."""
        return hidden

    def settle(self) -> None:
        """Nothing is streamed."""

    @torch.inference_mode()
    def logits(self, hidden: Tensor, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """hidden: [L, hidden] of `forward`, only the needed rows -> [L, vocab] in `dtype`; None: in the dtype of the output head."""
        logits: Tensor = self._head(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits if dtype is None else logits.to(dtype)


def load_transformers(spec: ForeignSpec, folder: Path, load_format: str, build: BuildContext, seed: int = 0) -> TransformersModel:
    """The model of `spec` with the weights in `folder` (safetensors), or with random ones for load_format "dummy".

    Raises `ModelError` if its code computes other logits here than in Transformers, or if weights are missing."""
    print(f"minivllm: {spec.architecture} runs in Transformers' modeling code around this engine's paged attention, without CUDA graphs",
          file=sys.stderr, flush=True)
    check_logits(spec)
    cls, config = _class(spec.architecture, spec.config), copy.deepcopy(spec.config)
    if load_format == "dummy":
        with torch.random.fork_rng(devices=[build.device] if build.device.type == "cuda" else []), build.device:
            torch.manual_seed(seed)
            return TransformersModel(spec, build, cls._from_config(config, attn_implementation=NAME, dtype=build.dtype).eval())
    try:
        model, report = cls.from_pretrained(str(folder), config=config, attn_implementation=NAME, dtype=build.dtype, use_safetensors=True,
                                            local_files_only=True, trust_remote_code=False, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"Transformers cannot load the weights in {folder} ({_line(error)}): they must be safetensors files",
                         "model") from error
    problems = [f"{kind.removesuffix('_keys')}: {', '.join(sorted(map(str, report[kind]))[:8])}"
                for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[kind]]
    if problems:
        raise ModelError(f"the weights in {folder} do not match its config.json ({spec.architecture}): {'; '.join(problems)}", "model")
    return TransformersModel(spec, build, model.to(build.device).eval())


# --- The self-check ------------------------------------------------------------------------------------------------


def check_logits(spec: ForeignSpec) -> None:
    """Compare a small random model of the same class, with two sequences in one row and a prompt in two chunks, with Transformers' own
    attention. Raises `ModelError` if the logits differ: some code mixes tokens, or counts their positions, outside of its attention.
    Prints one line if there is no model that is small enough."""
    try:
        config = small(spec.config)
        layers, vocabulary, parameters = _probe(spec.architecture, config)
        if parameters > CHECK_PARAMETERS:
            raise _Unsupported(f"a small one still has {parameters:,} parameters, and at most {CHECK_PARAMETERS:,} are compared")
    except Exception as error:  # the model's code may refuse the small sizes in any way
        reason = str(error) if isinstance(error, _Unsupported) else _line(error)
        print(f"minivllm: no small model of {spec.architecture} was compared with Transformers' own attention: {reason}",
              file=sys.stderr, flush=True)
        return
    _register()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.inference_mode():
        torch.manual_seed(0)
        model = _class(spec.architecture, config)._from_config(config, attn_implementation=NAME, dtype=torch.float32).eval()
        prompts = [torch.randint(3, vocabulary, (length,)) for length in (11, 6)]
        few = dataclasses.replace(spec, layers=_layer_specs(layers, spec.hidden_size), vocab_size=vocabulary)
        ours = _in_steps(TransformersModel(few, BuildContext(torch.device("cpu"), torch.float32, REFERENCE), model), prompts)
        model.set_attn_implementation("eager")
        theirs = torch.cat([model(input_ids=p[None], use_cache=False).logits[0] for p in prompts])
    worst, scale = float((ours - theirs).abs().max()), float(theirs.abs().max())
    if not worst <= CHECK_TOLERANCE * scale:
        raise model_error(f"the architecture {spec.architecture} is not supported: with several sequences in one row, its code computes "
                          f"other logits (by {worst / scale:.1%} of the largest, in a small random model): it mixes tokens or counts "
                          "positions outside of its attention")


WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner",
          "num_attention_heads", "num_key_value_heads")
CHECK_VOCABULARY, CHECK_WINDOW, CHECK_BLOCK = 128, 4, 16


def small(config: Any) -> Any:
    """A configuration of the same class with few layers (one of each kind), fewer heads and a small vocabulary."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    number = text.num_hidden_layers
    kinds = list(getattr(text, "layer_types", None) or ())
    few = min(number, max([2, *(kinds.index(kind) + 1 for kind in set(kinds))]))
    for name, value in text.to_dict().items():
        if isinstance(value, (list, tuple)) and len(value) == number:
            setattr(text, name, list(value)[:few])
    text.num_hidden_layers = few
    heads = text.num_attention_heads
    divisor = math.gcd(heads // 2 if heads % 2 == 0 else heads, getattr(text, "num_key_value_heads", None) or heads)
    values = {name: value for name in WIDTHS if isinstance(value := getattr(text, name, None), int)}
    if all(value % divisor == 0 for value in values.values()):
        for name, value in values.items():
            setattr(text, name, value // divisor)
    text.vocab_size = min(text.vocab_size, CHECK_VOCABULARY)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(text, name, None) is not None:
            setattr(text, name, 0)
    if isinstance(getattr(text, "initializer_range", None), float):
        text.initializer_range = text.hidden_size**-0.5  # with the usual 0.02, attention is nearly uniform and hides what is wrong
    if getattr(text, "sliding_window", None):
        text.sliding_window = min(text.sliding_window, CHECK_WINDOW)
    return config


def _in_steps(model: TransformersModel, prompts: Sequence[Tensor]) -> Tensor:
    """Logits of all tokens of two prompts, the first after the second: beginnings in one step, then the rest of the first as a chunk and
    the last token of the second as a decode. Each sequence has one block in each KV group."""
    first, second = prompts
    kv = [KVLayer(*(torch.zeros((1 + 2 * len(model.groups), CHECK_BLOCK, a.num_kv_heads, a.head_dim)) for _ in range(2)))
          for a in (layer.attention for layer in model.spec.layers)]
    found: list[list[Tensor]] = [[], []]
    cut = len(first) - CHECK_WINDOW
    for parts in (((0, 0, cut), (1, 0, len(second) - 1)), ((1, len(second) - 1, len(second)), (0, cut, len(first)))):
        lens, ends = tuple(end - start for _, start, end in parts), tuple(end for _, _, end in parts)
        positions = torch.cat([torch.arange(start, end) for _, start, end in parts])
        blocks = [torch.tensor([1 + 2 * g + s for s, _, _ in parts]) for g in range(len(model.groups))]
        batch = InputBatch(
            tokens=torch.cat([prompts[s][start:end] for s, start, end in parts]).int(), positions=positions,
            query_start=torch.tensor((0, *lens)).cumsum(0).int(), seq_lens=torch.tensor(ends).int(),
            slots=tuple(b.repeat_interleave(torch.tensor(lens)) * CHECK_BLOCK + positions for b in blocks),
            block_tables=tuple(b[:, None].int() for b in blocks), logit_rows=torch.zeros(1, dtype=torch.int64),
            num_decodes=sum(n == 1 for n in lens), query_lens_host=lens, seq_lens_host=ends)
        logits = model.logits(model.forward(batch, kv, CHECK_BLOCK)).split(lens)
        for (s, _, _), rows in zip(parts, logits, strict=True):
            found[s].append(rows)
    return torch.cat(found[0] + found[1])
