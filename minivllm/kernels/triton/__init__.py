"""Triton twins of `kernels/reference`: same signatures, held equal to them by tests. They run on NVIDIA GPUs."""
from minivllm.kernels.triton import activation, attention, device, linear, norm, rope, sampling

__all__ = ["activation", "attention", "device", "linear", "norm", "rope", "sampling"]
