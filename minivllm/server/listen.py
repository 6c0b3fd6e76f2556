"""uvicorn, with our endings: exit status 0, running requests aborted or drained, no polling while idle."""
from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from minivllm.server.config import ServerConfig, say
from minivllm.server.generation import ENDING_SECONDS, Running
from minivllm.server.wire import Protocol

CTRL_C_SECONDS = 5  # for aborted streams to say goodbye; a client that does not read is cut off then


class Server(uvicorn.Server):
    """One server around one application made by `create_app`."""

    def __init__(self, app: FastAPI, config: ServerConfig, ready: Callable[[], None] = lambda: None) -> None:
        super().__init__(uvicorn.Config(
            app, log_config=None, access_log=config.access_log, lifespan="off", ws="none", server_header=False, timeout_keep_alive=65,
            http=Protocol,
        ))
        self.running: Running = app.state.frontend.running
        self._drain_timeout = config.drain_timeout
        self._ready = ready
        self._wake = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def main_loop(self) -> None:
        counter = 0
        while not await self.on_tick(counter):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), 1.0)  # once a second for the Date header
            counter += 10

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        loop.add_signal_handler(signal.SIGINT, self.end, False)
        loop.add_signal_handler(signal.SIGTERM, self.end, True)
        try:
            yield
        finally:
            for number, handler in previous.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def end(self, drain: bool) -> None:
        """Stop accepting; let running requests finish (`drain`) or abort them. Asked twice: end now."""
        if self.should_exit:
            self.running.stop()
            self.force_exit = True
            return
        self.should_exit = self.running.ending = True
        self._wake.set()
        self.running.hurry(ENDING_SECONDS)
        patience = self._drain_timeout if drain else 0.0
        self.config.timeout_graceful_shutdown = int(patience) + CTRL_C_SECONDS
        if len(self.running):
            say(f"requests still running: {len(self.running)}, " + (f"with {patience:g} s to finish" if patience else "now aborted"))
        if patience:
            asyncio.get_running_loop().call_later(patience, self.running.stop)
        else:
            self.running.stop()
