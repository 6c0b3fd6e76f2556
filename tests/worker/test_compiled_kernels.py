"""The batches of a start use every kernel for packed weights that serving can use: no request waits for a compiler."""
from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import models
from minivllm.families import parse_config
from minivllm.kernels import REFERENCE, tuning
from minivllm.layers.build import BuildContext
from minivllm.models.decoder import Decoder
from minivllm.models.loader import load_model
from minivllm.planning.what_if import quantization_config
from minivllm.quantization.methods import METHODS, method_of
from minivllm.worker import memory
from minivllm.worker.kv_cache import KVLayout

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
LIMIT = 128


def model_of(stored: str | None) -> tuple[Decoder, KVLayout]:
    """A tiny model, whose products with packed weights are those of a GPU. Attention and sampling do nothing."""
    fast = pytest.importorskip("minivllm.kernels.triton")
    spec = parse_config({**models.config_of("tiny"), "hidden_size": 256, "intermediate_size": 256, "vocab_size": 64})
    config = {} if stored is None else {"quantization_config": dict(quantization_config(stored, spec, METHODS))}
    width = spec.layers[0].attention.q_size
    ops = replace(REFERENCE, pack_groups=fast.packed_weight.pack_groups, grouped_linear=fast.grouped.grouped_linear,
                  grouped_rows=fast.grouped.grouped_rows, prepare_attention=lambda *args, **options: None,
                  self_attention=lambda qkv, *args, **options: qkv[:, :width], store_kv=lambda *args, **options: None,
                  sample=lambda *args, **options: None)
    build = BuildContext(torch.device("cpu"), torch.float16, ops, method_of(config))
    return load_model(spec, None, "dummy", build), KVLayout.of(spec, 16, torch.float16)  # type: ignore[arg-type]


def batches(model: Decoder, layout: KVLayout, seqs: int) -> list[Any]:
    return list(memory.compiled_batches(LIMIT, layout, model, seqs, [LIMIT], graphs=False))


@pytest.mark.parametrize(("stored", "seqs"), [("awq", 1), ("awq", 20), ("Q4_K_M", 20), ("Q4_K_M", 256)])
def test_no_kernel_is_compiled_after_the_start(stored: str, seqs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, layout = model_of(stored)
    from minivllm.kernels.triton import grouped

    variants: set[Any] = set()
    # Kernels are recorded with all that they are compiled for, and do not run.
    monkeypatch.setattr(grouped, "launch", lambda kernel, grid, *args, **options: variants.add(
        (kernel.__name__, tuple(sorted(options.items())), tuple(arg.dtype for arg in args if isinstance(arg, torch.Tensor)))))
    # The rest of a product is slow on a CPU.
    monkeypatch.setattr(torch, "mm", lambda x, weight, out: out)
    monkeypatch.setattr(grouped, "rms_norm", lambda x, *norm: variants.add("rms_norm") or x)
    monkeypatch.setattr(grouped, "silu_and_mul", lambda y: variants.add("silu_and_mul") or y[:, : y.shape[1] // 2].contiguous())
    kv = layout.views(layout.allocate(1, torch.device("cpu")))
    for batch in batches(model, layout, seqs):
        memory._dry_step(model.without_repetition(), kv, batch, 16)
    compiled = set(variants)
    assert len(compiled) > 5
    for tokens in (*range(1, 20), *range(20, tuning.PACKED_MAX_ROWS + 2, 3), tuning.PACKED_MAX_ROWS + 1, 100):
        batch = memory._dummy_batch([tokens], [tokens], layout, torch.device("cpu"))
        for last_only in (False, True):
            memory._dry_step(model, kv, replace(batch, last_only=last_only), 16)
    for count in {1, 2, 3, 17, 20, 33, 65, seqs} & set(range(seqs + 1)):
        memory._dry_step(model, kv, memory._dummy_batch([1] * count, [7] * count, layout, torch.device("cpu")), 16)
    assert variants == compiled


def test_a_model_without_packed_weights_compiles_no_more_batches_than_it_needs() -> None:
    packed, dense = (len(batches(*model_of(stored), 20)) for stored in ("awq", None))
    assert packed == dense + tuning.PACKED_MAX_ROWS.bit_length() - 1
