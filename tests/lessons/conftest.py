"""The lesson of a test file. Without a CUDA device, Triton runs in its interpreter, which must be chosen before Triton is imported."""
from __future__ import annotations

import os
from types import ModuleType

import pytest
import torch

from tests.lessons.loading import LESSONS, lesson_folder, load_lesson

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="module")
def lesson(request: pytest.FixtureRequest) -> ModuleType:
    """The lesson that the test file is named after: test_lesson_03.py tests lessons/03_*, test_capstone_engine.py the capstone."""
    name = request.module.__name__.rpartition(".test_")[2]
    return load_lesson(LESSONS / name if name.startswith("capstone") else lesson_folder(name.removeprefix("lesson_")))
