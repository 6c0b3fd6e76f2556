"""The LoRA adapters that a server offers as models, and loading and unloading them at run time.

    --lora-modules sql-lora=FOLDER       a folder or hub id, loaded before the server is ready
    POST /v1/load_lora_adapter           {"lora_name", "lora_path", "load_inplace"}: for administrators, from below --lora-folders only
    POST /v1/unload_lora_adapter         {"lora_name"}: running requests finish with the adapter, later ones get 404

The endpoints themselves are in `control.py`.
"""
from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minivllm.config import ServerConfig
from minivllm.engine.client import EngineClient
from minivllm.engine_request import LoRARequest
from minivllm.errors import EngineRestarting, InvalidInput, nearest
from minivllm.server.errors import ApiError, shorten


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """An adapter that requests may name as their model."""

    request: LoRARequest  # without its folder: a request that arrives after an unloading must not load it again
    folder: str
    created: int  # seconds since 1970


class ServedAdapters:
    """The adapters of one server, by name."""

    def __init__(self, client: EngineClient, config: ServerConfig, reserved: Sequence[str]) -> None:
        """reserved: names of the base model. Loads the adapters of `lora_modules`; raises `InvalidInput` if that fails."""
        self._client, self._reserved = client, frozenset(reserved)
        self._folders = tuple(Path(folder).expanduser().resolve() for folder in config.lora_folders)
        self._served: dict[str, ServedAdapter] = {}
        self._numbers = itertools.count(1)
        if config.lora_modules and not client.info.max_loras:
            raise InvalidInput("lora_modules needs an engine that takes adapters: give --enable-lora too", "lora_modules")
        for name, folder in map(parse_module, config.lora_modules):
            self._check_name(name, "lora_modules", reload=False)
            adapter = self._adapter(name, folder)
            client.load_adapter(LoRARequest(name, adapter.request.lora_int_id, folder)).result()
            self._served[name] = adapter

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._served)

    def get(self, name: str | None) -> ServedAdapter | None:
        """The adapter of this name."""
        return None if name is None else self._served.get(name)

    async def load(self, name: str, path: str, reload: bool) -> None:
        """Load an adapter from below an allowed folder. reload: it may replace one of the same name."""
        self._check_enabled()
        self._check_name(name, "lora_name", reload)
        folder = Path(path).expanduser().resolve()
        if not any(folder.is_relative_to(allowed) for allowed in self._folders):
            raise InvalidInput("lora_path is outside the folders from which this server loads adapters (--lora-folders); a hub id can only "
                               "be given at the start (--lora-modules)", "lora_path")
        adapter = self._adapter(name, path)
        request = LoRARequest(name, adapter.request.lora_int_id, str(folder), load_inplace=reload)
        await asyncio.wrap_future(self._client.load_adapter(request))
        self._served[name] = adapter

    async def unload(self, name: str) -> None:
        """Stop offering an adapter."""
        self._check_enabled()
        if name not in self._served:
            raise ApiError(404, f"The LoRA adapter `{shorten(name)}` does not exist{nearest(name, self._served)}", param="lora_name")
        adapter = self._served.pop(name)
        try:
            await asyncio.wrap_future(self._client.unload_adapter(name))
        except EngineRestarting:  # it stays, and may be unloaded later
            self._served[name] = adapter
            raise

    def _adapter(self, name: str, folder: str) -> ServedAdapter:
        return ServedAdapter(LoRARequest(name, next(self._numbers)), folder, int(time.time()))

    def _check_enabled(self) -> None:
        if not self._folders or not self._client.info.max_loras:
            raise ApiError(404, "this server loads no LoRA adapters at run time: start it with --enable-lora and --lora-folders FOLDER")

    def _check_name(self, name: str, param: str, reload: bool) -> None:
        if not name:
            raise InvalidInput("lora_name must not be empty", param)
        if name in self._reserved:
            raise InvalidInput(f"{name!r} is the name of the base model: choose another for the adapter", param)
        if name in self._served and not reload:
            raise InvalidInput(f"The LoRA adapter {name!r} has already been loaded: unload it first, or set load_inplace", param)


def parse_module(module: str) -> tuple[str, str]:
    """(name, folder) from NAME=FOLDER, or from vLLM's JSON form {"name": .., "path": .., "base_model_name": ..}."""
    name, _, folder = module.partition("=")
    if module.lstrip().startswith("{"):
        try:
            found = json.loads(module)
        except ValueError as error:
            raise InvalidInput(f"lora_modules has {module!r}, which is no JSON ({error}): give NAME=FOLDER", "lora_modules") from None
        for key in found:
            if key not in ("name", "path", "base_model_name"):
                raise InvalidInput(f"lora_modules has the unknown key {key!r}: name, path and base_model_name are known", "lora_modules")
        name, folder = found.get("name"), found.get("path")
    if not (isinstance(name, str) and name and isinstance(folder, str) and folder):
        raise InvalidInput(f"lora_modules must be NAME=FOLDER, got {module!r}", "lora_modules")
    return name, folder
