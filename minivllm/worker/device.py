"""Where "auto" becomes a device and a dtype."""
from __future__ import annotations

from pathlib import Path

import torch

from minivllm.errors import InvalidInput


def choose_device(wanted: str) -> torch.device:
    """"auto" is the GPU if there is one. Raises `InvalidInput` for a GPU that is missing."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InvalidInput("device is 'cuda', but PyTorch sees no CUDA GPU: check the driver (nvidia-smi), or use device='cpu'", "device")
    return torch.device(wanted, torch.cuda.current_device()) if wanted == "cuda" else torch.device(wanted)


def check_ranks(size: int, device: torch.device) -> None:
    """Raise `InvalidInput` if there are fewer GPUs than tensor-parallel ranks. Rank i has the i-th GPU from `device` on."""
    if size > 1 and device.type == "cuda" and (device.index or 0) + size > (count := torch.cuda.device_count()):
        after = f" from number {device.index} on" if device.index else ""
        raise InvalidInput(f"tensor_parallel_size is {size}, and PyTorch sees {count} GPU{'s' * (count != 1)}{after}: lower it, or check "
                           "CUDA_VISIBLE_DEVICES and nvidia-smi", "tensor_parallel_size")


def choose_dtype(wanted: str, checkpoint: str, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations. checkpoint: the dtype that config.json names.

    "auto" on a GPU: the checkpoint's dtype, or bfloat16 for a float32 checkpoint. On a CPU: bfloat16 where the CPU multiplies it
    fast, else float32.
    """
    if wanted != "auto":
        return dtype_of(wanted)
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    if checkpoint == "float16" or not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of this name."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def check_kv_cache_dtype(wanted: str, dtype: torch.dtype, device: torch.device) -> None:
    """Raise `InvalidInput` for a KV cache that this model or GPU cannot have. dtype: the model's."""
    name = str(dtype).removeprefix("torch.")
    if wanted in ("float32", "bfloat16", "float16") and wanted != name:
        raise InvalidInput(f"kv_cache_dtype {wanted!r} is not the model's dtype, {name}: use 'auto', or dtype={wanted!r} as well",
                           "kv_cache_dtype")
    if wanted == "fp8" and device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        raise InvalidInput(f"kv_cache_dtype 'fp8' needs a GPU of compute capability 8.9 or later (RTX 40, H100), and "
                           f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}: use 'int8', which is as small",
                           "kv_cache_dtype")


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has matrix (AMX) or vector (AVX512-BF16) units for bfloat16. Without them it is slower than float32."""
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        supported = getattr(torch.cpu, name, None)
        if supported is not None and supported():
            return True
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return bool(flags & {"amx_bf16", "avx512_bf16"})
