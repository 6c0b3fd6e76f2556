"""The PyTorch kernels. They run on every device and are the specification of the Triton and Numba kernels."""
