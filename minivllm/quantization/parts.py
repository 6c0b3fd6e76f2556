"""A fused layer whose parts are stored by different methods, such as qkv of a GGUF file whose v has more bits than q and k."""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from minivllm.quantization.base import Epilogue, LinearMethod, Matmul, ParamSpec

if TYPE_CHECKING:
    from torch import Tensor

    from minivllm.kernels import Ops


@dataclass(frozen=True)
class PartsMethod(LinearMethod):
    """One method for each run of neighboring parts: ((0, 1), Q4_K), ((2,), Q6_K)."""

    runs: tuple[tuple[tuple[int, ...], LinearMethod], ...]

    @classmethod
    def of(cls, methods: tuple[LinearMethod, ...]) -> LinearMethod:
        """From the method of each part. If all are equal, that method itself."""
        runs: list[tuple[tuple[int, ...], LinearMethod]] = []
        for i, method in enumerate(methods):
            if runs and runs[-1][1] == method:
                runs[-1] = (*runs[-1][0], i), method
            else:
                runs.append(((i,), method))
        return methods[0] if len(runs) == 1 else cls(tuple(runs))

    def parameters(self, rows: tuple[int, ...], cols: int) -> dict[str, ParamSpec]:
        """The tensors of all runs: those of run r are called `r.suffix`."""
        found = {}
        for r, (indices, method) in enumerate(self.runs):
            for suffix, param in method.parameters(tuple(rows[i] for i in indices), cols).items():
                found[f"{r}.{suffix}"] = replace(param, suffix=param.suffix or suffix, of_parts=indices)
        return found

    def of_part(self, part: int) -> LinearMethod:
        """See `LinearMethod`."""
        return next(method for indices, method in self.runs if part in indices)

    def build(self, tensors: Mapping[str, Tensor], rows: tuple[int, ...], ops: Ops) -> PartsMatmul:
        """See `LinearMethod`."""
        built = []
        for r, (indices, method) in enumerate(self.runs):
            own = {name.removeprefix(f"{r}."): tensor for name, tensor in tensors.items() if name.startswith(f"{r}.")}
            some = tuple(rows[i] for i in indices)
            built.append((method.build(own, some, ops), sum(some)))
        return PartsMatmul(built)

    def resident_bytes(self, rows: tuple[int, ...], cols: int, itemsize: int, on_gpu: bool = False) -> int:
        """See `LinearMethod`."""
        return sum(self.bytes_by_type(rows, cols, itemsize, on_gpu).values())

    def bytes_by_type(self, rows: tuple[int, ...], cols: int, itemsize: int, on_gpu: bool = False) -> dict[str, int]:
        """See `LinearMethod`."""
        found = Counter[str]()
        for indices, method in self.runs:
            found.update(method.bytes_by_type(tuple(rows[i] for i in indices), cols, itemsize, on_gpu))
        return found


class PartsMatmul(Matmul):
    """Several products of one input, side by side."""

    __slots__ = ("_parts",)

    def __init__(self, parts: Sequence[tuple[Matmul, int]]) -> None:
        """parts: each product and its number of outputs."""
        self._parts = parts

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x: [T, K] -> [T, N]."""
        import torch

        biases = (None,) * len(self._parts) if bias is None else bias.split([n for _, n in self._parts])
        return torch.cat([matmul(x, b) for (matmul, _), b in zip(self._parts, biases, strict=True)], dim=1)

    def fused(self, x: Tensor, epilogue: Epilogue, residual: Tensor | None) -> Tensor | None:
        """x: [T, K] -> [T, N]. None if a part cannot be fused, or for an activation or a residual."""
        import torch

        if epilogue.activation is not None or residual is not None:
            return None
        biases = (None,) * len(self._parts) if epilogue.bias is None else epilogue.bias.split([n for _, n in self._parts])
        outputs = []
        for (matmul, _), bias in zip(self._parts, biases, strict=True):
            y = matmul.fused(x, Epilogue(epilogue.norm, bias), None)
            if y is None:
                return None
            outputs.append(y)
        return torch.cat(outputs, dim=1)
