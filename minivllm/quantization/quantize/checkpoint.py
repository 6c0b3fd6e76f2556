"""The output: a folder in Hugging Face's layout, with the tensors of each method's file format."""
from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from minivllm.errors import InvalidInput
from minivllm.quantization.packing import pack_awq, pack_gptq, pack_gptq_zeros
from minivllm.quantization.quantize.groups import RoundedWeight

SHARD = "5GB"  # largest file
# Copied unchanged from the source, if they exist.
SMALL_FILES = ("generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
               "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "LICENSE")


def awq_tensors(weight: RoundedWeight) -> dict[str, Tensor]:
    """AutoAWQ's `gemm` layout."""
    return {"qweight": pack_awq(weight.codes.t()), "qzeros": pack_awq(weight.zeros.t().byte()),
            "scales": weight.scales.t().half().contiguous()}


def gptq_tensors(weight: RoundedWeight, bits: int) -> dict[str, Tensor]:
    """AutoGPTQ's layout, checkpoint_format "gptq"."""
    return {"qweight": pack_gptq(weight.codes.t(), bits), "qzeros": pack_gptq_zeros(weight.zeros.t().byte(), bits),
            "scales": weight.scales.t().half().contiguous(), "g_idx": weight.groups.int()}


def prepare(out: Path, source: Path, overwrite: bool) -> None:
    """Refuse a folder that must not be written to, before the long work begins."""
    if out.exists() and not out.is_dir():
        raise InvalidInput(f"output {str(out)!r} is a file: name a folder", "output")
    if out.exists() and source.exists() and out.samefile(source):
        raise InvalidInput(f"output {str(out)!r} is the model's own folder: name another", "output")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise InvalidInput(f"output {str(out)!r} is not empty: name another folder, or give --overwrite", "output")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InvalidInput(f"output {str(out)!r} cannot be written: {error.strerror or error}", "output") from None


def write(out: Path, source: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> int:
    """Write the folder. Weights of an earlier run are removed first, config.json is written last. -> bytes of the weights"""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    for old in [*out.glob("*.safetensors"), *out.glob("*.safetensors.index.json"), *out.glob("config.json")]:
        old.unlink()
    split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=SHARD)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name].contiguous() for name in names}, out / file, metadata={"format": "pt"})
    if split.is_sharded:
        _write_json(out / "model.safetensors.index.json", {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    for name in SMALL_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    _write_json(out / "config.json", config)
    return sum((out / file).stat().st_size for file in split.filename_to_tensors)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
