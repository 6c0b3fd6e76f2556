"""What the constructor of each layer needs, as one frozen value. Nothing is global, so two engines in one process share nothing."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from minivllm.kernels import Ops
from minivllm.lora.slots import AdapterStore
from minivllm.parallel.group import SINGLE, ParallelGroup
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
