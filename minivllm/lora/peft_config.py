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

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"  # may run code when it is read
MOST = 1 << 20  # largest rank or alpha: far beyond real adapters
PARAM = "lora_path"  # the field that an error about an adapter names
# Ways to start the training that leave the base model's weights alone; the others train beside changed ones.
INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
TASKS = (None, "", "CAUSAL_LM", "FEATURE_EXTRACTION")
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
    "kasa_config": "train the adapter without KaSA",
    "megatron_config": "export the adapter with PEFT's own layers",
}
# Settings of training, and notes; they change nothing of a trained adapter.
INERT = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
})
# Applied, or checked: of some values only those are accepted that change nothing.
APPLIED = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights", "task_type",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
})


@dataclass(frozen=True, slots=True)
class AdaptedModules:
    """Which modules of a model have an adapter: PEFT's rule. PEFT leaves out weights of all others."""

    targets: str | list[str] | None  # a regular expression, or names or their ends; None: not recorded
    excluded: str | list[str] | None
    layers: list[int] | None  # None: all. Only for a list of targets
    layers_patterns: list[str]  # before a layer's number; []: any module's name

    @classmethod
    def of(cls, config: Mapping[str, Any], path: Path) -> AdaptedModules:
        """Raises `ModelError` that names a wrong setting of `config`, the content of `path`."""
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = config.get(name)
            if not (value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))):
                raise ModelError(f"{path}: {name} must be a string or a list of strings, got {shown(value)}: correct it", PARAM)
            for text in [value] if isinstance(value, str) else value if name == "layers_pattern" and value else ():
                _check_regex(text, name, path)
        layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or []
        layers = [layers] if isinstance(layers, int) else layers or None
        if layers is not None and not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
            raise ModelError(f"{path}: layers_to_transform must be a layer or a list of layers, got {shown(layers)}: correct it", PARAM)
        patterns = [patterns] if isinstance(patterns, str) else patterns
        return cls(config.get("target_modules"), config.get("exclude_modules"), layers, patterns)

    def __contains__(self, name: str) -> bool:
        """name: as PEFT sees it, such as model.layers.0.self_attn.q_proj."""
        if _listed(self.excluded, name):
            return False
        if self.targets is None or (isinstance(self.targets, str) and self.targets.lower() == "all-linear"):
            return True
        if isinstance(self.targets, str) or name in self.targets or self.layers is None:
            return _listed(self.targets, name)
        patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in self.layers_patterns] or [r".*?\.[^.]*\.(\d+)\."]
        index = next((found[1] for p in patterns if (found := re.match(p, name))), None)
        return _listed(self.targets, name) and index is not None and int(index) in self.layers


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The applied settings."""

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    modules: AdaptedModules

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
                   _pattern(config, "rank_pattern", path, whole=True), _pattern(config, "alpha_pattern", path),
                   AdaptedModules.of(config, path))

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
    init = config.get("init_lora_weights", True)
    if (init.lower() if isinstance(init, str) else init) not in INITS:
        raise NotSupportedYet(f"{path}: init_lora_weights {shown(init)} is not supported, because it changes weights of the base model: "
                              "save the adapter with path_initial_model_for_weight_conversion, which makes an ordinary one of it", PARAM)
    if config.get("task_type") not in TASKS:
        raise NotSupportedYet(f"{path}: task_type {shown(config['task_type'])} is not supported: use an adapter of a CAUSAL_LM", PARAM)
    if not isinstance(config.get("use_rslora") or False, bool):
        raise ModelError(f"{path}: use_rslora must be true or false, got {shown(config['use_rslora'])}: correct it", PARAM)
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
        _check_regex(key, name, path)
        _checked(value, f"{name}[{key!r}]", path, whole)
    return found


def _check_regex(text: str, name: str, path: Path) -> None:
    try:
        compile_pattern(text)
    except ValueError as error:
        raise ModelError(f"{path}: {name} has {shown(text)}, which is no regular expression that can be used ({error}): correct it",
                         PARAM) from error


def _listed(rule: str | list[str] | None, name: str) -> bool:
    """Whether a regular expression matches a name, or a list has it or its end: PEFT's rule."""
    if isinstance(rule, str):
        return re.fullmatch(rule, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in rule or ())


def _matching(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first key that is the end of the name, or matches it as a regular expression: PEFT's rule."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)
