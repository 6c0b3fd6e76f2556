"""Triton twins of `kernels/reference`: same file names, same signatures, held equal to them by tests. They run on NVIDIA GPUs."""
from minivllm.kernels.triton import activation, attention, kv_cache, norm, rope, sampling

__all__ = ["activation", "attention", "kv_cache", "norm", "rope", "sampling"]
