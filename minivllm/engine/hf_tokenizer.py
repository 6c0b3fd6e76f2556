"""The Transformers tokenizer of a model, for programs that call its methods (`apply_chat_template`, `batch_decode`, `eos_token` ...).

The engine uses `minivllm.engine.tokenizer`, which starts faster and streams. Both read the same folder.
"""
from __future__ import annotations

from typing import Any

from minivllm.errors import InvalidInput


def public_tokenizer(folder: str | None, fallback: Any) -> Any:
    """What `get_tokenizer` returns: the Transformers tokenizer of `folder`, or `fallback` if the package is not installed."""
    if folder is None:
        raise InvalidInput("this engine has no tokenizer (skip_tokenizer_init)", "skip_tokenizer_init")
    try:
        return get_tokenizer(folder)
    except ImportError:
        return fallback


def get_tokenizer(name: str, **kwargs: Any) -> Any:
    """The Transformers tokenizer of a folder or hub id. Raises `InvalidInput` if it cannot be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **{"trust_remote_code": False, **kwargs})
    except (OSError, ValueError) as error:
        raise InvalidInput(f"the tokenizer {name!r} cannot be read: {str(error).splitlines()[0]}", "tokenizer") from None
