"""GPUs by name, as data: what their data sheets say, and the memory that programs see.

Sources: data sheets of NVIDIA's data center cards, and its Ampere, Ada and Blackwell architecture papers for GeForce cards. There, tensor
cores that add in float32 compute twice the FLOP/s of the shader cores in 16 bits and four times in fp8 (cores x clock x 2 each).
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from minivllm.errors import InvalidInput, nearest

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class GPU:
    """One card. Figures that are None are not known, and predictions that need them are left out."""

    title: str
    memory_gib: float  # that the driver reports to programs under Linux; a little less than in the card's name
    bandwidth: float | None = None  # of the memory, GB/s
    tflops: float | None = None  # dense products of 16-bit numbers on tensor cores, with sums in float32
    fp8_tflops: float | None = None  # the same in fp8; None: as in 16 bits
    pcie: float = 32.0  # GB/s from host memory, each direction
    arch: int = 80  # compute capability, times ten

    @property
    def memory(self) -> int:
        """Bytes."""
        return int(self.memory_gib * GIB)


GPUS: Mapping[str, GPU] = {  # name, GiB, GB/s, TFLOP/s in 16 bits, in fp8, PCIe GB/s, architecture
    "rtx3060": GPU("NVIDIA GeForce RTX 3060", 11.76, 360, 25.5, None, 32, 86),
    "rtx3060ti": GPU("NVIDIA GeForce RTX 3060 Ti", 7.66, 448, 32.4, None, 32, 86),
    "rtx3070": GPU("NVIDIA GeForce RTX 3070", 7.66, 448, 40.6, None, 32, 86),
    "rtx3080": GPU("NVIDIA GeForce RTX 3080", 9.77, 760, 59.5, None, 32, 86),
    "rtx3090": GPU("NVIDIA GeForce RTX 3090", 23.69, 936, 71.0, None, 32, 86),
    "rtx4060": GPU("NVIDIA GeForce RTX 4060", 7.63, 272, 30.2, 60.5, 16, 89),
    "rtx4060ti": GPU("NVIDIA GeForce RTX 4060 Ti", 7.63, 288, 44.1, 88.2, 16, 89),
    "rtx4060ti-16gb": GPU("NVIDIA GeForce RTX 4060 Ti 16GB", 15.60, 288, 44.1, 88.2, 16, 89),
    "rtx4070": GPU("NVIDIA GeForce RTX 4070", 11.60, 504, 58.3, 116.6, 32, 89),
    "rtx4070ti": GPU("NVIDIA GeForce RTX 4070 Ti", 11.60, 504, 80.2, 160.4, 32, 89),
    "rtx4080": GPU("NVIDIA GeForce RTX 4080", 15.70, 717, 97.5, 194.9, 32, 89),
    "rtx4090": GPU("NVIDIA GeForce RTX 4090", 23.64, 1008, 165.2, 330.3, 32, 89),
    "rtx5060ti-16gb": GPU("NVIDIA GeForce RTX 5060 Ti 16GB", 15.47, 448, 47.4, 94.9, 32, 120),
    "rtx5070": GPU("NVIDIA GeForce RTX 5070", 11.50, 672, 61.7, 123.5, 64, 120),
    "rtx5080": GPU("NVIDIA GeForce RTX 5080", 15.47, 960, 112.6, 225.1, 64, 120),
    "rtx5090": GPU("NVIDIA GeForce RTX 5090", 31.36, 1792, 209.5, 419.0, 64, 120),
    "t4": GPU("Tesla T4", 14.58, 320, 65.0, None, 16, 75),
    "l4": GPU("NVIDIA L4", 22.03, 300, 121.0, 242.5, 32, 89),
    "l40s": GPU("NVIDIA L40S", 44.40, 864, 362.0, 733.0, 32, 89),
    "a10": GPU("NVIDIA A10", 22.03, 600, 125.0, None, 32, 86),
    "a100": GPU("NVIDIA A100-SXM4-80GB", 79.15, 2039, 312.0, None, 32, 80),
    "a100-40gb": GPU("NVIDIA A100-SXM4-40GB", 39.39, 1555, 312.0, None, 32, 80),
    "h100": GPU("NVIDIA H100 80GB HBM3", 79.10, 3350, 989.4, 1978.9, 64, 90),
    "h200": GPU("NVIDIA H200", 139.72, 4800, 989.4, 1978.9, 64, 90),
}


def find_gpu(name: str) -> GPU:
    """The card of this name, in any spelling. Raises `InvalidInput` with the known names."""
    wanted = _plain(name)
    found = [gpu for key, gpu in GPUS.items() if wanted in (_plain(key), _plain(gpu.title))]
    if found:
        return found[0]
    raise InvalidInput(f"gpu {name!r} is not known{nearest(wanted, GPUS)}; known: {', '.join(GPUS)}; describe another with --memory-gib, "
                       "and --bandwidth and --tflops for predictions", "gpu")


def card_here(title: str, memory: int, arch: int) -> GPU:
    """The GPU of this machine: the memory that its driver reports, and the data sheet if the card is known."""
    like = [gpu for gpu in GPUS.values() if _plain(gpu.title).startswith(_plain(title)) and abs(gpu.memory / memory - 1) < 0.2]
    known = min(like, key=lambda gpu: len(gpu.title), default=None)  # the RTX 4060 Ti of 16 GB has the name of the other one
    if known is None:
        return GPU(title, memory / GIB, arch=arch)
    return GPU(title, memory / GIB, known.bandwidth, known.tflops, known.fp8_tflops, known.pcie, arch)


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())
