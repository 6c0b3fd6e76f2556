"""What every layer needs to be built, as one frozen value: two engines in one process share nothing."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from minivllm.kernels import Ops
from minivllm.quantization.methods import MethodOf, all_dense

Take: TypeAlias = Callable[[str], Tensor]  # our parameter's name -> its tensor, on the device and in its dtype; once each


@dataclass(frozen=True, slots=True)
class BuildContext:
    device: torch.device
    dtype: torch.dtype  # of activations, and of weights that no method stores otherwise
    ops: Ops
    method: MethodOf = all_dense  # how each linear layer stores its weight
