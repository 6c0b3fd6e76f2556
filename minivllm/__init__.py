"""minivllm: a compact LLM serving engine that is meant to be read.

    from minivllm import LLM, SamplingParams

Names are imported on first use (PEP 562), so `import minivllm` is fast: torch is imported when an engine is built.
"""
from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minivllm.compat.engine_args import AsyncEngineArgs as AsyncEngineArgs
    from minivllm.compat.engine_args import EngineArgs as EngineArgs
    from minivllm.config import EngineConfig as EngineConfig
    from minivllm.engine.async_llm import AsyncLLM as AsyncLLM
    from minivllm.engine.async_llm import AsyncLLMEngine as AsyncLLMEngine
    from minivllm.engine.llm import LLM as LLM
    from minivllm.engine.llm_engine import LLMEngine as LLMEngine
    from minivllm.engine.prompts import PromptType as PromptType
    from minivllm.engine.prompts import TextPrompt as TextPrompt
    from minivllm.engine.prompts import TokensPrompt as TokensPrompt
    from minivllm.engine_request import LoRARequest as LoRARequest
    from minivllm.errors import InvalidInput as InvalidInput
    from minivllm.outputs import CompletionOutput as CompletionOutput
    from minivllm.outputs import EmbeddingRequestOutput as EmbeddingRequestOutput
    from minivllm.outputs import PoolingRequestOutput as PoolingRequestOutput
    from minivllm.outputs import RequestOutput as RequestOutput
    from minivllm.outputs import ScoringRequestOutput as ScoringRequestOutput
    from minivllm.sampling_params import BeamSearchParams as BeamSearchParams
    from minivllm.sampling_params import PoolingParams as PoolingParams
    from minivllm.sampling_params import SamplingParams as SamplingParams
    from minivllm.sampling_params import StructuredOutputs as StructuredOutputs
    from minivllm.sampling_params import StructuredOutputsParams as StructuredOutputsParams

from minivllm.compat.imports import install

install()
__version__ = "0.1.0"

_HOME = {
    "AsyncEngineArgs": "minivllm.compat.engine_args",
    "AsyncLLMEngine": "minivllm.engine.async_llm",
    "EngineArgs": "minivllm.compat.engine_args",
    "PromptType": "minivllm.engine.prompts",
    "TextPrompt": "minivllm.engine.prompts",
    "TokensPrompt": "minivllm.engine.prompts",
    "AsyncLLM": "minivllm.engine.async_llm",
    "BeamSearchParams": "minivllm.sampling_params",
    "CompletionOutput": "minivllm.outputs",
    "EmbeddingRequestOutput": "minivllm.outputs",
    "EngineConfig": "minivllm.config",
    "InvalidInput": "minivllm.errors",
    "LLM": "minivllm.engine.llm",
    "LoRARequest": "minivllm.engine_request",
    "LLMEngine": "minivllm.engine.llm_engine",
    "PoolingParams": "minivllm.sampling_params",
    "PoolingRequestOutput": "minivllm.outputs",
    "RequestOutput": "minivllm.outputs",
    "ScoringRequestOutput": "minivllm.outputs",
    "SamplingParams": "minivllm.sampling_params",
    "StructuredOutputs": "minivllm.sampling_params",
    "StructuredOutputsParams": "minivllm.sampling_params",
}

__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        if not name.startswith("_"):
            with contextlib.suppress(ModuleNotFoundError):
                return importlib.import_module(f"minivllm.{name}")  # `minivllm.sampling_params` without an import of it
        raise AttributeError(f"module 'minivllm' has no attribute {name!r}")
    if "torch" not in sys.modules:  # GNU's OpenMP threads spin for milliseconds by default: many times slower if a core is busy
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
