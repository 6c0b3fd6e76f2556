"""From `speculative_config` to a proposer on the device: find the draft, check that it fits the target, load it.

    find_draft ─▶ Draft (config.json and names of tensors only)  ─▶ memory plan, KV layout
    load_draft(Draft, target) ─▶ DraftModel or EagleHead

A draft that does not fit is refused before any weights are loaded: its tokens must mean the same as the target's.
"""
from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minivllm.config import EngineConfig
from minivllm.errors import InvalidInput, ModelError
from minivllm.families import LinearSpec, MLPSpec, ModelSpec, linear_specs, parse_config
from minivllm.layers.attention import Attention
from minivllm.layers.build import BuildContext
from minivllm.layers.linear import Linear
from minivllm.layers.mlp import MLP
from minivllm.layers.norm import load_norm
from minivllm.layers.rope import RotaryEmbedding
from minivllm.models.decoder import Decoder, PreNormLayer
from minivllm.models.hub import DEFAULT_NAME, describe_model, find_model
from minivllm.models.loader import Checkpoint, adapted, check, load_model, open_checkpoint, take_from
from minivllm.parallel.group import SINGLE
from minivllm.quantization.base import MethodOf
from minivllm.quantization.dense import DENSE
from minivllm.quantization.methods import METHODS, Parameter, linear_parameters, method_of, parameters, resident_bytes, stored_modules
from minivllm.speculative.base import DeviceProposer
from minivllm.speculative.draft_model import DraftModel
from minivllm.speculative.eagle import EagleHead
from minivllm.speculative.packaged import TARGET, belongs, packaged_head
from minivllm.speculative.shared import final_norm, output_rows
from minivllm.speculative.steps import draft_group
from minivllm.speculative_config import FIELD, SpeculativeConfig

log = logging.getLogger(__name__)

VOCABULARY = "d2t"  # as in EAGLE-3's files: row i of the draft's output is token i + d2t[i]
FUSION = "fc."  # a tensor that only heads have
SHARED = "embed_tokens.weight"  # some heads store a copy of the target's embedding table, which is used instead


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft whose config.json fits the target. `spec` has the target's length."""

    settings: SpeculativeConfig
    folder: Path
    spec: ModelSpec
    method: MethodOf
    group: int  # the target's KV group whose blocks the draft uses
    vocabulary: int | None = None  # tokens that a head with a reduced vocabulary can propose; None: all

    def weight_bytes(self, itemsize: int, on_gpu: bool) -> int:
        """Bytes of its weights on the device. itemsize: of the target's dtype."""
        if self.settings.method != "eagle":
            return resident_bytes(self.spec, self.method, itemsize, on_gpu)
        fusion, layer = _fusion(self.spec), replace(self.spec, vocab_size=1, tied=True)
        own = self.method(fusion).resident_bytes(fusion.rows, fusion.cols, itemsize, on_gpu)
        return own + resident_bytes(layer, self.method, itemsize, on_gpu) + (self.vocabulary or 0) * self.spec.hidden_size * itemsize


def find_draft(config: EngineConfig, target: ModelSpec, weights: Path, tokenizer: Path | None = None) -> Draft | None:
    """The draft that `speculative_config` names, downloaded if necessary. None: it names none. weights, tokenizer: the target's folders.

    Raises `InvalidInput` naming what does not fit.
    """
    if (named := _named(config, target, weights)) is None:
        return None
    settings, own, group = named
    try:
        files = find_model(own, lambda found: check_draft(settings, found, target))
        with open_checkpoint(files.folder) as found:
            shapes = {name: stored.shape for name, stored in found.items()}
        draft = _draft(settings, files.folder, files.config, shapes, target, group)
    except ModelError as error:
        raise _wrong(f"model {settings.model!r}: {error}") from None
    if settings.method != "eagle" and tokenizer is not None:
        _check_tokenizer(settings, files.folder, tokenizer)
    if settings.method == "eagle" and (record := files.config.get(TARGET)) is not None and not belongs(record, target, weights):
        log.warning("%s: model %r was trained for another model than %r, so few of its drafts may be right", FIELD, settings.model,
                    config.model or DEFAULT_NAME)
    return draft


def describe_draft(config: EngineConfig, target: ModelSpec) -> Draft | None:
    """The same from config.json and the headers of the weights alone, to plan its memory. It cannot be loaded."""
    if (named := _named(config, target, None)) is None:
        return None
    settings, own, group = named
    try:
        found = describe_model(own, lambda found: check_draft(settings, found, target))
        shapes = {name: shape for name, (_, shape, _) in found.tensors.items()}
        return _draft(settings, Path(found.name), found.config, shapes, target, group)
    except ModelError as error:
        raise _wrong(f"model {settings.model!r}: {error}") from None


def _named(config: EngineConfig, target: ModelSpec, weights: Path | None) -> tuple[SpeculativeConfig, EngineConfig, int] | None:
    """The settings, those of an engine for the draft alone, and the target's KV group whose blocks the draft uses."""
    settings = config.speculation
    if settings is None or settings.method == "ngram":
        return None
    group = draft_group(target)
    if group is None:
        raise _wrong(f"method {settings.method!r} needs a target with full attention in at least one layer, and all layers of "
                     f"{target.architecture} have sliding windows here: use method ngram")
    if settings.model is None:
        settings = replace(settings, model=_packaged(config, target, weights))
    own = replace(config, model=settings.model, revision=settings.revision, quantization=settings.quantization, tokenizer=None,
                  hf_overrides=None, generation_config="vllm", override_generation_config=None, load_format="auto",
                  skip_tokenizer_init=True, speculative_config=None, tensor_parallel_size=1)
    return settings, own, group


def _packaged(config: EngineConfig, target: ModelSpec, weights: Path | None) -> str:
    """The head that comes with the package."""
    head = packaged_head(target, weights)
    if head is None:
        raise _wrong(f"method 'eagle' without model means the head that comes with the package, which was trained for {DEFAULT_NAME}, and "
                     f"the target is {config.model or DEFAULT_NAME}: set model to a head for it (`minivllm train-draft` makes one)")
    return str(head)


def _draft(settings: SpeculativeConfig, folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]],
           target: ModelSpec, group: int) -> Draft:
    """shapes: of its tensors; {}: not known."""
    spec, method = check_draft(settings, config, target), method_of(config, wanted=settings.quantization)
    is_head = settings.method == "eagle"
    if shapes and is_head != any(name.startswith(FUSION) for name in shapes):
        raise ModelError("it has no fc.weight, so it is no head in EAGLE's layout: set method to draft_model" if is_head else
                         "it has fc.weight, so it is a learned head and no whole model: set method to eagle", FIELD)
    return Draft(settings, folder, spec, method, group, shapes[VOCABULARY][0] if is_head and VOCABULARY in shapes else None)


def check_draft(settings: SpeculativeConfig, found: Mapping[str, Any], target: ModelSpec) -> ModelSpec:
    """The draft's specification, from its config.json, if it fits the target. Raises `InvalidInput` naming the field."""
    spec = parse_config(found, methods=METHODS)
    if spec.vocab_size != target.vocab_size:
        raise _wrong(f"model {settings.model!r} has vocab_size {spec.vocab_size} and the target {target.vocab_size}, so its tokens mean "
                     "something else: use a draft made for this target")
    if spec.learned_positions and spec.max_model_len < target.max_model_len:
        raise _wrong(f"model {settings.model!r} has learned positions for {spec.max_model_len} tokens and the target serves "
                     f"{target.max_model_len}: set max_model_len to {spec.max_model_len}")
    if settings.method == "eagle":
        _check_head(settings, spec, target)
    return replace(spec, max_model_len=target.max_model_len)


def _check_head(settings: SpeculativeConfig, spec: ModelSpec, target: ModelSpec) -> None:
    layer, a = spec.layers[0], spec.layers[0].attention
    if spec.hidden_size != target.hidden_size:
        raise _wrong(f"model {settings.model!r} has hidden_size {spec.hidden_size} and the target {target.hidden_size}: a head reads the "
                     "hidden states of the target that it was trained with; use a head made for this target")
    if spec.num_layers != 1:
        raise _wrong(f"model {settings.model!r} has num_hidden_layers {spec.num_layers}, and method eagle needs a head of 1 layer: use "
                     "method draft_model for a whole model")
    like_llama = layer.block == "pre" and spec.norm == "rms" and isinstance(layer.mlp, MLPSpec)
    if not like_llama or a.rope is None or a.window is not None or a.latent is not None:
        raise _wrong(f"model {settings.model!r} has the architecture {spec.architecture}, and the layer of a head must be Llama's: use a "
                     "head in EAGLE's layout")


def _check_tokenizer(settings: SpeculativeConfig, draft: Path, target: Path) -> None:
    """Raise unless both folders have the same tokens. Folders without a tokenizer.json are not compared."""
    ours, theirs = (_tokens(folder / "tokenizer.json") for folder in (draft, target))
    if ours is None or theirs is None or ours == theirs:
        return
    token = min((t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)), key=lambda t: (theirs.get(t, ours.get(t, 0)), t))
    raise _wrong(f"model {settings.model!r} has another tokenizer than the target: {token!r} is token {ours.get(token)} there and "
                 f"{theirs.get(token)} here. Use a draft of the target's own family")


def _tokens(file: Path) -> dict[str, int] | None:
    """Text of each token -> its id."""
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    vocab = found.get("model", {}).get("vocab", {})
    tokens = vocab if isinstance(vocab, dict) else {text: i for i, (text, _) in enumerate(vocab)}
    return {**tokens, **{t["content"]: t["id"] for t in found.get("added_tokens", ())}}


def _wrong(message: str) -> InvalidInput:
    return InvalidInput(f"{FIELD}: {message}", FIELD)


# ---- loading

def load_draft(draft: Draft, target: Decoder) -> DeviceProposer:
    """The proposer, on the target's device and in its dtype. Raises `ModelError` for tensors that are missing, left over or wrong."""
    settings, build = draft.settings, replace(
        target.build, method=draft.method, adapters=None, group=SINGLE)  # LoRA adapters change the target only; each rank has a whole draft
    options: dict[str, Any] = dict(num_drafts=settings.num_speculative_tokens, group=draft.group,
                                   probabilistic=settings.draft_sample_method == "probabilistic")
    if settings.method == "eagle":
        return load_head(draft.folder, draft.spec, build, target, **options)
    model = load_model(draft.spec, draft.folder, "auto", build)
    return DraftModel(model, num_target_layers=len(target.spec.layers), **options)


def load_head(folder: Path, spec: ModelSpec, build: BuildContext, target: Decoder, **options: Any) -> EagleHead:
    """A head in EAGLE's layout: fc, one decoder layer, which may have no norm before attention, and perhaps a reduced vocabulary."""
    final_norm(target)  # raises for a target that no head fits
    with open_checkpoint(folder) as found:
        d2t = found.get(VOCABULARY)
        own: Checkpoint = {name: tensor for name, tensor in found.items() if name not in (VOCABULARY, SHARED)}
        fusion = _fusion(spec, bias="fc.bias" in found)
        own = adapted(own, {**stored_modules(spec, build.method), "fc": build.method(fusion)})
        needed = _head_parameters(spec, build.method, fusion, own.keys())
        check(spec, needed, own, folder)
        take = take_from(needed, own, build)
        linears = linear_specs(spec)
        before = load_norm(build, take, spec, "layers.0.attn_norm") if "layers.0.attn_norm.weight" in needed else None
        attention = Attention(spec, build, take, linears, 0, 0, 0, before)
        mlp_spec = spec.layers[0].mlp
        assert isinstance(mlp_spec, MLPSpec)  # see `_check_head`
        mlp = MLP(mlp_spec, build, take, linears, 0, load_norm(build, take, spec, "layers.0.mlp_norm"))
        fc = Linear.load(build, take, fusion)
        offsets = None if d2t is None else d2t.read().to(build.device, torch.int64)
    head, vocabulary = target.head.without_norm(build), None
    if offsets is not None:
        vocabulary = offsets + torch.arange(len(offsets), device=build.device)
        if not (int(vocabulary.min()) >= 0 and int(vocabulary.max()) < spec.vocab_size):
            raise ModelError(f"{folder}: {VOCABULARY} names tokens outside the vocabulary of {spec.vocab_size}: the head is damaged", FIELD)
        with torch.inference_mode():
            head = Linear(build, DENSE.build({"weight": output_rows(target, vocabulary)}, (len(vocabulary),), build.ops))
    a = spec.layers[0].attention
    rope = None if a.rope is None else RotaryEmbedding(build, a.rope, a.head_dim, spec.max_model_len)
    return EagleHead(target, fc, PreNormLayer(0, attention, mlp), a, head, rope=rope, vocabulary=vocabulary, **options)


def _fusion(spec: ModelSpec, bias: bool = False) -> LinearSpec:
    """The layer that joins the next token's embedding and the hidden state."""
    return LinearSpec("fc", (spec.hidden_size,), 2 * spec.hidden_size, ("fc",), bias, parallel=None)


def _head_parameters(spec: ModelSpec, method: MethodOf, fusion: LinearSpec, stored: Collection[str]) -> dict[str, Parameter]:
    needed = {name: p for name, p in parameters(spec, method).items() if name.startswith("layers.")}
    norm = needed["layers.0.attn_norm.weight"].sources[0].name
    if norm not in stored:
        del needed["layers.0.attn_norm.weight"]
    return {**needed, **dict(linear_parameters(fusion, method(fusion)))}
