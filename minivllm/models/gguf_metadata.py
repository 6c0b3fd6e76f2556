"""A GGUF file's metadata: typed reading, and the table of all keys.

Every key that llama.cpp reads for the architectures here is in one of three groups: it is read, it must have the value that changes
nothing, or it cannot change the tokens. So no key that changes the result is ignored. An unknown key of the architecture with a value
other than 0, and a value of a wrong kind, are errors that name the file, the key and the value. (Tokenizers have more unknown keys, from
other programs, and llama.cpp reads none of them: these only give a warning.)
"""
from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from minivllm.errors import InvalidInput, ModelError, nearest
from minivllm.sampling_params import SamplingParams

REQUIRED = ...


class Kind(NamedTuple):
    """A kind of value: its description for messages, and the check."""

    words: str
    check: Callable[[Any], bool]


def _is_int(value: Any, low: int) -> bool:
    return type(value) is int and low <= value < 1 << 31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_list(value: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(check, value))


SIZE = Kind("a whole number of at least 1", lambda v: _is_int(v, 1))
COUNT = Kind("a whole number of at least 0", lambda v: _is_int(v, 0))
ID = Kind("a token id", lambda v: type(v) is int)
IDS = Kind("a list of token ids", lambda v: _is_list(v, lambda i: type(i) is int))
NUMBER = Kind("a finite number", _is_number)
POSITIVE = Kind("a finite number above 0", lambda v: _is_number(v) and v > 0)
NOT_NEGATIVE = Kind("a finite number of at least 0", lambda v: _is_number(v) and v >= 0)
FLAG = Kind("true or false", lambda v: type(v) is bool)
TEXT = Kind("text", lambda v: isinstance(v, str))
TEXTS = Kind("a list of texts", lambda v: _is_list(v, lambda t: isinstance(t, str)))
NUMBERS = Kind("a list of finite numbers", lambda v: _is_list(v, _is_number))
FLAGS = Kind("a list of true and false", lambda v: _is_list(v, lambda i: type(i) is bool))
INTEGERS = Kind("a list of whole numbers", lambda v: _is_list(v, lambda i: type(i) is int))

# ---- the keys

# Keys behind "{architecture}." that are read.
ARCHITECTURE_KEYS: Mapping[str, Kind] = {
    "expert_count": COUNT, "expert_used_count": COUNT, "expert_weights_scale": NOT_NEGATIVE, "expert_gating_func": COUNT,
    "expert_group_count": COUNT, "expert_weights_norm": FLAG,
    "block_count": SIZE, "context_length": SIZE, "embedding_length": SIZE, "feed_forward_length": SIZE, "vocab_size": COUNT,
    "attention.head_count": SIZE, "attention.head_count_kv": SIZE, "attention.key_length": SIZE, "attention.value_length": SIZE,
    "attention.layer_norm_rms_epsilon": POSITIVE, "attention.sliding_window": COUNT, "attention.scale": NOT_NEGATIVE,
    "rope.freq_base": POSITIVE, "rope.dimension_count": SIZE, "rope.scaling.type": TEXT, "rope.scaling.factor": NOT_NEGATIVE,
    "rope.scale_linear": NOT_NEGATIVE, "rope.scaling.attn_factor": POSITIVE, "rope.scaling.original_context_length": SIZE,
    "rope.scaling.yarn_beta_fast": POSITIVE, "rope.scaling.yarn_beta_slow": POSITIVE,
}
# Keys behind "{architecture}." that some architectures have, and that `gguf_config` reads for these.
FURTHER_KEYS: Mapping[str, Kind] = {
    "attention.layer_norm_epsilon": POSITIVE, "logit_scale": POSITIVE, "embedding_scale": POSITIVE, "residual_scale": POSITIVE,
    "attn_logit_softcapping": POSITIVE, "final_logit_softcapping": POSITIVE, "rope.freq_base_swa": POSITIVE, "use_parallel_residual": FLAG,
    "attention.sliding_window_pattern": FLAGS, "attention.q_lora_rank": COUNT, "attention.kv_lora_rank": SIZE,
    "attention.key_length_mla": SIZE, "attention.value_length_mla": SIZE, "rope.scaling.yarn_log_multiplier": NOT_NEGATIVE,
    "expert_group_used_count": COUNT, "leading_dense_block_count": COUNT,
}
ONLY_TRUE = (True,)
# Keys behind "{architecture}." that the decoder does not support, with the values that change nothing, beside those of `_is_nothing`.
MUST_BE_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": ONLY_TRUE, "tensor_data_layout": ("Meta AI original pth", "jploski"),
    **dict.fromkeys(("logit_scale", "embedding_scale", "residual_scale", "attention.output_scale", "attention.value_scale",
                     "rope.scaling.alpha", "rope.scaling.yarn_attn_factor"), (1.0,)),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),  # -1: the default, which is 1 with yarn
    **dict.fromkeys(("attention.temperature_scale", "attention.temperature_length", "attention.clamp_kqv", "attention.max_alibi_bias",
                     "attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window_pattern", "attention.rope_pattern",
                     "attention.shared_kv_layers", "use_parallel_residual", "attention.q_lora_rank", "attention.kv_lora_rank",
                     "attention.key_length_mla", "attention.value_length_mla", "nextn_predict_layers",
                     "embedding_length_per_layer_input", "rope.dimension_sections", "rope.freq_base_per_layer",
                     "rope.scaling.yarn_log_multiplier", "swin_norm", "rescale_every_n_layers"), ()),
}
# Keys behind "{architecture}." that cannot change the tokens: sizes of experts, which their tensors have too, how experts of other
# architectures are chosen, those of sliding windows in some of the layers (see `attention.sliding_window_pattern`), of embedding and
# classification, and the epsilon of another kind of norm.
WITHOUT_EFFECT = (
    "expert_feed_forward_length", "expert_shared_count", "expert_shared_feed_forward_length", "expert_group_used_count",
    "expert_group_scale",
    "experts_per_group", "moe_every_n_layers", "interleave_moe_layer_step", "leading_dense_block_count", "router_logit_softcapping",
    "attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa", "rope.freq_base_swa",
    "pooling_type", "classifier.output_labels", "embedding_length_out", "rope.scaling.finetuned", "attention.layer_norm_epsilon",
)

# Keys behind "tokenizer." that are read. "chat_template.NAME" is read too.
TOKENIZER_KEYS: Mapping[str, Kind] = {
    "ggml.model": TEXT, "ggml.pre": TEXT, "ggml.tokens": TEXTS, "ggml.scores": NUMBERS, "ggml.token_type": INTEGERS, "ggml.merges": TEXTS,
    "ggml.bos_token_id": ID, "ggml.eos_token_id": ID, "ggml.eot_token_id": ID, "ggml.eom_token_id": ID, "ggml.unknown_token_id": ID,
    "ggml.padding_token_id": ID, "ggml.seperator_token_id": ID, "ggml.mask_token_id": ID, "ggml.fim_pad_token_id": ID,
    "ggml.fim_rep_token_id": ID, "ggml.fim_sep_token_id": ID, "ggml.eos_token_ids": IDS, "ggml.eot_token_ids": IDS,
    "ggml.add_bos_token": FLAG, "ggml.add_eos_token": FLAG, "ggml.add_space_prefix": FLAG, "ggml.remove_extra_whitespaces": FLAG,
    "ggml.precompiled_charsmap": INTEGERS, "chat_template": TEXT, "chat_templates": TEXTS,
}
TOKENIZER_MUST_BE_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "ggml.normalizer.lowercase": (), "ggml.normalizer.strip_accents": (), "ggml.suppress_tokens": (),
    "ggml.escape_whitespaces": ONLY_TRUE, "ggml.treat_whitespace_as_suffix": (),
}
# Ids of tokens that nothing here writes or stops at, llama.cpp's flag for separators (its language models add none), and copies.
TOKENIZER_WITHOUT_EFFECT = (
    "ggml.fim_pre_token_id", "ggml.fim_suf_token_id", "ggml.fim_mid_token_id", "ggml.prefix_token_id", "ggml.suffix_token_id",
    "ggml.middle_token_id", "ggml.cls_token_id", "ggml.separator_token_id", "ggml.add_sep_token", "ggml.token_type_count",
    "huggingface.json", "rwkv.world",
)

# Sampling parameters that the model's authors recommend -> generation_config.json
SAMPLING_KEYS: Mapping[str, str] = {
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty",
}


class Metadata:
    """The keys and values of one file. `architecture` is the prefix of the keys that describe the model."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self._values = values
        self.architecture: str = self.get("general.architecture", TEXT)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def get(self, key: str, kind: Kind, default: Any = REQUIRED) -> Any:
        """The value of a key, checked for its kind. `REQUIRED` makes a missing key an error."""
        return self._checked(key, self._values.get(key), kind, default)

    def _checked(self, key: str, value: Any, kind: Kind, default: Any) -> Any:
        if value is None:
            if default is REQUIRED:
                raise ModelError(f"{self.path}: metadata {key} is missing", "model")
            return default
        if not kind.check(value):
            self.fail(key, f"must be {kind.words}")
        return value

    def hparam(self, name: str, default: Any = REQUIRED) -> Any:
        """A value behind the architecture's prefix. Some converters repeat it for each layer."""
        key = f"{self.architecture}.{name}"
        value = self._values.get(key)
        kind = FURTHER_KEYS[name] if name in FURTHER_KEYS else ARCHITECTURE_KEYS[name]
        if isinstance(value, list) and kind is not FLAGS:
            if not value or any(v != value[0] for v in value):
                self.fail(key, "differs between layers, which is not supported")
            value = value[0]
        return self._checked(key, value, kind, default)

    def tokenizer(self, name: str, default: Any = None) -> Any:
        """A value behind "tokenizer."."""
        return self.get(f"tokenizer.{name}", TOKENIZER_KEYS[name], default)

    def fail(self, key: str, what: str) -> NoReturn:
        raise ModelError(f"{self.path}: metadata {key} = {_shortened(self._values.get(key))} {what}", "model")

    def warn(self, message: str) -> None:
        print(f"{self.path}: {message}", file=sys.stderr)


def check_keys(meta: Metadata, further: Collection[str] = ()) -> None:
    """Refuse every key that is not read and could change the result. further: keys of `FURTHER_KEYS` that are read."""
    known = {**ARCHITECTURE_KEYS, **{name: FURTHER_KEYS[name] for name in further}}
    for key in meta:
        scope, _, name = key.partition(".")
        if scope == meta.architecture:
            _check_key(meta, key, name, known, MUST_BE_NEUTRAL, WITHOUT_EFFECT)
        elif scope == "tokenizer" and not name.startswith("chat_template."):
            _check_key(meta, key, name, TOKENIZER_KEYS, TOKENIZER_MUST_BE_NEUTRAL, TOKENIZER_WITHOUT_EFFECT)
        elif key.startswith("general.sampling."):
            _check_sampling(meta, key)
        elif key == "general.type" and meta.get(key, TEXT) != "model":
            meta.fail(key, "is not a language model: name the model's own .gguf file")


def _check_key(meta: Metadata, key: str, name: str, read: Mapping[str, Kind], neutral: Mapping[str, tuple[Any, ...]],
               without_effect: tuple[str, ...]) -> None:
    if name in read or name in without_effect:
        return
    value = meta.get(key, Kind("a value", lambda _: True))
    allowed = neutral.get(name, ())
    if name in neutral and (value in allowed or (allowed is not ONLY_TRUE and _is_nothing(value))):
        return
    hint = nearest(name, (*read, *neutral))
    fix = f"if it does not matter, remove it with `gguf-new-metadata --remove-metadata {key} {meta.path.name} NEW.gguf`"
    if name in neutral:
        meta.fail(key, f"is not supported: {fix}")
    elif _is_nothing(value) or key.startswith("tokenizer."):
        meta.warn(f"metadata {key} = {_shortened(value)} is not known, and not used{hint}")
    else:
        meta.fail(key, f"is not known, and may change the model's output{hint}: {fix}")


def _is_nothing(value: Any) -> bool:
    """0, false, "none", an empty list, or a list of such values."""
    return all(map(_is_nothing, value)) if isinstance(value, list) else value in (0, "", "none")


def _check_sampling(meta: Metadata, key: str) -> None:
    if key.removeprefix("general.sampling.") not in SAMPLING_KEYS:
        meta.warn(f"the recommended sampling setting {key} is not supported and not used")


def sampling_defaults(meta: Metadata) -> dict[str, Any]:
    """The recommended sampling parameters, under the names of generation_config.json. Values out of range are not used."""
    found: dict[str, Any] = {}
    for name, ours in SAMPLING_KEYS.items():
        key = f"general.sampling.{name}"
        value = meta.get(key, NUMBER, None)
        if value is None:
            continue
        if isinstance(value, float):
            exact = float(f"{value:.6g}")  # the file holds float32: 0.6 is 0.60000002
            value = int(exact) if ours == "top_k" and exact.is_integer() else exact
        try:
            SamplingParams(**{ours: value})
            found[ours] = value
        except InvalidInput as error:
            meta.warn(f"metadata {key} = {value!r} is not used: {error}")
    return found


def _shortened(value: Any) -> str:
    text = repr(value[:8] if isinstance(value, list) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
