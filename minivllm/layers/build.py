"""What the constructor of each layer needs, as one frozen value, and how it takes a weight. Nothing is global, so two engines in one
process share nothing."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from minivllm.families import LinearSpec
from minivllm.kernels import REFERENCE, Ops
from minivllm.lora.slots import AdapterStore
from minivllm.parallel.group import SINGLE, ParallelGroup
from minivllm.quantization.base import LinearMethod
from minivllm.quantization.dense import DENSE
from minivllm.quantization.methods import MethodOf, all_dense

Take: TypeAlias = Callable[[str], Tensor]  # our name of a parameter -> its tensor, on the device and in its dtype. Each may be taken once


@dataclass(frozen=True, slots=True)
class BuildContext:
    device: torch.device
    dtype: torch.dtype  # of activations, and of weights unless their method stores another dtype
    ops: Ops
    method: MethodOf = all_dense  # how each linear layer stores its weight
    adapters: AdapterStore | None = None  # slots of LoRA adapters; None: the base model only
    group: ParallelGroup = SINGLE  # the ranks that share the model; the specifications of layers are those of one rank


def stored_tensors(spec: LinearSpec, build: BuildContext, take: Take) -> tuple[LinearMethod, dict[str, Tensor]]:
    """The method of a linear layer's weight, and the tensors that it stores, by suffix."""
    method = build.method(spec)
    return method, {suffix: take(f"{spec.name}.{suffix}") for suffix in method.parameters(spec.stored_rows, spec.cols)}


def dense_weight(spec: LinearSpec, build: BuildContext, take: Take) -> Tensor:
    """The weight of a linear layer of one part as a plain matrix [rows, cols], whatever its method stores."""
    method, tensors = stored_tensors(spec, build, take)
    if method is DENSE:
        return tensors["weight"]
    return method.build(tensors, spec.rows, REFERENCE).dense(spec.rows[0], spec.cols, build.device, build.dtype)
