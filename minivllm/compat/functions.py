"""Functions of vLLM's that scripts call and that need little here."""
from __future__ import annotations

import gc
from typing import Any

from minivllm.errors import InvalidInput


def cleanup_dist_env_and_memory(shutdown_ray: bool = False) -> None:
    """Collect garbage and give cached GPU memory back. An engine's memory is freed by `close`, or when the engine is deleted."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def destroy_model_parallel() -> None:
    """There are no process groups to destroy: one process computes on one device."""


def get_tokenizer(name: str, **kwargs: Any) -> Any:
    """The Transformers tokenizer of a folder or hub id. Raises `InvalidInput` if it cannot be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"the tokenizer {name!r} cannot be read: {str(error).splitlines()[0]}", "tokenizer") from None
