"""What every layer needs to be built: passed along as one frozen value, so two engines in one process share nothing."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from minivllm.kernels import Ops

Take: TypeAlias = Callable[[str], Tensor]  # our parameter's name -> its tensor, on the device and in the dtype; once each


@dataclass(frozen=True, slots=True)
class BuildContext:
    device: torch.device
    dtype: torch.dtype
    ops: Ops
