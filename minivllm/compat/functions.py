"""Functions of vLLM's that scripts call and that have little to do here."""
from __future__ import annotations

import enum
import gc
import itertools
import logging
import socket
import uuid

from minivllm import __version__

__version_tuple__ = tuple(int(part) for part in __version__.split("."))


class UsageContext(enum.StrEnum):
    """What vLLM reports its use as. Nothing is reported from here."""

    UNKNOWN_CONTEXT = "UNKNOWN_CONTEXT"
    LLM_CLASS = "LLM_CLASS"
    API_SERVER = "API_SERVER"
    OPENAI_API_SERVER = "OPENAI_API_SERVER"
    ENGINE_CONTEXT = "ENGINE_CONTEXT"


class RequestCounter:
    """0, 1, 2 ... for request ids. vLLM's name is `Counter`."""

    def __init__(self, start: int = 0) -> None:
        self._numbers = itertools.count(start)

    def __next__(self) -> int:
        return next(self._numbers)


Counter = RequestCounter


def get_open_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


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


def destroy_distributed_environment() -> None:
    """There is no default process group to destroy: a group belongs to an engine."""


def destroy_model_parallel() -> None:
    """As `destroy_distributed_environment`."""
