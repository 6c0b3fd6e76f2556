"""How the server's engine is made. Apart from `run.py`, so that an engine process imports nothing of the web server."""
from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from minivllm.config import EngineConfig
from minivllm.server.config import configure_logging

if TYPE_CHECKING:
    from minivllm.engine.client import EngineClient
    from minivllm.engine.engine import LLMEngine


def build_engine(config: EngineConfig, log_level: str | None) -> LLMEngine:
    """Runs where the engine lives. A process of its own has no logging yet."""
    if log_level is not None:
        configure_logging(log_level)
    from minivllm.engine import compose

    return compose.build_engine(config)


def start_engine(config: EngineConfig, *, process: bool, log_level: str) -> EngineClient:
    """A client whose engine accepts requests. With `process`, torch is imported there only."""
    if process:
        from minivllm.engine.process import ProcessClient

        return ProcessClient.start_with(partial(build_engine, config, log_level))
    from minivllm.engine.client import ThreadClient

    return ThreadClient.start_with(partial(build_engine, config, None))
