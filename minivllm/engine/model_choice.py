"""Advice about the choice of a model, from the machine's memory: refuse one that is too large, and name better ones than the default."""
from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from minivllm.config import EngineConfig
from minivllm.engine.plan_model import gpu_here, plan_model, slot_bytes
from minivllm.errors import NotEnoughMemory
from minivllm.families import ModelSpec
from minivllm.models.hub_repository import hub_in_reach
from minivllm.parallel.shard import shard_spec
from minivllm.planning.suggested_models import described, models_that_fit
from minivllm.quantization.methods import MethodOf, Methods, resident_bytes
from minivllm.worker.device import choose_device, choose_dtype
from minivllm.worker.memory import GIB, host_memory
from minivllm.worker.weight_offload import plan_weight_offload


def check_weights_fit(config: EngineConfig, spec: ModelSpec, method: MethodOf) -> None:
    """Raise `ModelError` if the weights alone exceed the memory. This runs before they are downloaded."""
    device = choose_device(config.device)
    dtype, spec = choose_dtype(config.dtype, spec.dtype, device), shard_spec(spec, config.tensor_parallel_size)  # what each GPU has
    offload = plan_weight_offload(config.cpu_offload_gb, spec, method, dtype, device)
    needed = resident_bytes(spec, method, dtype.itemsize, device.type == "cuda") - offload.saved_bytes + slot_bytes(config, spec, dtype)
    if device.type != "cuda":
        total, needed = host_memory(), needed * config.tensor_parallel_size
        if needed > total:
            raise NotEnoughMemory(f"the weights need {needed / GIB:.1f} GiB in {str(dtype)[6:]}, and this machine has {total / GIB:.1f} "
                                  "GiB of memory: use a smaller model, or a dtype of fewer bytes", "model")
        return
    total = torch.cuda.mem_get_info(device)[1]
    usable = total if config.kv_cache_memory_bytes or config.num_gpu_blocks_override else int(config.gpu_memory_utilization * total)
    if needed > usable:
        others = models_that_fit(total)
        fix = f"use a smaller model{f', such as {described(others)}' if others else ''}"
        raise NotEnoughMemory(f"the weights need {needed / GIB:.1f} GiB in {str(dtype)[6:]}, and {usable / GIB:.1f} GiB of the "
                              f"{total / GIB:.1f} GiB of {torch.cuda.get_device_name(device)} are usable: {fix}", "model")


@contextmanager
def with_plan(config: EngineConfig, model_config: Mapping[str, Any], methods: Methods) -> Iterator[None]:
    """Adds the plan of a model to the error that there is not enough memory for it."""
    try:
        yield
    except NotEnoughMemory as error:
        gpu = gpu_here() if choose_device(config.device).type == "cuda" else None
        plan = plan_model(config, model_config, gpu, methods=methods)
        advice = "by its plan it fits if no other program uses this memory" if plan.memory.fits else plan.advice()
        raise NotEnoughMemory(f"{error.message}. `minivllm plan`: {advice}", error.param) from error


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
