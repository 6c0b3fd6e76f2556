"""Quantized checkpoints of tiny models, in the layouts that quantizers document, and HF's model with the dequantized weights."""
from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minivllm.config import EngineConfig
from minivllm.families import parse_config
from minivllm.kernels import REFERENCE, Ops
from minivllm.layers.build import BuildContext
from minivllm.models.decoder import Decoder
from minivllm.models.hub import find_model
from minivllm.models.loader import load_model, weight_bytes
from minivllm.quantization.methods import METHODS, method_of
from tests.models.paged import Paged
from tests.models.tiny import hf_logits, make_hf

CPU = torch.device("cpu")
OPS = dataclasses.replace(REFERENCE, pack_weight=lambda weight, dtype: weight)  # the specification, and tensors whose bytes can be counted
TOKENS = [(7 * i) % 97 for i in range(16)]
KEEPING = ("minivllm.models.decoder", "minivllm.layers", "minivllm.quantization", "minivllm.kernels", "bitsandbytes")
Quantized = tuple[Mapping[str, Tensor], Tensor]  # suffix -> tensor of the checkpoint, and the dequantized weight [N, K]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2, "num_hidden_layers": 2}


def write(
    folder: Path, quantization: Mapping[str, Any] | None, quantize: Callable[[str, Tensor], Quantized | None], family: str = "Llama",
    *, separate_file: str | None = None, extra: Mapping[str, Tensor] | None = None, **config: Any,
) -> Any:
    """A checkpoint whose linear layers `quantize` (name, weight [N, K]) stores; None: unquantized. -> HF's dequantized model."""
    hf = make_hf(family, **(SIZES | config))
    tensors = {name: t.clone() for name, t in hf.state_dict().items()}
    for name, module in hf.named_modules():
        if isinstance(module, torch.nn.Linear) and (found := quantize(name, module.weight.data)) is not None:
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{suffix}": t.contiguous() for suffix, t in found[0].items()}
            module.weight.data = found[1].float()
    for name, stacked in hf.named_parameters():  # the experts of a layer
        if stacked.dim() == 3:
            del tensors[name]
            for e, matrix in enumerate(stacked.data):
                parts = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True)) if "gate_up" in name else {"down_proj": matrix}
                for part, weight in parts.items():
                    single = f"{name.rpartition('.')[0]}.{e}.{part}"
                    found = quantize(single, weight)
                    tensors |= {f"{single}.{suffix}": t.contiguous() for suffix, t in (found[0] if found else {"weight": weight}).items()}
                    if found is not None:
                        weight.copy_(found[1])
    if hf.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    folder.mkdir(exist_ok=True)
    save_file(tensors | dict(extra or {}), folder / "model.safetensors")
    hf.config.save_pretrained(folder)
    described = {**json.loads((folder / "config.json").read_text()), "architectures": [type(hf).__name__]}
    if separate_file is not None:
        (folder / separate_file).write_text(json.dumps(quantization))
    elif quantization is not None:
        described["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(described))
    return hf


def load(folder: Path, load_format: str = "auto", dtype: torch.dtype = torch.float32, ops: Ops = OPS) -> Decoder:
    """The model in a folder."""
    config = EngineConfig(model=str(folder), skip_tokenizer_init=True, load_format=load_format)
    described = find_model(config, lambda found: parse_config(found, methods=METHODS)).config
    build = BuildContext(CPU, dtype, ops, method_of(described))
    return load_model(parse_config(described, methods=METHODS), folder, load_format, build)


def logits(model: Decoder) -> Tensor:
    """[16, vocab] of TOKENS: 12 in one step, the rest one by one."""
    paged = Paged(model, len(TOKENS))
    return torch.cat([paged.run((0, TOKENS[:12])), *(paged.run((0, [t])) for t in TOKENS[12:])])


def check(folder: Path, hf: Any, atol: float = 1e-4) -> Decoder:
    """The model in `folder` has the logits of `hf`, and the bytes that were planned for it."""
    model = load(folder)
    want = hf_logits(hf, TOKENS)
    assert want.abs().max() > 0.5  # a comparison of zeros would prove nothing
    torch.testing.assert_close(logits(model), want, atol=atol, rtol=0.0)
    assert resident(model) == weight_bytes(model.spec, model.build)
    return model


def resident(model: Decoder) -> int:
    """Bytes of all tensors that a model keeps, except rotary frequencies."""
    found: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        elif type(value).__module__.startswith(KEEPING):
            slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
            for name in {*slots, *getattr(value, "__dict__", {})}:
                visit(getattr(value, name, None))

    for part in (model.embedding, model.layers, model.project_out, model.head):
        visit(part)
    return sum(found.values())


# ---- quantizers: round to nearest

def grouped(weight: Tensor, bits: int, group: int, sym: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """weight: [N, K] -> codes uint8 [N, K], scales float16 and zeros uint8 [N, ceil(K / group)]."""
    codes, scales, zeros = [], [], []
    for part in weight.split(weight.shape[1] if group == -1 else group, dim=1):
        low, high, levels = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0), (1 << bits) - 1
        if sym:
            high = torch.maximum(-low, high)
            low = -high
        scale = ((high - low) / levels).clamp_min(1e-4).half()
        zero = torch.full_like(low, (levels + 1) // 2) if sym else (-low / scale.float()).round().clamp(0, levels)
        codes.append((part / scale.float()[:, None] + zero[:, None]).round().clamp(0, levels).to(torch.uint8))
        scales.append(scale), zeros.append(zero.to(torch.uint8))
    return torch.cat(codes, 1), torch.stack(scales, 1), torch.stack(zeros, 1)


def ungrouped(codes: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor) -> Tensor:
    """The weight [N, K]. g_idx: [K], group of each input."""
    return (codes.float() - zeros.float()[:, g_idx]) * scales.float()[:, g_idx]


def in_groups(cols: int, group: int) -> Tensor:
    """[K]: group of each input, if groups are runs of neighbors."""
    return torch.arange(cols) // (cols if group == -1 else group)
