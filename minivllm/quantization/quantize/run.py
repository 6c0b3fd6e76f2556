"""Quantize a model, decoder layer by decoder layer."""
from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivllm.errors import InvalidInput, ModelError
from minivllm.quantization.packing import codes_per_period
from minivllm.quantization.quantize import calibration, checkpoint
from minivllm.quantization.quantize.awq import FOLDS, awq
from minivllm.quantization.quantize.checkpoint import awq_tensors, gptq_tensors
from minivllm.quantization.quantize.eight_bit import fp8, int8
from minivllm.quantization.quantize.gptq import gptq
from minivllm.quantization.quantize.groups import Grid, RoundedWeight, round_to_nearest
from minivllm.quantization.quantize.layers import LayerInputs, decoder_layers, layer_inputs, linears_of, run_layer
from minivllm.quantization.quantize.memory import memory_report
from minivllm.quantization.quantize.settings import QuantizeConfig, quantization_config
from minivllm.quantization.quantize.statistics import InputStatistics, observed

GROUP_SIZES = (128, 64, 32)  # the default is the first that fits


def quantize(source: Path, out: Path, config: QuantizeConfig, say: Callable[[str], object] = print) -> None:
    """Write a quantized copy of a model folder into `out`, which `checkpoint.prepare` has checked. say: prints a line.

    Raises `InvalidInput` and `ModelError` before the long work begins, except if the model fails on the calibration text.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    start = time.monotonic()
    device = _device(config.device)
    model_config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in model_config:
        raise ModelError("the model is quantized already: name the checkpoint that it was made from", "model")
    with torch.device("meta"):
        plan = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, trust_remote_code=False))
    grid = _check_shapes(plan, config, say)
    windows = None
    if config.calibrated:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        windows = calibration.windows(tokenizer, config.calibration, config.value("num_samples"), config.value("seq_len"))
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", trust_remote_code=False).eval()
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    tensors = _Quantizer(model, config, grid, device).run(windows)
    entry = quantization_config(config, grid.group_size, _dense_linears(model))
    after = checkpoint.write(out, source, tensors, {**model_config, "quantization_config": entry})
    say(f"{out}: {before / 1e6:,.1f} MB of weights in {str(model.dtype).removeprefix('torch.')} became {after / 1e6:,.1f} MB "
        f"({config.method}, {config.width} bits) in {time.monotonic() - start:.0f} s")
    say(memory_report(device))


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidInput("device is cuda, but PyTorch finds no GPU here: use auto or cpu", "device")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _dense_linears(model: Any) -> list[str]:
    """Linear layers outside the decoder layers, such as lm_head. They stay as they are."""
    return [name.rpartition(".")[2] for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not name.startswith(f"{_prefix(model)}.")]


def _prefix(model: Any) -> str:
    """The name of the list of decoder layers, such as model.layers."""
    layers = decoder_layers(model)
    return next(name for name, module in model.named_modules() if module is layers)


# ---- what fits

def _check_shapes(model: Any, config: QuantizeConfig, say: Callable[[str], object]) -> Grid:
    """The grid for this model's weights. model: on the meta device. Raises `InvalidInput` for a shape that the file format lacks."""
    kind = model.config.model_type
    if config.method == "awq" and kind not in FOLDS:
        raise InvalidInput(f"method awq must know which module makes the inputs of each layer, and does not for model_type {kind!r}, only "
                           f"for {', '.join(FOLDS)}: use gptq", "method")
    experts = next((name for name, weight in decoder_layers(model).named_parameters() if "experts" in name and weight.dim() == 3), None)
    if experts is not None:
        raise ModelError(f"model_type {kind!r} is a mixture of experts ({experts}), which cannot be quantized here yet: serve it as it is, "
                         "or with quantization='fp8', which leaves the experts as they are", "model")
    shapes = {name: tuple(module.weight.shape) for name, module in linears_of(decoder_layers(model)[0]).items()}
    if not shapes:
        raise ModelError(f"the decoder layers of model_type {kind!r} have no linear layers: this model cannot be quantized", "model")
    bits = config.width
    period = {"awq": 8, "fp8": 1}.get(config.method) or codes_per_period(bits)  # weights that are packed together
    for name, (n, k) in shapes.items():
        if n % period or k % period:
            raise InvalidInput(f"{config.method} with {bits} bits needs multiples of {period} outputs and inputs, but {name} has {n} and "
                               f"{k}: use method fp8", "method")
    if not config.grouped:
        return Grid(bits, -1, True, 0)
    size = _group_size({k for _, k in shapes.values()}, config, say)
    return Grid(bits, size, config.method != "awq" and config.value("symmetric"), 0 if config.method == "awq" else 1)


def _group_size(inputs: set[int], config: QuantizeConfig, say: Callable[[str], object]) -> int:
    if config.group_size == -1:
        return -1
    wanted = GROUP_SIZES if config.group_size is None else (config.group_size,)
    fitting = [size for size in wanted if all(k % size == 0 for k in inputs)]
    widths = ", ".join(map(str, sorted(inputs)))
    if not fitting:
        largest = math.gcd(*inputs)
        raise InvalidInput(f"group_size {' or '.join(map(str, wanted))} does not divide the inputs of every layer ({widths}): give "
                           f"{largest} or a divisor of it", "group_size")
    if config.group_size is None:
        say(f"groups of {fitting[0]} inputs: the largest of {', '.join(map(str, GROUP_SIZES))} that divides {widths}")
    return fitting[0]


# ---- the work

class _Quantizer:
    """The model, and the tensors of the output so far. Quantized layers leave the model, so that memory does not grow."""

    def __init__(self, model: Any, config: QuantizeConfig, grid: Grid, device: torch.device) -> None:
        self.model, self.config, self.grid, self.device = model, config, grid, device
        self.dtype = model.dtype
        self.tensors: dict[str, Tensor] = {}

    def run(self, windows: Tensor | None) -> dict[str, Tensor]:
        """All tensors of the checkpoint, on the CPU. windows: calibration text, [num_samples, seq_len] token ids."""
        from tqdm import tqdm

        layers, prefix = decoder_layers(self.model), _prefix(self.model)
        inputs = None if windows is None else layer_inputs(self.model, windows, self.device)
        with tqdm(total=len(layers), unit="layer", desc=f"quantizing ({self.config.method})", disable=None) as bar:
            for i, layer in enumerate(layers):
                layer.to(self.device, torch.float32)
                self._store(f"{prefix}.{i}", layer, self._quantize(layer, i, inputs))
                layer.to("meta")
                bar.update()
        self._store_rest(prefix)
        return self.tensors

    @torch.no_grad()
    def _quantize(self, layer: nn.Module, i: int, inputs: LayerInputs | None) -> Mapping[str, RoundedWeight | Mapping[str, Tensor]]:
        """The layer's linear layers by name, quantized. `inputs` become those of the next layer."""
        linears, method = linears_of(layer), self.config.method
        if inputs is None:
            return {name: self._directly(linear.weight.data) for name, linear in linears.items()}
        with observed(linears) as statistics:
            outputs = list(run_layer(layer, inputs.hidden, inputs.arguments[i], self.device))
        _check_finite(i, statistics)
        if method == "awq":  # its errors are not compensated, so the next layer is calibrated with exact inputs
            inputs.hidden = outputs
            return awq(layer, statistics, FOLDS[self.model.config.model_type], self.grid)
        found = {}
        for name, linear in linears.items():
            weight, stats = linear.weight.data, statistics[name]
            found[name] = gptq(weight, stats.hessian, self.grid.of(weight), desc_act=self.config.value("desc_act"),
                               damping=self.config.value("damping"))
            linear.weight.data = found[name].dequantized()
        inputs.hidden = list(run_layer(layer, inputs.hidden, inputs.arguments[i], self.device))
        return found

    def _directly(self, weight: Tensor) -> RoundedWeight | dict[str, Tensor]:
        """weight: float32 [N, K]"""
        if self.config.method == "rtn":
            return round_to_nearest(weight, self.grid.of(weight))
        return {"fp8": fp8, "int8": int8}[self.config.method](weight, self.dtype)

    def _store(self, prefix: str, layer: nn.Module, quantized: Mapping[str, RoundedWeight | Mapping[str, Tensor]]) -> None:
        """The tensors of one decoder layer: the quantized ones, and all others in the model's dtype."""
        for name, weight in quantized.items():
            if isinstance(weight, RoundedWeight):
                weight = awq_tensors(weight) if self.config.method == "awq" else gptq_tensors(weight, self.grid.bits)
            self.tensors |= {f"{prefix}.{name}.{suffix}": tensor.cpu() for suffix, tensor in weight.items()}
        self.tensors |= {f"{prefix}.{name}": tensor.to("cpu", self.dtype) for name, tensor in layer.state_dict().items()
                         if name.removesuffix(".weight") not in quantized}

    def _store_rest(self, prefix: str) -> None:
        """Everything outside the decoder layers. A tied output head is stored once, as the embedding."""
        known: set[int] = set()
        for name, tensor in self.model.state_dict().items():
            if not name.startswith(f"{prefix}.") and tensor.data_ptr() not in known:
                known.add(tensor.data_ptr())
                self.tensors[name] = tensor.to("cpu", self.dtype)


def _check_finite(i: int, statistics: Mapping[str, InputStatistics]) -> None:
    for name, stats in statistics.items():
        if not stats.hessian.isfinite().all():
            raise ModelError(f"the inputs of {name} in layer {i} are not finite on the calibration text: is the checkpoint damaged? "
                             "Methods fp8 and int8 need no calibration", "model")
