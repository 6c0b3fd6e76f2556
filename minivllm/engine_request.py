"""`EngineRequest`: one request on its way from a frontend to the scheduler.

    server, AsyncLLM ─▶ EngineClient ─(thread or pipe)─▶ engine loop ─▶ EngineCore.add ─▶ Scheduler.add
    LLM, LLMEngine.add_request ───────────────────────────────────────────────┘

It holds what the client knows: token ids and parameters. What the engine and the scheduler add (the seed that was drawn, EOS ids, blocks)
is their own state.
"""
from __future__ import annotations

import time
from dataclasses import dataclass, field

from minivllm.errors import InvalidInput
from minivllm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """A LoRA adapter, by name, number and folder (vLLM's class). The name identifies it; the number is for programs that use numbers."""

    lora_name: str  # what outputs, metrics and the server call it
    lora_int_id: int  # at least 1, and different for each name
    lora_path: str = ""  # folder with adapter_config.json and adapter_model.safetensors, or a hub id; not needed once it is loaded
    load_inplace: bool = False  # replace a loaded adapter of this name

    def __post_init__(self) -> None:
        if not isinstance(self.lora_name, str) or not self.lora_name:
            raise InvalidInput(f"lora_name must be a name, got {self.lora_name!r}", "lora_name")
        if not isinstance(self.lora_int_id, int) or self.lora_int_id < 1:
            raise InvalidInput(f"lora_int_id must be a whole number of at least 1, got {self.lora_int_id!r}", "lora_int_id")

    @property
    def name(self) -> str:
        return self.lora_name

    @property
    def adapter_id(self) -> int:
        return self.lora_int_id

    @property
    def path(self) -> str:
        return self.lora_path


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A prompt as token ids, and how to continue it. Frozen, plain and picklable."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    arrival_time: float = field(default_factory=time.monotonic)  # seconds
    priority: int = 0  # lower runs first, under the priority policy
    cache_salt: str | None = None  # only requests with the same salt share cached blocks
    owner: str = ""  # label of the API key that pays for it: the queue and the rows are shared fairly between owners
    lora_request: LoRARequest | None = None
    adapter_id: int = 0  # set by the engine: number of that adapter's load; 0: the base model
    beam_search: bool = False  # after each token its sequences pause until `choose_beams`
