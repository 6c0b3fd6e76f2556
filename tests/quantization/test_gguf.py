"""Packed GGUF weights. The oracle is the gguf package's own dequantization, bit for bit."""
from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize as oracle
from hypothesis import given
from hypothesis import strategies as st

from minivllm.families import LinearSpec
from minivllm.kernels import REFERENCE
from minivllm.kernels.grouped import dequantize
from minivllm.models.loader import DummyWeights
from minivllm.quantization import gguf as ours
from minivllm.quantization import mxfp4
from minivllm.quantization.dense import DENSE
from minivllm.quantization.gguf import BLOCKS, MXFP4_SIZE, PACKED, GGUFMethod, method_of, repacked_mxfp4, unpack
from minivllm.quantization.methods import Parameter
from minivllm.quantization.parts import PartsMethod
from tests.models.paged import make_build


def random_blocks(kind: str, rows: int, blocks: int, seed: int) -> np.ndarray:
    """Rows of blocks whose bytes are random, except that their float16 numbers are finite. [rows, bytes]"""
    rng, block = np.random.default_rng(seed), BLOCKS[kind]
    raw = rng.integers(0, 256, (rows, blocks, block.size), dtype=np.uint8)
    at = 0
    for name, size in block.fields.items():
        if name in ("scale", "min"):
            numbers = raw[..., at : at + size].copy().view(np.float16)
            numbers[~np.isfinite(numbers)] = 0.5
            raw[..., at : at + size] = numbers.view(np.uint8)
        at += size
    return raw.reshape(rows, -1)


@given(st.sampled_from(list(BLOCKS)), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_every_type_has_the_values_of_the_gguf_package_bit_for_bit(kind: str, rows: int, blocks: int, seed: int) -> None:
    raw = random_blocks(kind, rows, blocks, seed)
    want = oracle(raw, gguf.GGMLQuantizationType[kind])
    weight = unpack(torch.from_numpy(raw), BLOCKS[kind])
    assert np.array_equal(dequantize(weight).numpy(), want)
    assert int(weight.codes.max()) < 1 << weight.bits


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_mxfp4_has_the_values_of_the_gguf_package(rows: int, blocks: int, seed: int) -> None:
    raw = np.random.default_rng(seed).integers(0, 256, (rows, blocks, MXFP4_SIZE), dtype=np.uint8)
    raw[..., 0] = np.minimum(raw[..., 0], 252)  # from there on float32 overflows
    raw = raw.reshape(rows, -1)
    found = mxfp4.dequantize(*repacked_mxfp4(torch.from_numpy(raw)))
    assert np.array_equal(found.numpy(), oracle(raw, gguf.GGMLQuantizationType.MXFP4))


def test_mxfp4_is_repacked_byte_by_byte() -> None:
    codes = torch.arange(32, dtype=torch.uint8) % 16
    stored = torch.cat((torch.tensor([130], dtype=torch.uint8), codes[:16] | codes[16:] << 4))[None]
    blocks, scales = repacked_mxfp4(stored)
    assert blocks.tolist() == [[low | low + 1 << 4 for low in (*range(0, 16, 2), *range(0, 16, 2))]] and scales.tolist() == [[130]]
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.MXFP4] == (mxfp4.GROUP, MXFP4_SIZE)


def test_random_mxfp4_weights_are_as_large_as_those_of_other_formats() -> None:
    spec = PACKED["MXFP4"].parameters((64,), 4096)["weight"]
    raw = DummyWeights({"weight": Parameter(spec.shape, (), dtype=spec.dtype, dummy=spec.dummy)}, make_build(), 0)("weight")
    values = mxfp4.dequantize(*repacked_mxfp4(raw))
    assert values.std().item() == pytest.approx(ours.DUMMY_STD, rel=0.2) and abs(values.mean().item()) < 0.15 * ours.DUMMY_STD


@pytest.mark.parametrize("kind", BLOCKS)
def test_sizes_are_those_of_the_gguf_package(kind: str) -> None:
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (BLOCKS[kind].weights, BLOCKS[kind].size)


@pytest.mark.parametrize("kind", BLOCKS)
def test_unpacking_in_slices_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = torch.from_numpy(random_blocks(kind, 7, 2, 0))
    whole = unpack(raw, BLOCKS[kind])
    monkeypatch.setattr(ours, "SLICE", 3 * whole.shape[1])
    assert torch.equal(unpack(raw, BLOCKS[kind]).codes, whole.codes)


@pytest.mark.parametrize("kind", BLOCKS)
def test_resident_bytes_are_exact_and_close_to_the_files(kind: str) -> None:
    method, rows, cols = GGUFMethod(kind), (24, 8), 512
    raw = torch.from_numpy(random_blocks(kind, sum(rows), cols // BLOCKS[kind].weights, 0))
    packed = method.build({"weight": raw}, rows, REFERENCE).packed
    rest = (packed.rest.scales, packed.rest.mins, packed.rest.super_scales, packed.rest.super_mins)
    held = sum(t.nbytes for t in (*packed.planes, *rest) if t is not None)
    assert method.resident_bytes(rows, cols, 2) == held <= 1.03 * raw.nbytes
    assert method.parameters(rows, cols)["weight"].shape == raw.shape


def test_each_layer_has_the_methods_of_its_tensors_types() -> None:
    types = {"q": "Q4_K", "k": "Q4_K", "v": "Q6_K", "gate": "Q5_0", "up": "Q5_0", "embed_tokens": "Q8_0", "o": "IQ4_XS", "down": "F16"}
    of = method_of({"quant_method": "gguf", "types": types})

    def method(*names: str) -> object:
        return of(LinearSpec("name", (1,) * len(names), 256, names, bias=False, parallel=None))

    assert method("q", "k", "v") == PartsMethod((((0, 1), GGUFMethod("Q4_K")), ((2,), GGUFMethod("Q6_K"))))
    assert method("gate", "up") == GGUFMethod("Q5_0") and method("embed_tokens") == GGUFMethod("Q8_0")
    assert method("o") is method("down") is DENSE


@pytest.mark.parametrize("kind", BLOCKS)
def test_random_weights_are_as_large_as_those_of_other_formats(kind: str) -> None:
    spec = GGUFMethod(kind).parameters((64,), 4096)["weight"]
    dummy = DummyWeights({"weight": Parameter(spec.shape, (), dtype=spec.dtype, dummy=spec.dummy)}, make_build(), 0)
    values = dequantize(unpack(dummy("weight"), BLOCKS[kind]))
    assert values.std().item() == pytest.approx(ours.DUMMY_STD, rel=0.1) and abs(values.mean().item()) < 0.15 * ours.DUMMY_STD
    assert values.unique().numel() >= 2 ** BLOCKS[kind].bits
