"""The LoRA adapters that an engine knows, by name. Each load of an adapter has its own number, which the scheduler and the worker use.

    name ──▶ load 7 (sql, v2)      requests that arrive now
             load 3 (sql, v1)      unloaded or replaced; its running requests still use it. It is freed after the last of them

The number is also part of the prefix cache's keys. So keys and values that one load computed are never found by another.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from minivllm.engine.executor import Executor
from minivllm.engine_request import LoRARequest
from minivllm.errors import InvalidInput

MAX_UNCLAIMED = 8  # adapters that were read and not added: of requests that were aborted meanwhile


@dataclass(frozen=True, slots=True)
class AdapterLoad:
    """A loaded adapter."""

    adapter_id: int  # number of the load
    request: LoRARequest
    by_name: bool  # requests name it without its folder (a server's adapter), so it is never dropped to make room


class AdapterRegistry:
    """Which adapters are loaded. One thread makes all calls, except of what `preparation` returns."""

    def __init__(self, executor: Executor, uses: Callable[[int], bool], max_loras: int, max_cpu_loras: int | None) -> None:
        """uses: whether an unfinished request has an adapter. max_loras: 0 if the engine takes no adapters."""
        self._executor, self._uses, self._enabled, self._limit = executor, uses, max_loras > 0, max_cpu_loras
        self._loads: dict[str, AdapterLoad] = {}  # by name; the least recently used first
        self._leaving: list[int] = []
        self._read: dict[LoRARequest, Any] = {}
        self._next_id = 1

    def loaded(self) -> tuple[LoRARequest, ...]:
        """All adapters that a request may have now."""
        return tuple(load.request for load in self._loads.values())

    def preparation(self, request: LoRARequest) -> Callable[[], object] | None:
        """What `use` or `load` would have to read from disk first; None if nothing. It may be called on another thread."""
        known = not self._enabled or not request.lora_path or (request.lora_name in self._loads and not request.load_inplace)
        return None if known else partial(self._read_file, request)

    def _read_file(self, request: LoRARequest) -> None:
        self._read[request] = self._executor.read_adapter(request.lora_path)

    def use(self, request: LoRARequest) -> int:
        """The number of a request's adapter, loaded if necessary. Raises `InvalidInput` if it cannot be."""
        self._check(request, "lora_request")
        load = self._loads.get(request.lora_name)
        if load is None:
            if not request.lora_path:
                raise InvalidInput(f"no LoRA adapter {request.lora_name!r} is loaded: load it, or give its lora_path", "lora_request")
            return self._add(request, by_name=False)
        if request.load_inplace and not load.by_name:
            return self._add(request, by_name=False)
        known = load.request
        if request.lora_int_id != known.lora_int_id or request.lora_path not in ("", known.lora_path):
            raise InvalidInput(f"the LoRA adapter {request.lora_name!r} is loaded as number {known.lora_int_id} from {known.lora_path}: "
                               "give the same values, another lora_name, or load_inplace=True", "lora_request")
        self._loads[request.lora_name] = self._loads.pop(request.lora_name)
        return load.adapter_id

    def load(self, request: LoRARequest) -> None:
        """Load an adapter that requests may name. Raises `InvalidInput` if the name is in use and `load_inplace` is not set."""
        self._check(request, "lora_name")
        if request.lora_name in self._loads and not request.load_inplace:
            raise InvalidInput(f"the LoRA adapter {request.lora_name!r} is loaded already: unload it first, or set load_inplace",
                               "lora_name")
        self._add(request, by_name=True)

    def unload(self, name: str) -> None:
        """Forget an adapter. New requests cannot have it; running ones finish with it, and then its memory is freed."""
        if name not in self._loads:
            raise InvalidInput(f"no LoRA adapter {name!r} is loaded{self._others()}", "lora_name")
        self._leaving.append(self._loads.pop(name).adapter_id)
        self.free_unused()

    def free_unused(self) -> None:
        """Free adapters that were unloaded and that no request uses any more. Call it after each step."""
        for adapter_id in tuple(self._leaving):
            if not self._uses(adapter_id):
                self._leaving.remove(adapter_id)
                self._executor.remove_adapter(adapter_id)

    def _check(self, request: LoRARequest, param: str) -> None:
        if not isinstance(request, LoRARequest):
            raise InvalidInput(f"lora_request must be a LoRARequest, got {request!r}", "lora_request")
        if not self._enabled:
            raise InvalidInput(f"the LoRA adapter {request.lora_name!r} needs an engine that takes adapters: start it with "
                               "enable_lora=True (--enable-lora)", param)
        for name, load in self._loads.items():
            if name != request.lora_name and load.request.lora_int_id == request.lora_int_id:
                raise InvalidInput(f"lora_int_id {request.lora_int_id} of {request.lora_name!r} is that of the loaded adapter {name!r}: "
                                   "give each adapter its own", "lora_int_id")

    def _add(self, request: LoRARequest, *, by_name: bool) -> int:
        if not request.lora_path:
            raise InvalidInput(f"lora_path of {request.lora_name!r} is empty: give the adapter's folder or hub id", "lora_path")
        if request.lora_name not in self._loads:
            self._make_room()
        if request not in self._read:
            self._read_file(request)
        packed = self._read.pop(request)
        while len(self._read) > MAX_UNCLAIMED:
            self._read.pop(next(iter(self._read)))
        if request.lora_name in self._loads:
            self.unload(request.lora_name)
        adapter_id, self._next_id = self._next_id, self._next_id + 1
        self._executor.add_adapter(adapter_id, packed)
        self._loads[request.lora_name] = AdapterLoad(adapter_id, request, by_name)
        return adapter_id

    def _make_room(self) -> None:
        """Keep at most `max_cpu_loras`: drop the least recently used one that its next request can load again."""
        if self._limit is None or len(self._loads) < self._limit:
            return
        for name, load in self._loads.items():
            if not load.by_name and not self._uses(load.adapter_id):
                self.unload(name)
                return
        raise InvalidInput(f"max_cpu_loras ({self._limit}) LoRA adapters are loaded, all by name or in use: unload one, or raise it",
                           "max_cpu_loras")

    def _others(self) -> str:
        return f"; loaded: {', '.join(map(repr, self._loads))}" if self._loads else ""
