"""How rank 0 notices what happens to the other ranks. test_engine.py has the same with real processes."""
from __future__ import annotations

import queue
import socket
from multiprocessing.connection import Connection
from typing import Any

import pytest

from minivllm.errors import EngineDead
from minivllm.worker.ranks import Ranks


class Process:
    """A rank's process that is never started."""

    pid, killed = 1, False

    def kill(self) -> None:
        self.killed = True

    def wait(self, timeout: float | None = None) -> int:
        return 0


def test_a_message_that_cannot_be_read_ends_the_engine_instead_of_leaving_it_waiting() -> None:
    ranks = Ranks(1)  # starts no process
    ours, theirs = socket.socketpair()
    process: Any = Process()
    ranks.size, ranks._processes, ranks._connections, ranks._messages = 2, [process], [Connection(ours.detach())], [queue.SimpleQueue()]
    with Connection(theirs.detach()) as rank:
        rank.send_bytes(b"no pickle")
        ranks._watch()
        with pytest.raises(EngineDead, match=r"tensor-parallel rank 1 of 2 failed: its message could not be read \(UnpicklingError"):
            ranks.gather()
    assert process.killed
    ranks.close()
