"""bench.perplexity computes what Transformers computes, and its GGUF files hold the weights."""
from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from bench.gguf_files import encode_q4_k
from bench.perplexity import measure, nf4_rounded, read_ids

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def test_perplexity_equals_that_of_transformers(tiny_llama: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_llama()
    row = measure(str(folder), tokens=200, window=96, device="cpu", dtype="float32", num_gpu_blocks_override=64)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    windows = torch.tensor(read_ids(folder, 200)[:192]).view(2, 96)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert row["tokens"] == 190 and row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_q4_k_blocks_have_the_weights_nearly(shift: float) -> None:
    weight = np.random.default_rng(0).standard_normal((4, 512)).astype(np.float32) + shift
    found = dequantize(encode_q4_k(weight), GGMLQuantizationType.Q4_K)
    step = np.ptp(np.concatenate([weight.reshape(-1, 32), np.zeros((64, 1), np.float32)], 1), axis=1).max() / 15
    assert np.abs(found - weight).max() < 1.2 * step


def test_nf4_rounding_is_to_the_nearest_of_16_numbers_and_keeps_the_largest() -> None:
    weight = torch.randn(8, 128)
    rounded = nf4_rounded(weight)
    blocks, want = weight.view(-1, 64), rounded.view(-1, 64)
    assert all(len(block.unique()) <= 16 for block in want)
    index = blocks.abs().argmax(1, keepdim=True)
    assert torch.allclose(blocks.gather(1, index).abs(), want.gather(1, index).abs())
    assert (blocks - want).abs().max() <= 0.16 * blocks.abs().max() and torch.equal(nf4_rounded(rounded), rounded)
