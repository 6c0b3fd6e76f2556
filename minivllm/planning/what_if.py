"""Storages that a checkpoint does not have (yet), by name: how large would its AWQ or Q4_K_M version be?"""
from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from minivllm.errors import InvalidInput, nearest
from minivllm.families import LinearSpec, ModelSpec, embedding_spec, linear_specs
from minivllm.quantization.methods import ONLINE

# As the tools that write such checkpoints do by default: quantization_config of config.json.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm", "modules_to_not_convert": None},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "checkpoint_format": "gptq"},
}


def quantization_config(name: str, spec: ModelSpec, methods: Collection[str]) -> Mapping[str, Any]:
    """The quantization_config of the model's checkpoint in this storage. Raises `InvalidInput` for a name that is not known.

    name: of a method with its usual settings (groups of 128), or of a GGUF file such as Q4_K_M or Q8_0.
    """
    if name.lower() in DEFAULTS and name.lower() in methods:
        return DEFAULTS[name.lower()]
    kind = GGUF_FILES.get(name.upper())
    if kind is not None and "gguf" in methods:
        linears = (embedding_spec(spec), *linear_specs(spec).values())
        return {"quant_method": "gguf", "types": {part: _fitting(kind(spec, linear, part), linear) for linear in linears
                                                  for part in linear.checkpoint_names}}
    known = [*ONLINE, *(key for key in DEFAULTS if key in methods), *(GGUF_FILES if "gguf" in methods else ())]
    raise InvalidInput(f"quantization {name!r} cannot be planned{nearest(name, known)}; known: {', '.join(known)}", "quantization")


def _fitting(kind: str, linear: LinearSpec) -> str:
    """llama.cpp's replacement for types whose blocks of 256 do not fill a row."""
    return kind if linear.cols % 256 == 0 else {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}.get(kind, kind)


def _mixed(most: str, more: str) -> Callable[[ModelSpec, LinearSpec, str], str]:
    """llama.cpp's medium mixtures: the head, and v and down in the layers that lose most, have more bits (`llama_tensor_get_type`)."""
    def kind(spec: ModelSpec, linear: LinearSpec, part: str) -> str:
        if linear.name == "head" or (linear.name == "embed" and spec.tied):
            return more
        if part.endswith(("v_proj", "down_proj")):
            layer, count = int(linear.name.split(".")[1]), spec.num_layers
            if layer < count // 8 or layer >= 7 * count // 8 or (layer - count // 8) % 3 == 2:
                return more
        return most

    return kind


GGUF_FILES: Mapping[str, Callable[[ModelSpec, LinearSpec, str], str]] = {
    "Q4_K_M": _mixed("Q4_K", "Q6_K"), "Q5_K_M": _mixed("Q5_K", "Q6_K"), "Q6_K": lambda *_: "Q6_K", "Q8_0": lambda *_: "Q8_0",
    "Q4_0": lambda spec, linear, _: "Q6_K" if linear.name == "head" or (linear.name == "embed" and spec.tied) else "Q4_0",
}
