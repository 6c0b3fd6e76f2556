"""Functions of `kernels/reference` in Triton, for NVIDIA GPUs: the same signatures, and tests compare the results."""
from minivllm.kernels.triton import activation, attention, device, drafts, grouped, linear, lora, moe, norm, packed_weight, rope, sampling

__all__ = ["activation", "attention", "device", "drafts", "grouped", "linear", "lora", "moe", "norm", "packed_weight", "rope", "sampling"]
