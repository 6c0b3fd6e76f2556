"""Advice about the choice of a model, from the machine's memory: refuse one that is too large, and name better ones than the default."""
from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import torch

from minivllm.config import EngineConfig
from minivllm.errors import ModelError
from minivllm.families import ModelSpec
from minivllm.models.hub_repository import hub_in_reach
from minivllm.planning.suggested_models import described, models_that_fit
from minivllm.quantization.methods import MethodOf, resident_bytes
from minivllm.worker.device import choose_device, choose_dtype
from minivllm.worker.memory import GIB


def check_weights_fit(config: EngineConfig, spec: ModelSpec, method: MethodOf) -> None:
    """Raise `ModelError` if the weights alone exceed the memory. This runs before they are downloaded."""
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, spec.dtype, device)
    needed = resident_bytes(spec, method, dtype.itemsize)
    if device.type != "cuda":
        total = _host_memory()
        if needed > total:
            raise ModelError(f"the weights need {needed / GIB:.1f} GiB in {str(dtype)[6:]}, and this machine has {total / GIB:.1f} GiB of "
                             "memory: use a smaller model, or a dtype of fewer bytes", "model")
        return
    total = torch.cuda.mem_get_info(device)[1]
    usable = total if config.kv_cache_memory_bytes or config.num_gpu_blocks_override else int(config.gpu_memory_utilization * total)
    if needed > usable:
        others = models_that_fit(total)
        fix = f"use a smaller model{f', such as {described(others)}' if others else ''}"
        raise ModelError(f"the weights need {needed / GIB:.1f} GiB in {str(dtype)[6:]}, and {usable / GIB:.1f} GiB of the "
                         f"{total / GIB:.1f} GiB of {torch.cuda.get_device_name(device)} are usable: {fix}", "model")


def _host_memory() -> int:
    """Bytes of memory that this process could ever have."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no control group, or no limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


class BetterModels:
    """One line that names better models than the default one, if there is a GPU and the hub is in reach. It never delays a start."""

    def __init__(self, config: EngineConfig) -> None:
        self._reached = False
        self._wanted = config.model is None and config.device != "cpu" and torch.cuda.is_available()
        self.probe = threading.Thread(target=self._look, daemon=True)
        if self._wanted:
            self.probe.start()  # while the default model loads

    def _look(self) -> None:
        self._reached = hub_in_reach()

    def line(self, device: torch.device) -> str | None:
        """The line, unless the hub has not answered yet."""
        if not self._wanted or not self._reached or device.type != "cuda":
            return None
        total = torch.cuda.mem_get_info(device)[1]
        models = models_that_fit(total)
        if not models:
            return None
        return (f"better models for the {total / GIB:.1f} GiB of this GPU: {described(models)}; "
                f"for example `minivllm serve {models[0].repository}`")
