"""Convert a GGUF file, once, to an ordinary model folder (config.json, safetensors, tokenizer.json).

llama.cpp stores everything in one file: metadata and tensors under its own names (most tensors are quantized in blocks that
share a scale), and the tokenizer as lists of strings. Only this module reads that format. It dequantizes the weights, so a
converted folder loads like any other, and the second start reads no GGUF.

    token_embd.weight      Q8_0  ->  model.embed_tokens.weight             float32, exactly the blocks' values
    blk.7.attn_q.weight    Q4_1  ->  model.layers.7.self_attn.q_proj.weight   rows in Hugging Face's order again
    llama.rope.freq_base         ->  rope_theta
    tokenizer.chat_template      ->  tokenizer_config.json

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
from __future__ import annotations

import json
import math
import re
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minivllm.errors import ModelError
from minivllm.families import FAMILIES

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

Metadata = Mapping[str, Any]

CONVERSION = 1  # increased whenever the output of `convert` changes, so that caches made by older code are not used
LARGE = 2_000_000_000  # parameters; larger models store quantized tensors as bfloat16, the dtype they run in


@dataclass(frozen=True)
class Architecture:
    """What differs between the GGUF architectures that can run here."""

    model_type: str
    class_name: str
    interleaved_rope: bool = False  # llama.cpp rotates adjacent pairs (0,1)(2,3).. and stores q and k rows in that order


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", interleaved_rope=True),  # Mistral's files are named llama too
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
}

ROPE_FACTORS = "rope_freqs.weight"  # not a weight: the divisors of Llama 3's rotary frequencies, see `_llama3_rope`

# Metadata that would change the result, and that the decoder does not support.
UNSUPPORTED = ("attention.scale", "attention.clamp_kqv", "logit_scale", "embedding_scale", "residual_scale", "expert_count")

# Vocabularies that were trained with digits split one by one. transformers' conversion does not handle these.
SINGLE_DIGITS = ("smollm", "starcoder", "refact")


def convert(path: Path, out: Path) -> None:
    """Write the model in `path` into the folder `out`. Raises `ModelError` naming the file and what is wrong with it."""
    reader = _open(path)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    arch = _architecture(path, meta)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = _checkpoint_names(path, meta["general.architecture"], arch, tensors)
    out.mkdir(parents=True, exist_ok=True)
    config = make_config(path, meta, arch, tensors)
    _write_json(out / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
    _write_json(out / "generation_config.json", ids)
    _write_weights(path, out / "model.safetensors", config, arch, tensors, names)
    _write_tokenizer(path, out, meta)


def _open(path: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise ModelError(f"{path}: reading GGUF files needs the gguf package: pip install gguf", "model") from error
    try:
        return GGUFReader(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}", "model") from error
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
        size = path.stat().st_size
        raise ModelError(f"{path} ({size:,} bytes): not a GGUF file, or a truncated one ({error}): download it again", "model") from error


def _architecture(path: Path, meta: Metadata) -> Architecture:
    name = meta.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ModelError(f"{path}: architecture {name!r} is not supported; supported: {', '.join(ARCHITECTURES)}", "model")
    if meta.get("split.count", 1) > 1:
        raise ModelError(f"{path}: one of {meta['split.count']} parts: join them with `llama-gguf-split --merge` first", "model")
    for key in UNSUPPORTED:
        if meta.get(f"{name}.{key}"):
            raise ModelError(f"{path}: {name}.{key} = {meta[f'{name}.{key}']} is not supported", "model")
    return ARCHITECTURES[name]


def _checkpoint_names(path: Path, name: str, arch: Architecture, tensors: Iterable[str]) -> dict[str, str]:
    """GGUF's tensor names -> Hugging Face's: ``blk.7.attn_q.weight -> model.layers.7.self_attn.q_proj.weight``.

    The modules are those of the family's row; their names in GGUF come from the table of the gguf package.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    table = get_tensor_name_map(next(key for key, value in MODEL_ARCH_NAMES.items() if value == name), 1)
    modules: dict[str, str] = {}  # of layer 0, and outside the layers
    for module in (module for parts in FAMILIES[arch.class_name].names.values() for module in parts):
        prefixed = module if module == "lm_head" else f"model.{module}"
        if (theirs := table.get_name(prefixed.format(i=0))) is not None:
            modules[theirs] = prefixed
    found = {}
    for tensor in tensors:
        if tensor == ROPE_FACTORS:
            continue
        module, _, kind = tensor.rpartition(".")
        layer = match[1] if (match := re.match(r"blk\.(\d+)\.", module)) else ""
        target = modules.get(re.sub(r"^blk\.\d+\.", "blk.0.", module))
        if target is None or kind not in ("weight", "bias"):
            raise ModelError(f"{path}: tensor {tensor!r} is not used by this engine's decoder", "model")
        found[tensor] = f"{target.format(i=layer)}.{kind}"
    return found


# ---- config.json

def make_config(path: Path, meta: Metadata, arch: Architecture, tensors: Mapping[str, ReaderTensor]) -> dict[str, Any]:
    """The config.json from which the GGUF file was made: the keys that the decoder needs."""
    prefix = meta["general.architecture"]

    def get(key: str, default: Any = ...) -> Any:
        value = meta.get(f"{prefix}.{key}", default)
        if value is ...:
            raise ModelError(f"{path}: metadata {prefix}.{key} is missing", "model")
        if isinstance(value, list):  # some converters repeat a number for each layer
            if len(set(value)) != 1:
                raise ModelError(f"{path}: {prefix}.{key} differs between layers, which is not supported: {value}", "model")
            return value[0]
        return value

    if "token_embd.weight" not in tensors:
        raise ModelError(f"{path}: tensor 'token_embd.weight' is missing", "model")
    heads, hidden = get("attention.head_count"), get("embedding_length")
    rotated = get("rope.dimension_count", None)
    head_dim = get("attention.key_length", rotated or hidden // heads)
    if rotated not in (None, head_dim) or get("attention.value_length", head_dim) != head_dim:
        raise ModelError(f"{path}: partial rotary embedding or unequal key and value widths are not supported", "model")
    window = get("attention.sliding_window", None)
    has_bias = lambda part: f"blk.0.{part}.bias" in tensors  # noqa: E731
    config = {
        "architectures": [arch.class_name],
        "model_type": arch.model_type,
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": get("context_length"),
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_theta": get("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(path, get, head_dim, tensors),
        "torch_dtype": _dtype(tensors),
        **_special_ids(meta),
    }
    if arch.model_type == "llama":
        config |= {"attention_bias": has_bias("attn_q"), "mlp_bias": has_bias("ffn_up")}
        if window:
            config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    if arch.model_type == "qwen3":
        config["attention_bias"] = has_bias("attn_q")
    if window:
        config |= {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0}
    return config


def _special_ids(meta: Metadata) -> dict[str, int | list[int] | None]:
    """Ids of special tokens. A chat model may end a turn (eot) and a message (eom) with separate tokens."""
    get = lambda name: meta.get(f"tokenizer.ggml.{name}_token_id")  # noqa: E731
    ends = list(dict.fromkeys(i for i in map(get, ("eos", "eot", "eom")) if i is not None))
    eos = ends[0] if len(ends) == 1 else ends or None
    return {"bos_token_id": get("bos"), "eos_token_id": eos, "pad_token_id": get("padding")}


def _dtype(tensors: Mapping[str, ReaderTensor]) -> str:
    """The dtype of most weights. Quantized ones count as bfloat16, because nearly all were converted from bfloat16 checkpoints."""
    count: dict[str, int] = {}
    for tensor in tensors.values():
        count[tensor.tensor_type.name] = count.get(tensor.tensor_type.name, 0) + tensor.n_elements
    return {"F32": "float32", "F16": "float16"}.get(max(count, key=lambda kind: count[kind]), "bfloat16")


def _rope_scaling(path: Path, get: Callable[..., Any], head_dim: int, tensors: Mapping[str, ReaderTensor]) -> dict[str, Any] | None:
    if ROPE_FACTORS in tensors:
        return _llama3_rope(path, get("rope.freq_base", 10000.0), head_dim, tensors[ROPE_FACTORS].data)
    kind = get("rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": get("rope.scaling.factor")}
    if kind == "linear":
        return scaling
    if kind != "yarn" or get("rope.scaling.attn_factor", 1.0) != 1.0:
        raise ModelError(f"{path}: rope.scaling.type {kind!r} (or its attn_factor) is not supported", "model")
    scaling["original_max_position_embeddings"] = get("rope.scaling.original_context_length")
    for key in ("beta_fast", "beta_slow"):
        if (value := get(f"rope.scaling.yarn_{key}", None)) is not None:
            scaling[key] = value
    return scaling


def llama3_factors(theta: float, head_dim: int, factor: float, original: int, low: float = 1.0, high: float = 4.0) -> np.ndarray:
    """Llama 3.1's divisor of each rotary frequency: 1 for short wavelengths, `factor` for long ones, a ramp between. [head_dim / 2]"""
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - smooth) / factor + smooth)


def _llama3_rope(path: Path, theta: float, head_dim: int, factors: np.ndarray) -> dict[str, Any]:
    """The parameters from which the divisors were computed. No metadata holds them. All Llama 3.x models share low and high."""
    factor = float(factors.max())
    for original in (8192, 4096, 16384, 32768):
        if factors.shape == (head_dim // 2,) and np.allclose(factors, llama3_factors(theta, head_dim, factor, original), rtol=1e-4):
            return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": original}
    raise ModelError(f"{path}: tensor {ROPE_FACTORS!r} holds rotary factors that are not Llama 3's, which is not supported", "model")


# ---- model.safetensors

def _write_weights(path: Path, out: Path, config: dict[str, Any], arch: Architecture, tensors: Mapping[str, ReaderTensor],
                   names: Mapping[str, str]) -> None:
    """Dequantize tensor by tensor straight into the file, so that only one tensor is in memory at a time.

        8 bytes: header length | JSON {name: dtype, shape, [begin, end)} | the tensors, back to back
    """
    from tqdm import tqdm

    large = sum(tensor.n_elements for tensor in tensors.values()) > LARGE
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, target in names.items():
        dtype, size = _stored_as(path, tensors[name], large)
        begin, end = end, end + tensors[name].n_elements * size
        shape = [int(n) for n in reversed(tensors[name].shape)]
        header[target] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with out.open("wb") as file, tqdm(total=end, unit="B", unit_scale=True, desc=f"converting {path.name}", disable=None) as bar:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, target in names.items():
            array = _dequantize(path, tensors[name], header[target]["dtype"])
            if arch.interleaved_rope and (match := re.search(r"\.attn_([qk])\.", name)):
                array = split_halves(array, config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"])
            bar.update(file.write(np.ascontiguousarray(array).data))


def _stored_as(path: Path, tensor: ReaderTensor, large: bool) -> tuple[str, int]:
    """-> (safetensors dtype, bytes per number). Float types are kept. Quantized blocks become float32, which represents them exactly."""
    kind = tensor.tensor_type.name
    if kind in ("F64", "I8", "I16", "I32", "I64"):
        raise ModelError(f"{path}: tensor {tensor.name!r} has type {kind}, which is not a type for weights", "model")
    if kind in ("F16", "BF16"):
        return kind, 2
    return ("BF16", 2) if large and kind != "F32" else ("F32", 4)


def _dequantize(path: Path, tensor: ReaderTensor, dtype: str) -> np.ndarray:
    """The tensor's values. bfloat16 values are raw 16-bit words, because NumPy has no such type."""
    from gguf.quants import dequantize

    kind = tensor.tensor_type.name
    if kind in ("F32", "F16"):
        return tensor.data
    if kind == "BF16":
        return tensor.data.view(np.uint16)
    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ModelError(f"{path}: tensor {tensor.name!r} has type {kind}, which gguf cannot dequantize: {error}", "model") from error
    return to_bfloat16(values) if dtype == "BF16" else values


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper half of each float32, rounded to nearest even. float32 [...] -> uint16 [...]"""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def split_halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Reorder each head's rows from llama.cpp's pairs (x0 y0 x1 y1 ..) to halves (x0 x1 .. y0 y1 ..). [heads * head_dim, ...]"""
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


# ---- tokenizer

def _write_tokenizer(path: Path, out: Path, meta: Metadata) -> None:
    """tokenizer.json, converted by transformers, and tokenizer_config.json with the chat template."""
    if "tokenizer.ggml.tokens" not in meta:
        return
    try:
        from transformers import AutoTokenizer

        backend = AutoTokenizer.from_pretrained(str(path.resolve().parent), gguf_file=path.name).backend_tokenizer
    except (ImportError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"{path}: its tokenizer cannot be converted ({error}): name another with --tokenizer", file=sys.stderr)
        return
    if meta.get("tokenizer.ggml.pre") in SINGLE_DIGITS:
        from tokenizers import pre_tokenizers as pre

        backend.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    backend.save(str(out / "tokenizer.json"))
    tokens = meta["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta.get(f"{meta['general.architecture']}.context_length"),
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = meta.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None:
            config[f"{key}_token"] = tokens[token_id]
    for key in ("add_bos_token", "add_eos_token"):
        if f"tokenizer.ggml.{key}" in meta:
            config[key] = meta[f"tokenizer.ggml.{key}"]
    if "tokenizer.chat_template" in meta:
        config["chat_template"] = meta["tokenizer.chat_template"]
    _write_json(out / "tokenizer_config.json", config)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
