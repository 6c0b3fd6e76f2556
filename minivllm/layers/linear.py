"""A linear layer, and the order of the operations around its matrix product:

    norm → matmul → + bias → + LoRA → activation → + residual → sum over tensor-parallel ranks, if each has some of the inputs

The weight's method may compute all of this in one kernel (`Matmul.fused`). If it has no such kernel, the steps run here, one
kernel each, so every method works in every layer.

LoRA adapters take part only in steps that have some: then the product is added to what each token's adapter makes of the same input.
A step without them runs exactly the kernels of a model without adapters.

In a row-parallel layer, only rank 0 adds bias and residual, and then the ranks' outputs are summed: each is counted once.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minivllm.errors import ModelError
from minivllm.families import LinearSpec, row_order
from minivllm.kernels.layout import AdapterWeights
from minivllm.layers.build import BuildContext, Take, stored_tensors
from minivllm.layers.norm import Norm, RMSNorm
from minivllm.quantization.base import Epilogue, Matmul
from minivllm.quantization.dense import DENSE


class ReorderedMatmul(Matmul):
    """A product whose outputs are put into another order, for methods whose weights cannot be reordered."""

    __slots__ = ("_matmul", "_order")

    def __init__(self, matmul: Matmul, order: Tensor) -> None:
        """order: [N] int64, the output of `matmul` at each place."""
        self._matmul, self._order = matmul, order

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `Matmul`."""
        y = self._matmul(x, None).index_select(-1, self._order)
        return y if bias is None else y.add_(bias)


class Linear:
    """act(norm(x) W^T + bias) + residual. Also for fused layers (qkv, gate_up), whose rows come from several checkpoint tensors."""

    __slots__ = ("_activation", "_epilogue", "_exchange", "_keeps_residual", "_lora_delta", "_matmul", "_norm", "_unfusable_norm",
                 "adapters")

    def __init__(self, build: BuildContext, matmul: Matmul, *, bias: Tensor | None = None, norm: Norm | None = None,
                 activation: str | None = None, adapters: AdapterWeights | None = None,
                 exchange: Callable[[Tensor], Tensor] | None = None, keeps_residual: bool = True) -> None:
        """bias: [N]. norm: of the input. activation: see `Epilogue`.
        adapters: the slots of LoRA adapters of this layer. exchange: what tensor-parallel ranks do with their outputs.
        keeps_residual: False: another rank adds it."""
        self._matmul, self._norm, self.adapters = matmul, norm, adapters
        self._exchange, self._keeps_residual, self._lora_delta = exchange, keeps_residual, build.ops.lora_delta
        fusible = (norm.weight, norm.eps) if isinstance(norm, RMSNorm) else None
        self._unfusable_norm = None if fusible is not None else norm
        self._epilogue = Epilogue(fusible, bias, activation)
        self._activation: Callable[[Tensor], Tensor] | None = None if activation is None else getattr(build.ops, activation)

    @classmethod
    def load(cls, build: BuildContext, take: Take, spec: LinearSpec, *, norm: Norm | None = None, activation: str | None = None,
             gathered: int | None = None) -> Linear:
        """The layer of `spec`, with its weight in the format of its method.

        gathered: columns of the output head's logits, which every rank gets; None: a column-parallel layer's outputs stay divided."""
        method, tensors = stored_tensors(spec, build, take)
        bias = take(f"{spec.name}.bias") if spec.bias else None
        adapters = None if build.adapters is None else build.adapters.layer(spec.name)
        order = None if spec.heads is None else torch.tensor(row_order(spec.heads), device=build.device)
        if order is not None:
            bias = None if bias is None else bias[order]
            if method.rows_in_any_order:
                tensors = {suffix: tensor[order] for suffix, tensor in tensors.items()}
        try:
            matmul = method.build(tensors, spec.stored_rows, build.ops)
            if order is not None and not method.rows_in_any_order:
                matmul = ReorderedMatmul(matmul, order)
        except ModelError as error:
            raise ModelError(f"{spec.name}: {error}", error.param) from error
        if spec.parallel != "row" or build.group.size == 1:
            exchange = None if gathered is None else _gather(build, gathered)
            return cls(build, matmul, bias=bias, norm=norm, activation=activation, adapters=adapters, exchange=exchange)
        first = build.group.rank == 0
        return cls(build, matmul, bias=bias if first else None, norm=norm, activation=activation, adapters=adapters,
                   exchange=build.group.all_reduce, keeps_residual=first)

    @classmethod
    def of_table(cls, build: BuildContext, table: Tensor | Matmul, columns: int, *, norm: Norm | None = None) -> Linear:
        """A tied output head: the embedding table [vocab, K] as the weight. columns: tokens of the vocabulary."""
        matmul = DENSE.build({"weight": table}, (len(table),), build.ops) if isinstance(table, Tensor) else table
        return cls(build, matmul, norm=norm, exchange=_gather(build, columns))

    def without_norm(self, build: BuildContext) -> Linear:
        """The same weight without the norm of its input."""
        return Linear(build, self._matmul, bias=self._epilogue.bias, exchange=self._exchange, keeps_residual=self._keeps_residual)

    @property
    def norm(self) -> Norm | None:
        """The norm of the input."""
        return self._norm

    def dense_weight(self, cols: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The weight of all ranks as one matrix [N, K = cols], whatever its method stores."""
        weight = Matmul.dense(self._matmul, 0, cols, device, dtype)
        return weight if self._exchange is None else self._exchange(weight.T.contiguous()).T

    def __call__(self, x: Tensor, residual: Tensor | None = None, lora: Any = None) -> Tensor:
        """x: [T, K] -> [T, N], or [T, N / 2] after a gated activation. residual: of the result's shape; it may be overwritten.
        lora: from ops.prepare_lora; None: no token has an adapter."""
        y = self._own(x, residual if self._keeps_residual else None, lora)
        return y if self._exchange is None else self._exchange(y)

    def _own(self, x: Tensor, residual: Tensor | None, lora: Any) -> Tensor:
        """This rank's part of the result."""
        if self._unfusable_norm is not None:
            x = self._unfusable_norm(x)
        if lora is not None and self.adapters is not None:
            return self._adapted(x, residual, self.adapters, lora)
        y = self._matmul.fused(x, self._epilogue, residual)
        return self._composed(x, residual) if y is None else y

    def _composed(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """One kernel per step."""
        if self._norm is not None and self._unfusable_norm is None:
            x = self._norm(x)
        y = self._matmul(x, self._epilogue.bias)
        if self._activation is not None:
            y = self._activation(y)
        return y if residual is None else residual.add_(y)

    def _adapted(self, x: Tensor, residual: Tensor | None, adapters: AdapterWeights, lora: Any) -> Tensor:
        """With the tokens' LoRA adapters: in one kernel, or what they add first, and then the product with that as its residual."""
        whole = self._epilogue
        y = self._matmul.adapted(x, whole, residual, adapters, lora)
        if y is not None:
            return y
        late = residual if self._activation is not None else None
        delta, x = self._lora_delta(x, adapters, lora, norm=whole.norm, residual=residual if late is None else None)
        y = self._matmul.fused(x, Epilogue(None, whole.bias), delta)
        if y is None:
            y = delta.add_(self._matmul(x, whole.bias))
        if self._activation is not None:
            y = self._activation(y)
        return y if late is None else late.add_(y)


def _gather(build: BuildContext, columns: int) -> Callable[[Tensor], Tensor] | None:
    return partial(build.group.all_gather, columns=columns) if build.group.size > 1 else None
