"""The fields of a quantization_config: which of them are known, their errors, and lists of names and patterns of modules."""
from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from minivllm.errors import ModelError, NotSupportedYet, nearest, shown
from minivllm.families import Key, LinearSpec, read
from minivllm.families.model_folder import compile_pattern
from minivllm.quantization.base import LinearMethod, MethodOf
from minivllm.quantization.dense import DENSE
from minivllm.quantization.parts import PartsMethod

# In front of our name of a module ("lm_head" has none). Lists contain any of these names.
PREFIXES = ("model.", "model.decoder.", "", "transformer.", "gpt_neox.", "language_model.model.", "model.language_model.")


# Fields in which AutoAWQ, AutoGPTQ, GPTQModel, AutoRound and Transformers record how a checkpoint was made, or choose their own
# kernel. The tensors are the same with any value.
RECORDED = frozenset((
    "act_data_type", "act_dynamic", "act_group_aware", "act_group_size", "act_sym", "amp", "autoround_version", "batch_size",
    "cache_block_outputs", "damp_auto_increment", "damp_percent", "dataset", "disable_exllama", "enable_minmax_tuning",
    "enable_norm_bias_tuning", "enable_quanted_input", "exllama_config", "failsafe", "fallback", "gptaq", "gradient_accumulate_steps",
    "hyb_act", "iters", "low_cpu_mem_usage", "low_gpu_mem_usage", "lr", "max_input_length", "meta", "minmax_lr", "model_file_base_name",
    "model_name_or_path", "model_seqlen", "module_name_preceding_first_block", "mse", "nsamples", "offload_to_disk",
    "offload_to_disk_path", "pack_impl", "pad_token_id", "provider", "quant_block_list", "scale_dtype", "seqlen",
    "static_attention_granularity", "static_kv_granularity", "supported_types", "to_quant_block_names", "tokenizer", "true_sequential",
    "uri", "use_cuda_fp16", "use_exllama", "v2", "v2_alpha"))
# AutoRound's description of numbers: integer weights, inputs that are not quantized.
INTEGERS: Mapping[str, tuple[Any, ...]] = {"data_type": ("int",), "act_bits": (16, 32)}
BLOCKS = ("layers", "h")  # our names of the list of decoder layers


def by_name(choose: Callable[[str], LinearMethod]) -> MethodOf:
    """A method for each linear layer from the names of its parts in checkpoints. The embedding table is not quantized."""
    chosen = functools.cache(choose)  # a list may have hundreds of patterns

    def method_of(linear: LinearSpec) -> LinearMethod:
        return DENSE if linear.name == "embed" else PartsMethod.of(tuple(chosen(name) for name in linear.checkpoint_names))
    return method_of


def full_names(name: str) -> tuple[str, ...]:
    """What exporters may call this module."""
    return tuple(prefix + name for prefix in PREFIXES)


def in_block(name: str) -> bool:
    """Whether a module belongs to a decoder layer. AWQ and GPTQ quantize only these, and the output head if asked to."""
    return name.startswith(("layers.", "h."))


def contains_any(name: str, parts: list[str]) -> bool:
    """Whether a name contains one of these strings."""
    return any(part in full for full in full_names(name) for part in parts)


def compiled(pattern: str, field: str) -> re.Pattern[str]:
    """A regular expression. Raises `ModelError` that names the field if it is none, or may take very long."""
    try:
        return compile_pattern(pattern)
    except ValueError as error:
        raise ModelError(f"quantization_config: {field} has {shown(pattern)}, which is no regular expression that can be used ({error}): "
                         "correct it", "model") from error


def matched(name: str, pattern: re.Pattern[str]) -> bool:
    """Whether a regular expression matches the beginning of a name."""
    return any(pattern.match(full) is not None for full in full_names(name))


def listed(patterns: list[str], field: str) -> Callable[[str], bool]:
    """Whether a list of modules contains a name, by the rule of Transformers' `should_convert_module`.

    An entry is the beginning of a name up to a dot or its end (a regular expression), or the end of a name. AutoFP8 marks regular
    expressions with "re:", and these match the beginning of a name.
    """
    marked = [compiled(pattern[3:], field) for pattern in patterns if pattern.startswith("re:")]
    plain = [compiled(pattern, field).pattern for pattern in patterns if not pattern.startswith("re:")]
    # One expression for all entries: lists may have hundreds.
    begins, ends = re.compile(rf"(?:{'|'.join(f'(?:{pattern})' for pattern in plain)})(?:(?<=\.)|(?=\.|$))"), tuple(plain)

    def contains(name: str) -> bool:
        return any(matched(name, pattern) for pattern in marked) or (
            bool(plain) and (matched(name, begins) or any(full.endswith(ends) for full in full_names(name))))
    return contains


def check_fields(method: str, config: Mapping[str, Any], known: Collection[str], only: Mapping[str, tuple[Any, ...]] = {},
                 within: str = "quantization_config") -> None:
    """Raise `NotSupportedYet` for a field that nothing here reads. Null, false and empty values ask for nothing.

    known: fields that take effect, or that only describe the checkpoint. only: values of fields that are supported with no others."""
    for field, value in config.items():
        if value is None or value is False or field in known or (isinstance(value, list | dict | str) and not value):
            continue
        if field not in only:
            hint = nearest(field, [*known, *only]) or "."
            raise NotSupportedYet(
                f"{within}: {field} {shown(value)} is not known in {method} checkpoints{hint} Set it to null if it only says how the "
                "checkpoint was made. Otherwise use another checkpoint, or the unquantized one", "model")
        one_of(method, field, value, only[field])


def same(config: Mapping[str, Any], fields: tuple[str, ...], kind: type, default: Any) -> Any:
    """The value of a field that has several names. Raises `ModelError` if they contradict each other."""
    found = {field: value for field in fields if (value := read(config, Key(field, kind, None))) is not None}
    values = {field: value.lower() if isinstance(value, str) else value for field, value in found.items()}
    if len(set(values.values())) > 1:
        written = " and ".join(f"{field} {shown(value)}" for field, value in found.items())
        raise ModelError(f"quantization_config: {written} contradict each other: correct one of them", "model")
    return next(iter(values.values()), default)


def check_block_name(method: str, config: Mapping[str, Any]) -> None:
    """Raise `NotSupportedYet` if `block_name_to_quantize` names other layers than the decoder's."""
    field = "block_name_to_quantize"
    value = config.get(field)
    written = value.split(",") if isinstance(value, str) else value or []
    blocks = [full for block in BLOCKS for full in full_names(block)]
    if not isinstance(written, list) or (written and not any(name in blocks for name in written)):
        raise unsupported(method, field, value, "model.layers")


def dynamic(method: str, config: Mapping[str, Any], fields: Collection[str],
            make: Callable[[Mapping[str, Any]], LinearMethod]) -> Callable[[str], LinearMethod | None]:
    """The method that GPTQModel's `dynamic` gives a module; None: it says nothing about it.

    It maps a regular expression to fields that replace those of the whole checkpoint. "-:" in front of one leaves modules unquantized,
    and these come first, wherever they stand. fields: those that can be replaced. make: the method of a quantization_config."""
    found: list[tuple[re.Pattern[str], LinearMethod]] = []
    written: dict[str, Any] = read(config, Key("dynamic", dict, {}))
    for key in sorted(written, key=lambda key: not key.startswith("-:")):
        values, pattern = written[key], compiled(key.removeprefix("-:").removeprefix("+:"), "dynamic")
        if not isinstance(values, Mapping):
            raise ModelError(f"quantization_config: dynamic has no object of fields for {key!r}: correct it", "model")
        check_fields(method, values, () if key.startswith("-:") else {*fields, *RECORDED}, within=f"quantization_config.dynamic[{key!r}]")
        found.append((pattern, DENSE if key.startswith("-:") else make({**config, **values})))
    return lambda name: next((stored for pattern, stored in found if matched(name, pattern)), None)


def names(config: Mapping[str, Any], key: str) -> list[str]:
    """A field with a list of names. A missing one is empty."""
    found = read(config, Key(key, list, []))
    for name in found:
        if not isinstance(name, str):
            raise ModelError(f"quantization_config: {key} must be a list of names, and contains {shown(name)}: correct it", "model")
    return list(found)


def unsupported(method: str, field: str, value: object, allowed: object) -> NotSupportedYet:
    """The error for a variant of a format."""
    return NotSupportedYet(f"quantized weights ({method} with {field} {shown(value)}) are not supported yet: use a checkpoint with "
                           f"{field} {allowed}, or the unquantized one", "model")


def one_of(method: str, field: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    """The value, if it is one of those that are supported."""
    if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
        raise unsupported(method, field, value, " or ".join(str(a) for a in allowed))
    return value


def group_size(config: Mapping[str, Any], key: str = "group_size") -> int:
    """Inputs that share a scale; -1: all of them."""
    group: int = read(config, Key(key, int))
    if group != -1 and group < 1:
        raise ModelError(f"quantization_config: {key} must be at least 1, or -1 for one group, got {group}: correct it", "model")
    return group
