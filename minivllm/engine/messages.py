"""The values that a client and its engine loop exchange: commands to the engine, messages from it. All are plain picklable values.

    client   EngineRequest, AbortCommand, WatchCommand, ResetPrefixCacheCommand, ShutdownCommand,  ──▶   engine loop
             LoadAdapterCommand, UnloadAdapterCommand
             ReadyMessage, StepMessage, RefusedMessage, ObeyedMessage, DeadMessage                 ◀──
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from minivllm.engine.metrics import EngineStats
from minivllm.engine.watch import EngineView
from minivllm.engine_request import EngineRequest, LoRARequest
from minivllm.errors import InvalidInput
from minivllm.outputs import OutputDelta
from minivllm.sampling_params import MAX_LOGPROBS, PoolingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """Constants of an engine that its clients need."""

    model: str  # as found: hub id, folder or file name
    model_folder: str
    tokenizer_folder: str | None  # None: the engine takes token ids and returns no text
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    device: str
    dtype: str
    num_blocks: int
    block_size: int
    generation_config: dict[str, Any]  # the model's own sampling defaults: temperature, top_p ...
    trust_remote_code: bool = False  # clients may run the tokenizer's own code too
    scheduling_policy: str = "fcfs"
    weight_bytes: int = 0  # memory of this rank's weights; 0: not known
    kv_cache_bytes: int = 0  # memory of its KV blocks; 0: not known
    max_logprobs: int = MAX_LOGPROBS  # per token; -1: no limit
    kv_cache_dtype: str = ""  # of the cached keys and values; "": not known
    max_loras: int = 0  # LoRA adapters that a step may use; 0: the engine takes no adapters
    max_lora_rank: int = 0
    data_parallel_size: int = 1  # replicas that live, whose limits are added up; other numbers are those of one of them
    max_running: int | None = None  # sequences that run at a time; None: not known
    max_requests: int | None = None  # that run or wait at most; None: no limit
    max_queue: int | None = None  # that wait at most; None: no limit
    embedding_size: int = 0  # entries of an embedding without `dimensions`
    pooling: PoolingParams = PoolingParams(pooling_type="LAST", use_activation=True)  # noqa: RUF009  frozen; defaults of embeddings

    def get_vocab_size(self) -> int:
        """vLLM's name of `vocab_size`."""
        return self.vocab_size


# -- to the engine ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AbortCommand:
    request_id: str


@dataclass(frozen=True, slots=True)
class ResetPrefixCacheCommand:
    number: int  # of the command; the reply repeats it


@dataclass(frozen=True, slots=True)
class LoadAdapterCommand:
    number: int  # of the command; the reply repeats it
    request: LoRARequest


@dataclass(frozen=True, slots=True)
class UnloadAdapterCommand:
    number: int
    lora_name: str


@dataclass(frozen=True, slots=True)
class WatchCommand:
    """Start or stop sending an `EngineView` with the step messages."""

    on: bool


@dataclass(frozen=True, slots=True)
class ShutdownCommand:
    pass


EngineCommand: TypeAlias = (EngineRequest | AbortCommand | ResetPrefixCacheCommand | LoadAdapterCommand | UnloadAdapterCommand
                            | WatchCommand | ShutdownCommand)

# -- from the engine --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReadyMessage:
    """The first message: the model is loaded."""

    info: EngineInfo


@dataclass(frozen=True, slots=True)
class StepMessage:
    """The deltas of one step and of the aborts before it, and the engine's gauges after it."""

    deltas: tuple[OutputDelta, ...]
    stats: EngineStats
    view: EngineView | None = None  # a few times a second while `WatchCommand` is on

    def __reduce__(self) -> tuple[Callable[..., StepMessage], tuple[object, ...]]:
        """Pickle the deltas as columns: most columns repeat one value, so this takes a fifth of the time."""
        return _step_message, (tuple(zip(*self.deltas, strict=True)), self.stats, self.view)


def _step_message(columns: tuple[tuple[object, ...], ...], stats: EngineStats, view: EngineView | None) -> StepMessage:
    return StepMessage(tuple(map(_new_delta, zip(*columns, strict=True))), stats, view)


_new_delta = partial(tuple.__new__, OutputDelta)


@dataclass(frozen=True, slots=True)
class RefusedMessage:
    """The engine did not accept a request."""

    request_id: str
    error: InvalidInput


@dataclass(frozen=True, slots=True)
class ObeyedMessage:
    """The reply to a command with a number."""

    number: int
    error: InvalidInput | None = None


@dataclass(frozen=True, slots=True)
class DeadMessage:
    """The last message: the engine loop has ended."""

    reason: str
    error: InvalidInput | None = None  # the user's mistake that prevented the start


EngineMessage: TypeAlias = ReadyMessage | StepMessage | RefusedMessage | ObeyedMessage | DeadMessage
