"""A LoRA adapter as PEFT saves it: a folder with adapter_config.json and adapter_model.safetensors.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight   [r, inputs]
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight   [outputs, r]

Reading is total: each tensor belongs to a linear layer of the base model and has its shape, or an error names it.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from minivllm.errors import InvalidInput, ModelError, NotSupportedYet
from minivllm.families import LinearSpec
from minivllm.lora.layout import AdapterLayout
from minivllm.lora.peft_config import CONFIG_FILE, PARAM, PICKLED_FILE, WEIGHTS_FILE, PeftConfig

_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>A|B)(\.[^.]+)?\.weight")  # an adapter's name may stand before "weight"
PREFIX = "base_model.model."  # of PEFT's own wrappers
_WRAPPERS = frozenset({"base_model", "model", "decoder", "language_model", "transformer", "gpt_neox", "module", "_orig_mod"})
_OTHERS = {  # parts of names of tensors that this engine does not apply -> what they are
    "lora_embedding_": "an adapter of the embeddings", "lora_magnitude_vector": "DoRA", "modules_to_save": "modules_to_save",
    "token_adapter": "trained tokens", ".lora_B.bias": "lora_bias", "embed_tokens": "the embeddings", "lm_head": "the output head",
    ".experts.": "an expert of a mixture of experts",
}


@dataclass(frozen=True, slots=True)
class ModuleDelta:
    """What an adapter adds to one module of a checkpoint: scaling * (x A^T) B^T."""

    a: Tensor  # [r, inputs]
    b: Tensor  # [outputs, r]
    scaling: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """A whole adapter on the host, in the dtype of its file."""

    modules: Mapping[str, ModuleDelta]  # by the module's name in checkpoints, without prefix: layers.0.self_attn.q_proj

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(len(delta.a) for delta in self.modules.values())


def read_adapter(folder: str | Path, layout: AdapterLayout, max_rank: int) -> Adapter:
    """Read and check an adapter for a model. Raises `InvalidInput` that names the file, the tensor or the setting."""
    folder = Path(folder).expanduser()
    config = PeftConfig.read(folder)
    known = {name: (adapted.whole, part) for adapted in layout.layers.values()
             for part, name in enumerate(adapted.whole.checkpoint_names)}
    found: dict[str, dict[str, Tensor]] = {}
    full_names: dict[str, str] = {}  # of modules, as PEFT matches them: model.layers.0.self_attn.q_proj
    for name, tensor in _tensors(folder).items():
        match = _TENSOR.fullmatch(name)
        module = None if match is None else _module(match["module"], known)
        if match is None or module is None:
            raise _foreign(name, folder)
        full_name = full_names.setdefault(module, match["module"].removeprefix(PREFIX))
        if full_name not in config.modules:
            raise ModelError(f"the adapter in {folder} has the tensor {name}, and its {CONFIG_FILE} gives {full_name} no adapter (see "
                             "target_modules, exclude_modules and layers_to_transform): save the adapter again", PARAM)
        if match["side"] in found.setdefault(module, {}):
            raise ModelError(f"the adapter in {folder} has two tensors lora_{match['side']} for {full_name}: save the adapter again", PARAM)
        found[module][match["side"]] = tensor
    if not found:
        raise ModelError(f"{folder / WEIGHTS_FILE} has no tensors: save the adapter again", PARAM)
    return Adapter({module: _delta(module, sides, *known[module], *config.of_module(full_names[module]), max_rank, folder)
                    for module, sides in found.items()})


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        if (folder / PICKLED_FILE).is_file():
            raise NotSupportedYet(f"{folder} has its weights in {PICKLED_FILE}, which may run code when it is read: save the adapter with "
                                  "safe_serialization=True", PARAM)
        raise ModelError(f"{folder} has no {WEIGHTS_FILE}: save the adapter again, or complete the download", PARAM)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is damaged or not a safetensors file ({error}): save the adapter again", PARAM) from error


def _module(name: str, known: Mapping[str, object]) -> str | None:
    """The module's name without the wrappers of PEFT and Transformers. None: the base model has no such linear layer."""
    parts = name.split(".")
    while parts and ".".join(parts) not in known and parts[0] in _WRAPPERS:
        parts = parts[1:]
    return ".".join(parts) if ".".join(parts) in known else None


def _foreign(name: str, folder: Path) -> InvalidInput:
    what = next((what for part, what in _OTHERS.items() if part in name), None)
    if what is not None:
        return NotSupportedYet(f"the adapter in {folder} has the tensor {name} ({what}), which is not supported: train the adapter on "
                               "other linear layers of the decoder only", PARAM)
    return ModelError(f"the adapter in {folder} has the tensor {name}, and the base model has no such linear layer: use the adapter with "
                      "the model that it was trained for", PARAM)


def _delta(module: str, sides: Mapping[str, Tensor], linear: LinearSpec, part: int, rank: int, scaling: float, max_rank: int,
           folder: Path) -> ModuleDelta:
    if len(sides) < 2:
        raise ModelError(f"the adapter in {folder} has only lora_{next(iter(sides))} for {module}: save the adapter again", PARAM)
    a, b = sides["A"], sides["B"]
    outputs = linear.stored_rows[part]
    for side, tensor, shape in (("A", a, (rank, linear.cols)), ("B", b, (outputs, rank))):
        if tensor.shape != shape:
            other = "r" if tensor.shape[side == "B"] != rank and tensor.shape[side == "A"] == shape[side == "A"] else "the base model"
            raise ModelError(f"the adapter in {folder} does not match: {module}.lora_{side}.weight is {list(tensor.shape)}, and {other} "
                             f"makes it {list(shape)}: use the adapter with its own adapter_config.json and base model", PARAM)
        if not tensor.is_floating_point():
            raise ModelError(f"{module}.lora_{side}.weight of the adapter in {folder} has dtype {tensor.dtype}: save it in bfloat16", PARAM)
    if rank > max_rank:
        raise InvalidInput(f"the adapter in {folder} has rank {rank} ({module}), and max_lora_rank is {max_rank}: start the engine with "
                           f"max_lora_rank={rank} (--max-lora-rank {rank})", "max_lora_rank")
    return ModuleDelta(a, b, scaling)
