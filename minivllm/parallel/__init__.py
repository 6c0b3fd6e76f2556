"""Tensor parallelism: which part of a model each rank holds, and how ranks add and gather their results."""
