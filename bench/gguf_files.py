"""GGUF files in other formats than the default model's, for comparisons: the same metadata, and weights that are quantized again.

gguf-py quantizes to Q8_0 and Q5_0, but not to the K formats, so Q4_K is encoded here. llama.cpp's quantizer searches better scales for
the same file format. As in llama.cpp, rows that are no multiple of 256 become Q5_0 instead of Q4_K, and the embedding stays Q8_0.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

BLOCK, SUB = 256, 32  # weights of a Q4_K block and of its parts, which have a scale and a minimum each


def requantize(source: Path, out: Path, kind: str) -> None:
    """Write the model of a GGUF file again, with its matrices in `kind` (Q4_K, Q8_0, ..)."""
    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(out, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        element = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], element)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
            continue
        chosen = _kind(kind, tensor.name, values.shape[-1])
        blocks = encode_q4_k(values) if chosen == GGMLQuantizationType.Q4_K else quantize(values, chosen)
        writer.add_tensor(tensor.name, blocks, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _kind(wanted: str, tensor: str, row: int) -> GGMLQuantizationType:
    kind = GGMLQuantizationType[wanted]
    if kind == GGMLQuantizationType.Q4_K and tensor == "token_embd.weight":
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.Q5_0 if kind == GGMLQuantizationType.Q4_K and row % BLOCK else kind


def encode_q4_k(weight: np.ndarray) -> np.ndarray:
    """Each sub-block's own range, then both kinds of numbers with 6 bits. float32 [rows, K] -> uint8 [rows, K / 256 * 144]

        d, dmin float16 | 12 bytes: 8 scales and 8 minimums of 6 bits | 128 bytes: codes          w = d scale code - dmin minimum
    """
    parts = weight.reshape(-1, BLOCK // SUB, SUB)
    low = np.minimum(parts.min(-1), 0)
    scale, minimum = (np.maximum(parts.max(-1), 0) - low) / 15, -low  # [blocks, 8]
    d, dmin = (np.maximum(values.max(-1, keepdims=True) / 63, 1e-7).astype(np.float16) for values in (scale, minimum))
    scales, minimums = (np.clip(np.rint(values / unit.astype(np.float32)), 0, 63).astype(np.uint8)
                        for values, unit in ((scale, d), (minimum, dmin)))
    step = np.maximum(d.astype(np.float32) * scales, 1e-12)[..., None]
    codes = np.clip(np.rint((parts + (dmin.astype(np.float32) * minimums)[..., None]) / step), 0, 15).astype(np.uint8)
    packed = np.concatenate([
        scales[:, :4] | scales[:, 4:] >> 4 << 6, minimums[:, :4] | minimums[:, 4:] >> 4 << 6,
        scales[:, 4:] & 15 | (minimums[:, 4:] & 15) << 4,
    ], axis=1)
    halves = codes.reshape(-1, BLOCK // (2 * SUB), 2, SUB)
    nibbles = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(len(parts), -1)
    blocks = np.concatenate([d.view(np.uint8), dmin.view(np.uint8), packed, nibbles], axis=1)
    return blocks.reshape(len(weight), -1)
