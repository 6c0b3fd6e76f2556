"""The settings of `minivllm quantize`, and how they are written into the output's config.json. Imports without torch."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minivllm.config import check_types, option
from minivllm.errors import InvalidInput

METHODS = ("awq", "gptq", "rtn", "fp8", "int8")
BITS: Mapping[str, tuple[int, ...]] = {"awq": (4,), "gptq": (2, 3, 4, 8), "rtn": (2, 3, 4, 8), "fp8": (8,), "int8": (8,)}
CALIBRATION = ("calibration", "num_samples", "seq_len")
# Settings that have an effect on each method, beside those of all methods.
USED: Mapping[str, tuple[str, ...]] = {
    "awq": ("group_size", *CALIBRATION), "gptq": ("group_size", "symmetric", "desc_act", "damping", *CALIBRATION),
    "rtn": ("group_size", "symmetric"), "fp8": (), "int8": (),
}
DEFAULTS: Mapping[str, Any] = {"symmetric": False, "desc_act": False, "damping": 0.01, "num_samples": 32, "seq_len": 512}


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Raises `InvalidInput` that names the field, the value and the allowed values. None: the default of the method."""

    method: str = option("awq",
        "awq: 4 bits, scaled by activations; gptq: 2 to 8 bits, errors compensated; rtn: round to nearest, a baseline in GPTQ's layout; "
        "fp8: 8-bit floats; int8: one scale per row", choices=METHODS)
    bits: int | None = option(None, "bits per weight: 2, 3, 4 or 8 with gptq and rtn (default: 4; fp8 and int8: 8)")
    group_size: int | None = option(None,
        "inputs that share a scale; -1 with gptq and rtn: all (default: the largest of 128, 64 and 32 that divides every layer's inputs)")
    symmetric: bool | None = option(None, "gptq and rtn: no zero points (default: off)")
    desc_act: bool | None = option(None,
        "gptq: inputs with similar activations share a group; more exact, but slower to run, because inputs are reordered (default: off)")
    damping: float | None = option(None, "gptq: fraction of the Hessian's mean diagonal that is added to it (default: 0.01)")
    calibration: str | None = option(None,
        "awq and gptq: text like the text that the model will see; plain, or .jsonl with a field text (default: documentation of Python's "
        "standard library)", metavar="FILE")
    num_samples: int | None = option(None, "awq and gptq: windows of calibration text (default: 32)")
    seq_len: int | None = option(None, "awq and gptq: tokens per window (default: 512)")
    device: str = option("auto", "where layers are computed, one at a time; auto: the GPU if there is one", choices=("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        check_types(self)
        allowed = BITS[self.method]
        if self.bits is not None and self.bits not in allowed:
            one_of = "" if len(allowed) == 1 else "one of "
            others = ", or use method gptq" if self.method == "awq" else ""
            raise InvalidInput(f"bits must be {one_of}{', '.join(map(str, allowed))} with method {self.method}, got {self.bits}: leave it "
                               f"out{others}", "bits")
        for name in (*DEFAULTS, "group_size", "calibration"):
            if getattr(self, name) is not None and name not in USED[self.method]:
                users = " and ".join(method for method in METHODS if name in USED[method])
                raise InvalidInput(f"{name} has no effect on method {self.method}, only on {users}: leave it out", name)
        size = self.group_size
        if size is not None and not (size >= 8 or (size == -1 and self.method != "awq")):
            also = "" if self.method == "awq" else ", or -1 for one group per row"
            raise InvalidInput(f"group_size must be at least 8{also}, got {size}", "group_size")
        for name, low, high in (("num_samples", 1, 2**20), ("seq_len", 16, 2**20), ("damping", 1e-9, 10.0)):
            value = self.value(name) if name in USED[self.method] else low
            if not low <= value <= high:
                raise InvalidInput(f"{name} must be in {low} .. {high}, got {value}", name)

    def value(self, name: str) -> Any:
        """A setting, or its default."""
        given = getattr(self, name)
        return DEFAULTS[name] if given is None else given

    @property
    def width(self) -> int:
        """Bits per weight."""
        return self.bits or BITS[self.method][0] if self.method not in ("gptq", "rtn") else self.bits or 4

    @property
    def grouped(self) -> bool:
        """Whether weights have scales per group."""
        return "group_size" in USED[self.method]

    @property
    def calibrated(self) -> bool:
        """Whether the method needs text."""
        return "calibration" in USED[self.method]


def quantization_config(config: QuantizeConfig, group_size: int, dense: list[str]) -> dict[str, Any]:
    """The entry of config.json by which loaders know the layout. dense: names of linear layers that are not quantized."""
    if config.method == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm",
                "modules_to_not_convert": dense}
    if config.method in ("gptq", "rtn"):
        return {"quant_method": "gptq", "bits": config.width, "group_size": group_size, "desc_act": bool(config.desc_act),
                "sym": config.value("symmetric"), "lm_head": False, "checkpoint_format": "gptq"}
    kind = "float" if config.method == "fp8" else "int"
    weights = {"num_bits": 8, "type": kind, "strategy": "channel", "symmetric": True, "dynamic": False}
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True} if kind == "float" else None
    return {"quant_method": "compressed-tensors", "format": "float-quantized" if kind == "float" else "pack-quantized",
            "quantization_status": "compressed", "ignore": dense,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}}
