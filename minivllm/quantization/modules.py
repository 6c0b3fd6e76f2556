"""Which modules of a checkpoint are quantized: lists of names and patterns in a quantization_config, and errors about its fields."""
from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from minivllm.errors import ModelError, NotSupportedYet, shown
from minivllm.families import Key, LinearSpec, read
from minivllm.families.model_folder import compile_pattern
from minivllm.quantization.base import LinearMethod, MethodOf
from minivllm.quantization.dense import DENSE
from minivllm.quantization.parts import PartsMethod

# In front of our name of a module ("lm_head" has none). Lists contain any of these names.
PREFIXES = ("model.", "model.decoder.", "", "transformer.", "gpt_neox.", "language_model.model.", "model.language_model.")


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
