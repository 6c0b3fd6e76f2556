"""`LLMEngine`: vLLM's engine loop, for programs that add requests and run the steps themselves.

    engine.add_request("a", "Once upon a time", SamplingParams(n=2))
    while engine.has_unfinished_requests():
        for output in engine.step():              one `RequestOutput` per request that advanced: all of its output so far
            if output.finished: ...

`EngineCore` emits deltas. This class adds them up; `LLM` and the beam search read the deltas themselves.
"""
from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minivllm.compat.settings import UnbuiltMethods
from minivllm.engine.assemble import OutputBuilder
from minivllm.engine.compose import build_engine
from minivllm.engine.engine import EngineCore
from minivllm.engine.hf_tokenizer import public_tokenizer
from minivllm.engine.messages import EngineInfo
from minivllm.engine.metrics import EngineStats
from minivllm.engine.prompts import Prompt, prepare_request
from minivllm.engine_request import LoRARequest
from minivllm.errors import InvalidInput, refuse_unbuilt
from minivllm.outputs import OutputDelta, PoolingRequestOutput, RequestOutput
from minivllm.sampling_params import PoolingParams, SamplingParams


class LLMEngine(UnbuiltMethods):
    """Not thread-safe: one thread makes all calls."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self._builders: dict[str, OutputBuilder] = {}  # unfinished requests of `add_request`
        self._unreported: dict[str, OutputBuilder] = {}  # they advanced since the last `step`
        self.model_executor = None  # vLLM's; scripts delete it to free memory, which is what `close` does

    @classmethod
    def from_engine_args(cls, engine_args: Any, **unused: Any) -> LLMEngine:
        """The engine that an `EngineArgs` describes. vLLM's further arguments, such as `usage_context`, have no effect."""
        return cls(build_engine(engine_args.create_engine_config()))

    def add_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams | PoolingParams, arrival_time: Any = None, lora_request: Any = None,
        tokenization_kwargs: Mapping[str, Any] | None = None, trace_headers: Mapping[str, str] | None = None, priority: int = 0,
    ) -> str:
        """Queue a request and return its id. `arrival_time` is a reading of `time.time()`, as in vLLM; None: now.

        Raises `InvalidInput` for a request that this engine can never answer.
        """
        refuse_unbuilt(tokenization_kwargs=tokenization_kwargs, trace_headers=trace_headers)
        if isinstance(arrival_time, Sequence):  # the fourth argument was prompt_token_ids in older versions
            prompt, arrival_time = arrival_time, None
        arrival = None if arrival_time is None else arrival_time - time.time() + time.monotonic()
        text, request = prepare_request(
            request_id, prompt, params, self.core.tokenizer, self.core.max_model_len, arrival_time=arrival, priority=priority,
            lora_request=lora_request)
        self.core.add(request)
        self._unreported.pop(request_id, None)  # an earlier request of the same id, whose last output was never read
        self._builders[request_id] = OutputBuilder(request_id, text, request, self.core.tokenizer)
        return request_id

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Load an adapter before the first request that has it."""
        self.core.load_adapter(lora_request)
        return True

    def remove_lora(self, lora_id: int) -> bool:
        """Forget the adapter with this number; running requests finish with it. False: none has this number."""
        name = next((request.lora_name for request in self.core.adapters() if request.lora_int_id == lora_id), None)
        if name is not None:
            self.core.unload_adapter(name)
        return name is not None

    def list_loras(self) -> set[int]:
        """The numbers of the loaded adapters."""
        return {request.lora_int_id for request in self.core.adapters()}

    def abort_request(self, request_ids: str | Iterable[str]) -> None:
        """End one request or several now. They have no further outputs. Unknown ids are ignored."""
        if isinstance(request_ids, str):
            request_ids = (request_ids,)
        if not isinstance(request_ids, Iterable):
            raise InvalidInput(f"request_ids must be a request id or a list of them, got {request_ids!r}", "request_ids")
        for request_id in request_ids:
            self.core.abort_request(request_id)
            self._builders.pop(request_id, None)
            self._unreported.pop(request_id, None)

    def step(self) -> list[RequestOutput | PoolingRequestOutput]:
        """Run one step. Returns an output, of its `output_kind`, for each request that advanced since the last call."""
        self.advance()
        advanced, self._unreported = self._unreported, {}
        return [output for builder in advanced.values() if (output := builder.so_far()) is not None]

    def advance(self) -> list[OutputDelta]:
        """Run one step and return its deltas, also those of requests that were added through `core`.

        What the requests of `add_request` gained is part of their next outputs.
        """
        deltas = self.core.step()
        if self._builders:
            for delta in deltas:
                builder = self._builders.get(delta.request_id)
                if builder is not None:
                    self._unreported[delta.request_id] = builder
                    if builder.add(delta):
                        del self._builders[delta.request_id]
        return deltas

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has work or outputs to return."""
        return bool(self._unreported) or self.core.has_unfinished_requests()

    def get_num_unfinished_requests(self) -> int:
        return len(self._builders)

    def get_tokenizer(self) -> Any:
        """The Transformers tokenizer where that package is installed, else the engine's own."""
        return public_tokenizer(self.core.info(), self.core.tokenizer)

    @property
    def tokenizer(self) -> Any:
        return self.get_tokenizer()

    def get_model_config(self) -> EngineInfo:
        return self.core.info()

    def do_log_stats(self) -> None:
        """vLLM logs its metrics here. Here they are in `stats`."""

    @property
    def model_config(self) -> EngineInfo:
        """The model's constants, such as `max_model_len`."""
        return self.core.info()

    def info(self) -> EngineInfo:
        return self.core.info()

    def stats(self) -> EngineStats:
        return self.core.stats()

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Forget all cached prefixes, also those of running requests, which continue. The arguments are vLLM's and change nothing."""
        self.core.reset_prefix_cache()
        return True

    def close(self) -> None:
        """Free all memory. Safe to call twice."""
        self._builders.clear()
        self._unreported.clear()
        self.core.close()
