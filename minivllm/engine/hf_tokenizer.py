"""The Transformers tokenizer of a model, for programs that call its methods (`apply_chat_template`, `batch_decode`, `eos_token` ...).

The engine uses `minivllm.engine.tokenizer`, which starts faster and streams. Both read the same folder.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

from minivllm.engine.messages import EngineInfo
from minivllm.errors import InvalidInput
from minivllm.models.remote_code import announce_tokenizer


def public_tokenizer(info: EngineInfo, fallback: Any) -> Any:
    """What `get_tokenizer` returns: the Transformers tokenizer of an engine, or `fallback` if the package is not installed."""
    if info.tokenizer_folder is None:
        raise InvalidInput("this engine has no tokenizer (skip_tokenizer_init)", "skip_tokenizer_init")
    if info.trust_remote_code:
        announce_tokenizer(Path(info.tokenizer_folder))
    try:
        return get_tokenizer(info.tokenizer_folder, trust_remote_code=info.trust_remote_code)
    except ImportError:
        return fallback


def get_tokenizer(name: str, **kwargs: Any) -> Any:
    """The Transformers tokenizer of a folder or hub id. Raises `InvalidInput` if it cannot be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **{"trust_remote_code": False, **kwargs})
    except (OSError, ValueError) as error:
        raise InvalidInput(f"the tokenizer {name!r} cannot be read: {str(error).splitlines()[0]}", "tokenizer") from None
