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
class EngineRequest:
    """A prompt as token ids, and how to continue it. Frozen, plain and picklable."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    arrival_time: float = field(default_factory=time.monotonic)  # seconds
    priority: int = 0  # lower runs first, under the priority policy
    cache_salt: str | None = None  # only requests with the same salt share cached blocks
    adapter: str | None = None
    owner: str = ""  # label of the API key that pays for it: the queue and the rows are shared fairly between owners
    beam_search: bool = False  # after each token its sequences pause until `choose_beams`


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """A LoRA adapter for one request (vLLM's class). Adapters are not built yet: a request with one is refused."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise InvalidInput(f"lora_int_id must be at least 1, got {self.lora_int_id}", "lora_int_id")
