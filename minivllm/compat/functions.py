"""Functions of vLLM's that scripts call and that have little to do here."""
from __future__ import annotations

import gc
import logging
import uuid


def cleanup_dist_env_and_memory(shutdown_ray: bool = False) -> None:
    """Collect garbage and give cached GPU memory back. An engine's memory is freed by `close`, or when the engine is deleted."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def init_logger(name: str) -> logging.Logger:
    return logging.getLogger(name)


def random_uuid() -> str:
    return uuid.uuid4().hex


def destroy_model_parallel() -> None:
    """There are no process groups to destroy: one process computes on one device."""
