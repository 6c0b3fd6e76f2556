"""Without a CUDA device, Triton kernels run in Triton's interpreter. It must be chosen before the kernels are imported."""
from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="module", params=["reference", "numba", "triton"])
def backend(request: pytest.FixtureRequest) -> ModuleType:
    """The attention of each implementation that runs here."""
    if request.param == "numba" and torch.cuda.is_available():
        pytest.skip("Numba's kernels run on a CPU")
    if request.param != "reference":
        pytest.importorskip(request.param)
    return import_module(f"minivllm.kernels.{request.param}.attention")
