"""Gluon kernels in Triton's interpreter, which knows only Triton's language: Gluon's functions become Triton's, and layouts become 0.

This checks a kernel's arithmetic, indices and masks on a CPU. Only a GPU can check its layouts.
"""
from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.runtime.interpreter import InterpretedFunction

SAME = ("load", "store", "where", "exp", "exp2", "log2", "rsqrt", "minimum", "maximum", "reshape", "permute", "split", "sum", "max",
        "program_id", "atomic_add")
LAYOUTS = ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout", "DistributedLinearLayout")


def _triton(name: str) -> Any:
    return lambda *args, **options: getattr(tl, name)(*args, **options)  # looked up late: the interpreter replaces functions of `tl`


LANGUAGE = SimpleNamespace(
    constexpr=tl.constexpr, float32=tl.float32, int64=tl.int64,
    **{name: _triton(name) for name in SAME},
    **{name: lambda *args, **options: 0 for name in LAYOUTS},
    arange=lambda start, end, layout=None: tl.arange(start, end),
    zeros=lambda shape, dtype, layout=None: tl.zeros(shape, dtype),
    full=lambda shape, value, dtype, layout=None: tl.full(shape, value, dtype),
    convert_layout=lambda x, layout, assert_trivial=False: x,
    nvidia=SimpleNamespace(ampere=SimpleNamespace(
        mma_v2=lambda a, b, acc: tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee"))),
)


def interpret(patch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Let the Gluon kernels of `module` run in the interpreter."""
    patch.setattr(module, "gl", LANGUAGE)
    patch.setattr(module, "tl", triton.language, raising=False)
    patch.setattr(module, "barrier", lambda: None, raising=False)
    for name, value in list(vars(module).items()):
        if isinstance(value, gluon._runtime.GluonJITFunction):
            interpreted = InterpretedFunction(value.fn)
            function = interpreted.rewrite()
            constants = {key: "constexpr" for key, kind in function.__annotations__.items() if str(kind).endswith("constexpr")}
            patch.setattr(function, "__annotations__", {**function.__annotations__, **constants})
            patch.setattr(module, name, interpreted)
