"""LoRA adapters: small trained changes of linear layers, y = x W^T + scaling * (x A^T) B^T, many of them beside one base model."""
from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "request":  # vLLM's path of LoRARequest; see minivllm/compat/imports.py
        return importlib.import_module("minivllm.lora.request")
    raise AttributeError(f"module 'minivllm.lora' has no attribute {name!r}")
