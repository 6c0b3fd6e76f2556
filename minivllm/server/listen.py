"""uvicorn's server with this project's shutdown: running requests are drained or aborted, and the exit status is 0."""
from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from minivllm.server.config import ServerConfig, print_status
from minivllm.server.http_protocol import HttpProtocol
from minivllm.server.running import ENDING_SECONDS, RunningRequests

ABORT_SECONDS = 5  # for aborted streams to send their last events; then uvicorn closes the connections


class Server(uvicorn.Server):
    """Serves one application made by `create_app`. `ready` is called once connections are accepted."""

    def __init__(self, app: FastAPI, config: ServerConfig, ready: Callable[[], None] = lambda: None) -> None:
        super().__init__(uvicorn.Config(
            app, log_config=None, access_log=config.access_log, lifespan="off", ws="none", server_header=False, timeout_keep_alive=65,
            http=HttpProtocol,
        ))
        self.running: RunningRequests = app.state.frontend.running
        self._drain_timeout = config.drain_timeout
        self._ready = ready
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn's signal handler. Its own version would raise the signal again after the shutdown, so the exit status would not be 0."""
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self.end, sig == signal.SIGTERM)

    def end(self, drain: bool) -> None:
        """Stop accepting connections and drain or abort running requests. A second call aborts and closes at once."""
        if self.should_exit:
            self.running.stop()
            self.force_exit = True
            return
        self.should_exit = self.running.ending = True
        self.running.limit_body_wait(ENDING_SECONDS)
        timeout = self._drain_timeout if drain else 0.0
        self.config.timeout_graceful_shutdown = int(timeout) + ABORT_SECONDS
        if len(self.running):
            action = f"waiting up to {timeout:g} s for them" if timeout else "aborting them"
            print_status(f"requests still running: {len(self.running)}, {action}")
        if timeout:
            asyncio.get_running_loop().call_later(timeout, self.running.stop)
        else:
            self.running.stop()
