"""The process of one tensor-parallel rank other than 0: it builds the same worker as rank 0, and runs the same commands.

`worker/ranks.py` starts it, sends the messages below, and says how ranks end.
"""
from __future__ import annotations

import contextlib
import io
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minivllm.config import EngineConfig
from minivllm.core.plan import StepPlan
from minivllm.errors import InvalidInput
from minivllm.families import ModelSpec
from minivllm.lora.slots import PackedAdapter
from minivllm.parallel.group import ParallelGroup, file_store
from minivllm.quantization.methods import method_of
from minivllm.sampling.logits_processors import TokenMasks
from minivllm.speculative.load import find_draft
from minivllm.worker.memory import CacheSize
from minivllm.worker.model_runner import LaunchedStep
from minivllm.worker.worker import DEFAULT_COMPONENTS, Components, LoadedModel, Worker

PROGRAM = ("import json, sys; sys.path[:] = json.loads(sys.argv[3]); from minivllm.worker.rank_process import main; "
           "main(int(sys.argv[1]), int(sys.argv[2]))")


@dataclass(frozen=True, slots=True)
class RankJob:
    """What a rank needs to build the same worker as rank 0."""

    rank: int
    size: int
    store: Path
    device_index: int | None  # of its GPU; None: it computes on the CPU
    num_threads: int
    config: EngineConfig
    spec: ModelSpec
    model_config: Mapping[str, Any]
    folder: Path
    tokenizer_folder: Path | None
    eos_token_ids: tuple[int, ...]
    components: Components | None  # None: the default ones

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.device_index is None else torch.device("cuda", self.device_index)


class AllocateCommand(NamedTuple):
    size: CacheSize
    num_host_blocks: int


class LaunchCommand(NamedTuple):
    plan: StepPlan
    finished_moves: tuple[int, ...]  # of rank 0, which the plan may rely on


class SampleCommand(NamedTuple):
    masks: TokenMasks | None


class AddAdapterCommand(NamedTuple):
    adapter_id: int
    packed: PackedAdapter


class RemoveAdapterCommand(NamedTuple):
    adapter_id: int


class DropRowsCommand(NamedTuple):
    pass


class RankFailed(NamedTuple):
    """The last message of a rank."""

    reason: str
    error: InvalidInput | None  # if the user can correct it


def send(connection: Connection, message: Any) -> None:
    connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))  # `Connection.send` would share the memory of tensors


def receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())


def main(pipe: int, lifeline: int) -> None:
    """Main function of a rank's process. pipe, lifeline: descriptors of a socket and of a pipe that rank 0 holds open."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    connection = Connection(pipe)
    try:
        _run(connection)
    except EOFError:
        os._exit(1)  # rank 0 is gone
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        if not isinstance(error, InvalidInput):
            print("".join(traceback.format_exception(error)), file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            send(connection, RankFailed(reason, error if isinstance(error, InvalidInput) else None))
        os._exit(1)  # without the destructors of a group that may wait for other ranks
    os._exit(0)


def _end_with_parent(lifeline: int) -> None:
    os.read(lifeline, 1)  # returns when rank 0 closes the other end, or is gone
    os._exit(1)


def _run(connection: Connection) -> None:
    job: RankJob = receive(connection)
    torch.set_num_threads(job.num_threads)
    if job.device_index is not None:
        torch.cuda.set_device(job.device_index)
    send(connection, "imported")
    group = ParallelGroup.connect(file_store(job.store, job.size), job.rank, job.size, job.device)
    components = job.components or DEFAULT_COMPONENTS
    with contextlib.redirect_stderr(io.StringIO()):  # rank 0 prints the same lines
        draft = None if components.proposer is not None else find_draft(job.config, job.spec, job.folder, job.tokenizer_folder)
        loaded = LoadedModel(job.config, job.spec, job.folder, draft=draft, components=components, group=group,
                             method=method_of(job.model_config, components.methods, job.config.quantization))
    send(connection, "loaded")
    receive(connection)
    send(connection, replace(loaded.available_memory(), ledger=None))
    size, num_host_blocks = receive(connection)
    worker = loaded.allocate(size, num_host_blocks, eos_token_ids=job.eos_token_ids)
    send(connection, "allocated")
    _serve(worker, connection)


def _serve(worker: Worker, connection: Connection) -> None:
    launched: LaunchedStep | None = None
    while (command := receive(connection)) is not None:
        if isinstance(command, LaunchCommand):
            worker.runner.kv.wait_on_device(command.finished_moves)
            launched = worker.launch(command.plan)
            _check(launched.error)
        elif isinstance(command, SampleCommand):
            assert launched is not None
            _check(worker.sample(launched, command.masks).error)
        elif isinstance(command, AddAdapterCommand):
            weights = command.packed.weights
            worker.add_adapter(command.adapter_id, replace(
                command.packed, weights=weights.pin_memory() if worker.device.type == "cuda" else weights))
        elif isinstance(command, RemoveAdapterCommand):
            worker.remove_adapter(command.adapter_id)
        else:
            assert isinstance(command, DropRowsCommand)
            worker.drop_rows()
    worker.close()


def _check(error: str | None) -> None:
    if error is not None:  # the other ranks may have computed this step, so no later one can be right
        raise RuntimeError(error)
