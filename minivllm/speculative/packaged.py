"""Which model a head was trained for, and the heads that come with the package: `heads/NAME/` for the default model.

`minivllm train-draft` records the target in a head's config.json, so that a head is not used with another model unnoticed.
"""
from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from minivllm.families import ModelSpec
from minivllm.families.model_folder import read_json
from minivllm.models.loader import open_checkpoint

TARGET = "trained_for"  # entry of a head's config.json
HEADS = Path(__file__).parent / "heads"
FINAL_NORM = "norm.weight"  # in checkpoints of all targets that a head fits


def sizes_of(target: ModelSpec) -> dict[str, Any]:
    """What is known of a target before its weights are read."""
    return {"architecture": target.architecture, "vocab_size": target.vocab_size, "hidden_size": target.hidden_size,
            "num_layers": target.num_layers}


def fingerprint(folder: Path) -> str | None:
    """SHA-256 of a model's final norm in bfloat16: norms are trained, and not quantized. None: the checkpoint has none."""
    with open_checkpoint(folder) as found:
        if FINAL_NORM not in found:
            return None
        weight = found[FINAL_NORM].read().to(torch.bfloat16).view(torch.int16)
        return hashlib.sha256(weight.numpy().astype("<i2").tobytes()).hexdigest()


def packaged_head(target: ModelSpec, folder: Path | None) -> Path | None:
    """The folder of the head for a model. folder: of its weights; None: they are not here, and only its sizes are compared."""
    for head in sorted(path.parent for path in HEADS.glob("*/config.json")):
        if belongs(read_json(head / "config.json").get(TARGET), target, folder):
            return head
    return None


def belongs(record: Any, target: ModelSpec, folder: Path | None) -> bool:
    """Whether a head with this record was trained for the target."""
    if not isinstance(record, dict) or any(record.get(name) != value for name, value in sizes_of(target).items()):
        return False
    return folder is None or record.get("final_norm") == fingerprint(folder)


def record_of(target: ModelSpec, name: str, folder: Path) -> dict[str, Any]:
    """The record of a target, for the config.json of its head."""
    return {"name": name, **sizes_of(target), "final_norm": fingerprint(folder)}
