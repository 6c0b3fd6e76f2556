"""cpu_offload_gb: what is refused before a model is loaded. tests/models/test_streaming.py has the streaming itself."""
from __future__ import annotations

import pytest
import torch

from bench.models import COMMON, SHAPES
from minivllm.errors import InvalidInput
from minivllm.families import parse_config
from minivllm.models.streaming import WeightStream
from minivllm.quantization.methods import all_dense, layer_bytes, resident_bytes
from minivllm.worker import weight_offload
from minivllm.worker.weight_offload import GIB, describe, plan_weight_offload
from tests.models.test_streaming import TestCopies

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MISTRAL = parse_config({**COMMON, **SHAPES["mistral-7b"]})


def test_a_7b_model_on_a_card_of_8_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_offload, "available_host_memory", lambda: 32 * GIB)
    plan = plan_weight_offload(7, MISTRAL, all_dense, torch.bfloat16, CUDA)
    each = layer_bytes(MISTRAL, all_dense, 2, True)[0]
    assert sum(layer_bytes(MISTRAL, all_dense, 2, True)) < resident_bytes(MISTRAL, all_dense, 2, True) < 32 * each + 0.6 * GIB
    assert len(plan.layers) == 2 + -(-7 * GIB // each) and plan.step_bytes == plan.host_bytes == len(plan.layers) * each
    stream = WeightStream(plan.layers, CPU, TestCopies())
    stream.bytes_per_second = 13e9
    assert describe(plan, 32, stream) == (
        "the weights of 20 of 32 layers (8.13 GiB) are in host memory: each step copies 8.13 GiB to the GPU, in at least 671.1 ms at the "
        "measured 13.0 GB/s")


def test_host_memory_that_cannot_hold_the_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_offload, "available_host_memory", lambda: 4 * GIB)
    with pytest.raises(InvalidInput, match=r"cpu_offload_gb 7 keeps 8\.13 GiB .* 4\.00 GiB are available: lower it") as error:
        plan_weight_offload(7, MISTRAL, all_dense, torch.bfloat16, CUDA)
    assert error.value.param == "cpu_offload_gb"


def test_on_a_cpu_it_is_refused() -> None:
    with pytest.raises(InvalidInput, match="the device is a CPU, whose weights are in host memory anyway: leave it out") as error:
        plan_weight_offload(0.5, MISTRAL, all_dense, torch.bfloat16, CPU)
    assert error.value.param == "cpu_offload_gb"
