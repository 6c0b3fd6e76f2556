"""Tensor-parallel ranks: rank 0 is the engine's worker, every other rank is a process that runs the same plans.

    rank 0   launch(plan) ── plan ──▶ pipes ──▶ ranks 1, 2, ...   launch(plan)
             forward ◀───── sums and gathers (NCCL, gloo) ─────▶  forward
             sample(masks) ─ masks ─▶ pipes ──▶                   sample(masks): the same tokens, which are not sent

How ranks end:
- Rank 0 ends the others: it sends a command, waits, and kills those that do not end in time.
- If rank 0's process disappears, each other rank sees the end of its second pipe and exits at once, even in the middle of a step.
- If another rank fails or disappears, a thread of rank 0 notes which one and why, aborts the exchange, so that no operation waits for
  it, and kills the rest. From then on every step raises `EngineDead`.
- Ctrl-C reaches only rank 0's process: each other rank is in a session that has no terminal.

The other ranks are started without `multiprocessing`, whose daemonic processes (an engine's process is one) may have no children.
"""
from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

import torch

from minivllm.config import EngineConfig
from minivllm.core.plan import StepPlan, StepResult
from minivllm.errors import EngineDead
from minivllm.families import ModelSpec
from minivllm.lora.adapter import read_adapter
from minivllm.lora.slots import PackedAdapter
from minivllm.models.hub import ModelFiles
from minivllm.parallel.group import ParallelGroup, file_store
from minivllm.sampling.logits_processors import TokenMasks
from minivllm.worker.memory import CacheSize, MemoryBudget
from minivllm.worker.model_runner import LaunchedStep, ModelRunner, SampledStep
from minivllm.worker.rank_process import (
    PROGRAM,
    AddAdapterCommand,
    AllocateCommand,
    DropRowsCommand,
    LaunchCommand,
    RankFailed,
    RankJob,
    RemoveAdapterCommand,
    SampleCommand,
    receive,
    send,
)
from minivllm.worker.worker import DEFAULT_COMPONENTS, Components, LoadedModel, Worker

CLOSE_SECONDS = 10.0  # until a rank that does not end is killed
REASON_SECONDS = 2.0  # after a failure, for another rank to turn out to be its cause
EXCHANGE_ERRORS = ("gloo", "Connection closed by peer", "Connection reset", "NCCL", "ncclRemoteError")  # what failures of other ranks cause

class Ranks:
    """The processes of all ranks but 0, as rank 0 sees them."""

    def __init__(self, size: int) -> None:
        """Start the processes, which import what they need meanwhile."""
        self.size, self.group = size, ParallelGroup()
        self._failure: Exception | None = None
        self._failed = threading.Event()
        self._closing = False
        self._when_failed: Callable[[Exception], None] | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="minivllm-"))
        self._lifeline, self._held = os.pipe()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._messages: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(size - 1)]
        self._num_threads: int | None = None
        self._watcher = threading.Thread(target=self._watch, name="minivllm-ranks", daemon=True)
        try:
            for _ in range(size - 1):
                self._start_one()
            self._watcher.start()
        except BaseException:
            self.close()
            raise

    def _start_one(self) -> None:
        here, there = socket.socketpair()
        with there:
            self._connections.append(Connection(here.detach()))
            self._processes.append(subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(there.fileno()), str(self._lifeline), json.dumps(sys.path)],
                pass_fds=(there.fileno(), self._lifeline), stdin=subprocess.DEVNULL, start_new_session=True))

    @property
    def failure(self) -> Exception | None:
        """Why the engine cannot go on."""
        return self._failure

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(process.pid for process in self._processes)

    def connect(self, config: EngineConfig, spec: ModelSpec, files: ModelFiles, eos_token_ids: tuple[int, ...], components: Components,
                device: torch.device) -> ParallelGroup:
        """Tell the ranks what to load, and meet them."""
        threads, first = torch.get_num_threads(), device.index or 0
        store = self._folder / "store"
        for i in range(1, self.size):
            self._send_to(i, RankJob(
                i, self.size, store, first + i if device.type == "cuda" else None, max(1, threads // self.size), config, spec, files.config,
                files.folder, files.tokenizer_folder, eos_token_ids, None if components is DEFAULT_COMPONENTS else components))
        self.gather()
        if device.type == "cpu":  # together the ranks have as many threads as one
            self._num_threads = threads
            torch.set_num_threads(max(1, threads // self.size))
        with self.explaining():
            self.group = ParallelGroup.connect(file_store(store, self.size), 0, self.size, device)
        return self.group

    def smallest_budget(self, measure: Callable[[], MemoryBudget]) -> MemoryBudget:
        """The smallest of all ranks' memory budgets. They measure at the same time, because a step takes all of them."""
        self.gather()
        self.send("measure")
        with self.explaining():
            own = measure()
        return replace(min(own, *self.gather(), key=lambda budget: budget.num_bytes), ledger=own.ledger)

    def allocate(self, loaded: LoadedModel, size: CacheSize, num_host_blocks: int, **options: Any) -> Worker:
        """Every rank's worker; the one of rank 0 passes its calls on."""
        self.send(AllocateCommand(size, num_host_blocks))
        with self.explaining():
            worker = loaded.allocate(size, num_host_blocks, make_worker=partial(LeadingWorker, ranks=self), **options)
        self.gather()
        return worker

    def gather(self) -> list[Any]:
        """The next message of every rank. Raises the error of a rank that failed."""
        found = [messages.get() for messages in self._messages]
        if self._failure is not None:
            raise self._failure
        return found

    def send(self, message: Any) -> None:
        """To all ranks. Raises `EngineDead` if one is gone."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        with self.explaining():
            for connection in self._connections:
                connection.send_bytes(data)

    def _send_to(self, rank: int, message: Any) -> None:
        with self.explaining():
            send(self._connections[rank - 1], message)

    def send_each(self, messages: list[Any]) -> None:
        """messages: for ranks 1, 2, ..."""
        for rank, message in enumerate(messages, start=1):
            self._send_to(rank, message)

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """An error that another rank's failure may have caused becomes `EngineDead` with that failure."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            self.fail(f"{type(error).__name__}: {error}", error)
        except BaseException as error:  # such as Ctrl-C in `LLM.generate`: the other ranks are in the middle of an exchange
            self._note(EngineDead(f"rank 0 of {self.size} was interrupted by {type(error).__name__}, so the ranks do not agree any more"))
            raise

    def fail(self, reason: str, cause: Exception | None = None) -> NoReturn:
        """End the engine because of an error on rank 0, or of the one on another rank that caused it."""
        if not self._failed.wait(2 * REASON_SECONDS if any(text in reason for text in EXCHANGE_ERRORS) else 0):
            self._note(EngineDead(f"tensor-parallel rank 0 of {self.size} failed: {reason}"))
        assert self._failure is not None
        raise self._failure from cause

    def when_failed(self, call: Callable[[Exception], None]) -> None:
        """Call this from another thread if a rank fails, or now if one has failed."""
        self._when_failed = call
        if self._failure is not None:
            call(self._failure)

    def _watch(self) -> None:
        """The thread that reads the ranks' messages."""
        ranks = {connection: rank for rank, connection in enumerate(self._connections, start=1)}
        failures: dict[int, RankFailed | None] = {}  # None: it ended without a message
        timeout = None
        while ranks and (ready := wait(list(ranks), timeout)):
            for connection in ready:
                assert isinstance(connection, Connection)
                rank, message = ranks[connection], None
                try:
                    message = receive(connection)
                except (EOFError, OSError):
                    pass
                except Exception as error:  # without this thread, rank 0 would wait for ever
                    message = RankFailed(f"its message could not be read ({type(error).__name__}: {error})", None)
                if message is not None and not isinstance(message, RankFailed):
                    self._messages[rank - 1].put(message)
                    continue
                del ranks[connection]
                if not self._closing:
                    failures[rank] = message
                    timeout = REASON_SECONDS if _is_consequence(message) else 0.0
            if failures and not any(_is_consequence(message) for message in failures.values()):
                break
        if failures and not self._closing:
            rank = min(failures, key=lambda rank: (_is_consequence(failures[rank]), rank))
            self._note(self._explained(rank, failures[rank]))

    def _explained(self, rank: int, message: RankFailed | None) -> Exception:
        if message is not None and message.error is not None:
            return message.error
        process, where = self._processes[rank - 1], f"tensor-parallel rank {rank} of {self.size}"
        if message is not None:
            return EngineDead(f"{where} failed: {message.reason}")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(REASON_SECONDS)
        code = process.poll()
        killed = f", killed by {signal.Signals(-code).name}" if code is not None and code < 0 else ""
        return EngineDead(f"{where} (process {process.pid}) ended unexpectedly (exit code {code}{killed})")

    def _note(self, failure: Exception) -> None:
        """Keep the first failure, and end everything that could wait for the rank."""
        if self._failure is not None:
            return
        self._failure = failure
        self._failed.set()
        for process in self._processes:
            process.kill()
        for messages in self._messages:
            messages.put(None)
        with contextlib.suppress(RuntimeError):
            self.group.abort()
        if self._when_failed is not None:
            self._when_failed(failure)

    def close(self) -> None:
        """End all processes. Safe to call twice."""
        if self._closing:
            return
        self._closing = True
        if self._failure is None:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    send(connection, None)
        for process in self._processes:
            try:
                process.wait(CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._watcher.is_alive():
            self._watcher.join()
        for connection in self._connections:
            connection.close()
        os.close(self._held)
        os.close(self._lifeline)
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        shutil.rmtree(self._folder, ignore_errors=True)


def _is_consequence(message: RankFailed | None) -> bool:
    """Whether the failure of another rank may be the cause."""
    return message is not None and message.error is None and any(text in message.reason for text in EXCHANGE_ERRORS)


class LeadingWorker(Worker):
    """The worker of rank 0: every call goes to the other ranks too. A failed step ends the engine: ranks would differ afterwards."""

    def __init__(self, runner: ModelRunner, ranks: Ranks, **options: Any) -> None:
        super().__init__(runner, **options)
        self.ranks = ranks
        self._finished_moves: tuple[int, ...] = ()  # since the last plan

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """See `Worker`. Raises `EngineDead` if a rank has failed."""
        self.ranks.send(LaunchCommand(plan, self._finished_moves))
        self._finished_moves = ()
        with self.ranks.explaining():
            step = super().launch(plan)
        return step if step.error is None else self.ranks.fail(step.error)

    def sample(self, step: LaunchedStep, masks: TokenMasks | None = None) -> LeadingStep:  # type: ignore[override]
        """See `Worker`. Raises `EngineDead` if a rank has failed."""
        self.ranks.send(SampleCommand(masks))
        with self.ranks.explaining():
            sampled = super().sample(step, masks)
        return LeadingStep(sampled, self) if sampled.error is None else self.ranks.fail(sampled.error)

    def take(self, step: SampledStep) -> StepResult:
        """The result of a step, waited for."""
        with self.ranks.explaining():
            result = step.wait()
        if self.ranks.failure is not None:  # an aborted step has no right result
            raise self.ranks.failure
        self._finished_moves += result.finished_moves
        return result

    def read_adapter(self, lora_path: str) -> list[PackedAdapter]:  # type: ignore[override]
        """See `Worker`: every rank's part."""
        store = self._adapters
        adapter = read_adapter(self._find_adapter(lora_path), store.layout, self.max_lora_rank)
        return [store.pack(adapter, rank) for rank in range(self.ranks.size)]

    def add_adapter(self, adapter_id: int, packed: list[PackedAdapter]) -> None:  # type: ignore[override]
        """See `Worker`."""
        super().add_adapter(adapter_id, packed[0])
        self.ranks.send_each([AddAdapterCommand(adapter_id, part) for part in packed[1:]])

    def remove_adapter(self, adapter_id: int) -> None:
        """See `Worker`."""
        super().remove_adapter(adapter_id)
        self.ranks.send(RemoveAdapterCommand(adapter_id))

    def drop_rows(self) -> None:
        """See `Worker`."""
        super().drop_rows()
        self.ranks.send(DropRowsCommand())

    def when_failed(self, call: Callable[[Exception], None]) -> None:
        """See `Worker`."""
        self.ranks.when_failed(call)

    def close(self) -> None:
        """See `Worker`."""
        self.ranks.close()
        super().close()


@dataclass(frozen=True, slots=True)
class LeadingStep:
    """A step of all ranks. See `SampledStep`."""

    step: SampledStep
    worker: LeadingWorker

    def wait(self) -> StepResult:
        """The step's result; waits for the device if necessary. Raises `EngineDead` if a rank has failed."""
        return self.worker.take(self.step)
