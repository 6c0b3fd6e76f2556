"""`run-batch --ray`: the lines of a file are answered by engines on the machines of a Ray cluster, with Ray Data.

    lines ─▶ Ray Data: blocks of lines ─▶ LineAnswerer (an actor with an engine) ─▶ entries, in the order of the lines
                                          LineAnswerer ...

Ray Data moves blocks of lines to idle actors and repeats the block of an actor that has died. The entries are those of `batch.py`.
"""
from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from typing import Any

from minivllm.config import EngineConfig, ServerConfig
from minivllm.errors import InvalidInput


class LineAnswerer:
    """An engine in a Ray actor, and the application that answers lines with it."""

    def __init__(self, engine: EngineConfig, server: ServerConfig, template: str | None, log_level: str) -> None:
        from minivllm.server.app import create_app
        from minivllm.server.run import build_tokenizer, start_engine
        from minivllm.server.terminal import configure_logging

        configure_logging(log_level)
        self._client = start_engine(engine, process=False, log_level=log_level)
        self._app = create_app(self._client, server, build_tokenizer(self._client.info, template))
        self._concurrency = 2 * engine.max_num_seqs

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        """block: column "line". Returns column "entry", JSON."""
        return {"entry": asyncio.run(self._answer([str(line) for line in block["line"]]))}

    async def _answer(self, lines: list[str]) -> list[str]:
        from minivllm.cli.batch import answer_lines
        from minivllm.server.errors import encode

        return [encode(entry).decode() async for entry in answer_lines(self._app, lines, self._concurrency)]


def answer_with_ray(
    lines: Sequence[str], engine: EngineConfig, server: ServerConfig, template: str | None, log_level: str,
) -> Iterator[dict[str, Any]]:
    """The entries for the lines, in their order, from `server.data_parallel_size` engines. Raises `InvalidInput` if Ray is missing."""
    try:
        import ray
        import ray.data
    except ImportError:
        raise InvalidInput("--ray needs Ray Data: pip install 'minivllm[ray]'", "ray") from None
    from minivllm.engine.ray_replicas import connect

    if not lines:
        return
    replicas = server.data_parallel_size
    connect(replicas, engine.tensor_parallel_size, engine.device)  # checks that the cluster is large enough
    has_gpus = engine.device != "cpu" and bool(ray.cluster_resources().get("GPU"))
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    # Several blocks for each engine, so that all of them end at about the same time.
    block = max(1, min(4 * engine.max_num_seqs, -(-len(lines) // (4 * replicas))))
    answered = ray.data.from_items([{"line": line} for line in lines], override_num_blocks=-(-len(lines) // block)).map_batches(
        LineAnswerer, fn_constructor_args=(engine, server, template, log_level), batch_size=None, concurrency=replicas, num_cpus=1,
        num_gpus=engine.tensor_parallel_size if has_gpus else 0)
    for row in answered.iter_rows():
        yield json.loads(row["entry"])
