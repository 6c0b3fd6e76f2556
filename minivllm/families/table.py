"""The supported architectures, and from config.json to `ModelSpec`."""
from __future__ import annotations

from collections.abc import Mapping

from minivllm.errors import NotSupportedYet
from minivllm.families.config_json import Config, Key, read
from minivllm.families.family import Family
from minivllm.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from minivllm.families.opt import OPT
from minivllm.families.spec import ModelSpec, model_error

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "OPTForCausalLM": OPT,
}


def parse_config(config: Config, families: Mapping[str, Family] = FAMILIES, methods: Mapping[str, object] = {}) -> ModelSpec:
    """The model that a parsed config.json describes. methods: names of the quantization methods that can load its weights.

    Raises `ModelError` for an unknown architecture or key, `NotSupportedYet` for quantized weights in another method.
    """
    architecture = _architecture(config, families)
    if quantization := read(config, Key("quantization_config", dict, {})):
        method = quantization.get("quant_method")
        if not isinstance(method, str) or method not in methods:
            raise NotSupportedYet(f"quantized weights (quant_method {method!r}) are not supported yet: use the model's unquantized "
                                  "checkpoint", "model")
    return families[architecture].parse(architecture, config)


def _architecture(config: Config, families: Mapping[str, Family]) -> str:
    named = config.get("architectures")
    if not isinstance(named, list) or not named:
        raise model_error(f"config.json names no model class under 'architectures'; supported: {', '.join(families)}")
    for name in named:
        if isinstance(name, str) and name in families:
            return str(name)
    raise model_error(f"the architecture {named[0]} is not supported; supported: {', '.join(families)}")
