"""Build the server's engine. Separate from `run.py`, so that an engine process imports no part of the web server."""
from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from minivllm.config import EngineConfig
from minivllm.server.config import configure_logging

if TYPE_CHECKING:
    from minivllm.engine.client import EngineClient
    from minivllm.engine.engine import LLMEngine


def build_engine(config: EngineConfig, log_level: str | None) -> LLMEngine:
    """Runs in the process that owns the engine. `log_level` is set if that process has not configured logging yet."""
    if log_level is not None:
        configure_logging(log_level)
    from minivllm.engine.engine import LLMEngine

    return LLMEngine.from_config(config)


def start_engine(config: EngineConfig, *, process: bool, log_level: str) -> EngineClient:
    """A client whose engine accepts requests. With `process`, only the engine's process imports torch."""
    if process:
        from minivllm.engine.process import ProcessClient

        return ProcessClient.start_with(partial(build_engine, config, log_level))
    from minivllm.engine.client import ThreadClient

    return ThreadClient.start_with(partial(build_engine, config, None))
