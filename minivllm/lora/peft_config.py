"""adapter_config.json, as PEFT writes it: which settings this engine applies, which it may leave out, and which it refuses."""
from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minivllm.errors import ModelError, NotSupportedYet, shown
from minivllm.families.model_folder import check_links, compile_pattern, read_json

CONFIG_FILE = "adapter_config.json"
MOST = 1 << 20  # largest rank or alpha: far beyond real adapters
PARAM = "lora_path"  # the field that an error about an adapter names
# Settings that would change the result, and what to do instead. A value that requests nothing (None, False, an empty list) is fine.
REFUSED: Mapping[str, str] = {
    "use_dora": "train the adapter without DoRA",
    "modules_to_save": "train the adapter without it, or merge it into the base model",
    "trainable_token_indices": "train the adapter without new tokens",
    "layer_replication": "use the model with the replicated layers as base model",
    "lora_bias": "train the adapter with lora_bias=False",
    "fan_in_fan_out": "use a base model with ordinary linear layers",
    "target_parameters": "train the adapter on modules",
    "alora_invocation_tokens": "train an ordinary LoRA adapter",
    "use_qalora": "train the adapter without QALoRA",
    "use_bdlora": "train the adapter without BD-LoRA",
    "arrow_config": "train an ordinary LoRA adapter",
    "velora_config": "train an ordinary LoRA adapter",
    "monteclora_config": "train an ordinary LoRA adapter",
    "megatron_config": "export the adapter with PEFT's own layers",
}
# Settings of training, and notes; they change nothing of a trained adapter. (Which modules have weights says the weight file itself.)
INERT = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
})
APPLIED = frozenset({"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias"})


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The applied settings."""

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    @classmethod
    def read(cls, folder: Path) -> PeftConfig:
        """Raises `ModelError` for a folder that is no adapter, and `NotSupportedYet` naming a setting that is not supported."""
        path = folder / CONFIG_FILE
        if not path.is_file():
            hint = "it is no folder" if not folder.is_dir() else f"it has no {CONFIG_FILE}"
            raise ModelError(f"{folder} is not a LoRA adapter ({hint}): give a folder that PEFT's save_pretrained has written", PARAM)
        check_links(folder, PARAM)
        config = read_json(path, PARAM)
        _check(config, path)
        return cls(_number(config, "r", 8, path, whole=True), _number(config, "lora_alpha", 8, path), config.get("use_rslora") is True,
                   _pattern(config, "rank_pattern", path, whole=True), _pattern(config, "alpha_pattern", path))

    @property
    def max_rank(self) -> int:
        """The largest rank of a module."""
        return max((self.rank, *self.rank_pattern.values()))

    def of_module(self, name: str) -> tuple[int, float]:
        """(rank, scaling) of a module. The scaling is alpha / r, or alpha / sqrt(r) with rslora."""
        rank = _matching(self.rank_pattern, name, self.rank)
        alpha = _matching(self.alpha_pattern, name, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def _check(config: Mapping[str, Any], path: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise NotSupportedYet(f"{path}: peft_type {shown(kind)} is not supported: use a LoRA adapter", PARAM)
    bias = config.get("bias", "none")
    if bias != "none":
        raise NotSupportedYet(f"{path}: bias {shown(bias)} is not supported: train the adapter with bias='none'", PARAM)
    for name, value in config.items():
        if name in APPLIED or name in INERT or value in (None, False, "", [], {}):
            continue
        fix = REFUSED.get(name, "leave it out, if it changes nothing of the trained adapter")
        raise NotSupportedYet(f"{path}: {name} {shown(value)} is not supported: {fix}", PARAM)


def _number(config: Mapping[str, Any], name: str, default: int, path: Path, *, whole: bool = False) -> Any:
    return _checked(config.get(name, default), name, path, whole)


def _checked(value: Any, name: str, path: Path, whole: bool) -> Any:
    kinds = (int,) if whole else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not (1 if whole else -MOST) <= value <= MOST:  # NaN is refused too
        what = f"a whole number from 1 to {MOST:,}" if whole else f"a number of at most {MOST:,}"
        raise ModelError(f"{path}: {name} must be {what}, got {shown(value)}: correct it", PARAM)
    return value


def _pattern(config: Mapping[str, Any], name: str, path: Path, *, whole: bool = False) -> dict[str, Any]:
    found = config.get(name) or {}
    if not isinstance(found, dict):
        raise ModelError(f"{path}: {name} must be a JSON object, got {shown(found)}: correct it", PARAM)
    for key, value in found.items():
        try:
            compile_pattern(key)
        except ValueError as error:
            raise ModelError(f"{path}: {name} has {shown(key)}, which is no regular expression that can be used ({error}): correct it",
                             PARAM) from error
        _checked(value, f"{name}[{key!r}]", path, whole)
    return found


def _matching(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first key that is the end of the name, or matches it as a regular expression: PEFT's rule."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)
