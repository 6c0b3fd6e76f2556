"""The PyTorch kernels: they run on every device, and they are the specification of the faster twins."""
