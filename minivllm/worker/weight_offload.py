"""`cpu_offload_gb`: the choice of the layers whose weights stay in host memory, checked before anything is downloaded or loaded."""
from __future__ import annotations

import torch

from minivllm.errors import InvalidInput
from minivllm.families import ModelSpec
from minivllm.models.streaming import WeightStream
from minivllm.planning.weight_offload import GIB, WeightOffload, choose_layers
from minivllm.quantization.methods import MethodOf, layer_bytes
from minivllm.worker.memory import available_host_memory


def plan_weight_offload(gib: float, spec: ModelSpec, method: MethodOf, dtype: torch.dtype, device: torch.device) -> WeightOffload:
    """The layers to stream. Raises `InvalidInput` if the device is a CPU, or if model or host memory are too small."""
    if not gib:
        return WeightOffload()
    if device.type != "cuda":
        raise InvalidInput(f"cpu_offload_gb is {gib:g}, and the device is a {device.type.upper()}, whose weights are in host memory "
                           "anyway: leave it out", "cpu_offload_gb")
    sizes = layer_bytes(spec, method, dtype.itemsize, on_gpu=True)
    offload, available = choose_layers(sizes, gib), available_host_memory()
    if offload.host_bytes > available:
        raise InvalidInput(f"cpu_offload_gb {gib:g} keeps {offload.host_bytes / GIB:.2f} GiB of weights in host memory, of which "
                           f"{available / GIB:.2f} GiB are available: lower it", "cpu_offload_gb")
    return offload


def describe(offload: WeightOffload, num_layers: int, stream: WeightStream) -> str:
    """One line: what is streamed, and how long a step takes at least."""
    milliseconds = 1e3 * offload.step_bytes / stream.bytes_per_second
    return (f"the weights of {len(offload.layers)} of {num_layers} layers ({offload.host_bytes / GIB:.2f} GiB) are in host memory: each "
            f"step copies {offload.step_bytes / GIB:.2f} GiB to the GPU, in at least {milliseconds:.1f} ms at the measured "
            f"{stream.bytes_per_second / 1e9:.1f} GB/s")
