"""Which layers `cpu_offload_gb` keeps in host memory, and what that saves and costs.

The layers in host memory are spread evenly over the model, so that the copy of one overlaps with the computation of the layers before
it. They share two staging buffers on the GPU, in turns:

    layer            0    1    2    3    4    5    6    7        4 of 8 layers are in host memory
    in host memory        A         B         A         B        A, B: the staging buffer that each is copied to

So n such layers save the memory of n - 2. Each step copies all of them, unless one has a buffer for itself.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minivllm.errors import InvalidInput

GIB = 1 << 30
NUM_BUFFERS = 2


@dataclass(frozen=True, slots=True)
class WeightOffload:
    """A choice of layers. All sizes are in bytes."""

    layers: tuple[int, ...] = ()  # in host memory
    host_bytes: int = 0
    staging_bytes: int = 0  # the buffers on the GPU
    step_bytes: int = 0  # copied to the GPU in each step

    @property
    def saved_bytes(self) -> int:
        """How much less GPU memory the weights take."""
        return self.host_bytes - self.staging_bytes

    @classmethod
    def of(cls, layer_bytes: Sequence[int], count: int) -> WeightOffload:
        """`count` layers, spread evenly. The last one is the model's last layer, for which there is most time to be copied."""
        layers = tuple(i for i in range(len(layer_bytes)) if (i + 1) * count // len(layer_bytes) > i * count // len(layer_bytes))
        sizes = [[layer_bytes[i] for i in layers[buffer::NUM_BUFFERS]] for buffer in range(NUM_BUFFERS)]
        return cls(layers, sum(map(sum, sizes)), sum(max(users, default=0) for users in sizes),
                   sum(sum(users) for users in sizes if len(users) > 1))


def choose_layers(layer_bytes: Sequence[int], gib: float) -> WeightOffload:
    """The fewest layers that save `gib` GiB of GPU memory. layer_bytes: of each layer's weights.

    Raises `InvalidInput` with the largest value of cpu_offload_gb that the model allows.
    """
    if not gib:
        return WeightOffload()
    choices = [WeightOffload.of(layer_bytes, count) for count in range(1, len(layer_bytes) + 1)]
    found = next((choice for choice in choices if choice.saved_bytes >= gib * GIB), None)
    if found is not None:
        return found
    most = max(choice.saved_bytes for choice in choices) / GIB
    digits = next((n for n in range(2, 12) if most * 10**n >= 10), 0)  # two that count, also for a tiny model
    floor = int(most * 10**digits) / 10**digits
    raise InvalidInput(f"cpu_offload_gb is {gib:g}, and the layers of this model can save {floor:.{digits}f} GiB at most, since two of "
                       f"{len(layer_bytes)} must be on the GPU: {'lower it' if floor else 'leave it out'}", "cpu_offload_gb")
