"""`AsyncLLM`: streamed outputs for programs that use asyncio. A thin layer over an `EngineClient`.

    async with AsyncLLM() as llm:
        async for output in llm.generate("Once upon a time", SamplingParams(max_tokens=50)):
            print(output.outputs[0].text)  # the text so far
"""
from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any

from minivllm.compat.settings import UnbuiltMethods
from minivllm.config import EngineConfig
from minivllm.engine.assemble import OutputBuilder
from minivllm.engine.client import EngineClient
from minivllm.engine.hf_tokenizer import public_tokenizer
from minivllm.engine.messages import EngineInfo
from minivllm.engine.process import start_client
from minivllm.engine.prompts import Prompt, prepare_request
from minivllm.engine.tokenizer import Tokenizer
from minivllm.engine_request import LoRARequest
from minivllm.errors import EngineDead, InvalidInput, refuse_unbuilt
from minivllm.outputs import PoolingRequestOutput, RequestOutput
from minivllm.sampling_params import PoolingParams, SamplingParams


class AsyncLLM(UnbuiltMethods):
    """A model that streams. `process=True` runs the engine in a separate process."""

    def __init__(self, model: str | None = None, *, process: bool = False, **kwargs: Any) -> None:
        config = EngineConfig.from_kwargs(model=model, **kwargs)
        self.config = config
        self.client: EngineClient = start_client(config, process=process)
        folder = self.client.info.tokenizer_folder
        self.tokenizer = None if folder is None else Tokenizer(folder, config.trust_remote_code)
        self._numbers = itertools.count()

    async def generate(
        self, prompt: Prompt | None = None, sampling_params: SamplingParams | None = None, request_id: str | None = None,
        lora_request: Any = None, trace_headers: Any = None, prompt_adapter_request: Any = None, priority: int = 0, *,
        inputs: Prompt | None = None, prompt_token_ids: Sequence[int] | None = None, tokenization_kwargs: Any = None,
        data_parallel_rank: int | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield an output of the parameters' `output_kind` each time there is one. Leaving the loop early aborts the request.

        `inputs` and `prompt_token_ids` are older forms of `prompt`.
        """
        refuse_unbuilt(trace_headers=trace_headers, prompt_adapter_request=prompt_adapter_request,
                       tokenization_kwargs=tokenization_kwargs, data_parallel_rank=data_parallel_rank)
        forms: list[Prompt] = [form for form in (prompt_token_ids, prompt, inputs) if form is not None]
        if not forms:
            raise InvalidInput("give a prompt", "prompt")
        prompt = forms[0]  # token ids have precedence: older programs give the text with them
        params = sampling_params or self.get_default_sampling_params()
        if not isinstance(params, SamplingParams):
            raise InvalidInput(f"sampling_params must be SamplingParams, got {type(params).__name__}: `encode` takes PoolingParams",
                               "sampling_params")
        name = request_id if request_id is not None else f"async-{next(self._numbers)}"
        text, request = prepare_request(name, prompt, params, self.tokenizer, self.client.info.max_model_len, priority=priority,
                                        lora_request=lora_request)
        builder = OutputBuilder(name, text, request, self.tokenizer)
        async with aclosing(self.client.generate(request)) as stream:
            async for deltas in stream:
                for delta in deltas:
                    builder.add(delta)
                if (output := builder.so_far()) is not None:
                    assert isinstance(output, RequestOutput)
                    yield output

    async def encode(
        self, prompt: Prompt, pooling_params: PoolingParams | None = None, request_id: str | None = None, lora_request: Any = None,
        trace_headers: Any = None, priority: int = 0, tokenization_kwargs: Any = None,
    ) -> AsyncGenerator[PoolingRequestOutput, None]:
        """Yield the vector of a prompt, once, as `LLM.encode` returns it."""
        refuse_unbuilt(trace_headers=trace_headers, tokenization_kwargs=tokenization_kwargs)
        if not isinstance(pooling_params, (PoolingParams, type(None))):
            kind = type(pooling_params).__name__
            raise InvalidInput(f"pooling_params must be PoolingParams, got {kind}: `generate` takes SamplingParams", "pooling_params")
        name = request_id if request_id is not None else f"async-{next(self._numbers)}"
        text, request = prepare_request(name, prompt, pooling_params or PoolingParams(), self.tokenizer, self.client.info.max_model_len,
                                        priority=priority, lora_request=lora_request)
        builder = OutputBuilder(name, text, request, self.tokenizer)
        async with aclosing(self.client.generate(request)) as stream:
            async for deltas in stream:
                if any(builder.add(delta) for delta in deltas):
                    yield builder.pooling_output()

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """Load an adapter before the first request that has it."""
        await asyncio.wrap_future(self.client.load_adapter(lora_request))
        return True

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's own defaults (generation_config.json). `generate` uses them if it gets no `sampling_params`."""
        return SamplingParams(**self.client.info.generation_config)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End one request or several; their streams end with finish reason "abort"."""
        for name in (request_id,) if isinstance(request_id, str) else request_id:
            self.client.abort(name)

    @classmethod
    def from_engine_args(cls, engine_args: Any, **unused: Any) -> AsyncLLM:
        """The engine that an `EngineArgs` describes. vLLM's further arguments, such as `usage_context`, have no effect."""
        return cls(**dataclasses.asdict(engine_args))

    async def get_tokenizer(self) -> Any:
        """As `LLM.get_tokenizer`."""
        return public_tokenizer(self.client.info, self.tokenizer)

    async def get_model_config(self) -> EngineInfo:
        """The model's constants, such as `max_model_len`."""
        return self.client.info

    async def check_health(self) -> None:
        """Raise `EngineDead` if the engine has ended."""
        if self.client.dead is not None:
            raise EngineDead(self.client.dead)

    async def do_log_stats(self) -> None:
        """vLLM logs its metrics here. Here they are in `client.metrics`."""

    def close(self) -> None:
        """End the engine and free all memory."""
        self.client.close()

    async def reset_prefix_cache(self, *unused: Any, **options: Any) -> bool:
        """Forget all cached prefixes. vLLM's arguments change nothing."""
        await self.client.reset_prefix_cache()
        return True

    @property
    def model_config(self) -> EngineInfo:
        return self.client.info

    @property
    def errored(self) -> bool:
        return self.client.dead is not None

    @property
    def is_running(self) -> bool:
        return not self.errored

    @property
    def dead_error(self) -> EngineDead:
        return EngineDead(self.client.dead or "the engine is running")

    def shutdown(self, timeout: float | None = None) -> None:
        """vLLM's name of `close`, which waits as long as a step takes."""
        self.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None,
    ) -> None:
        self.close()


AsyncLLMEngine = AsyncLLM  # vLLM's older name
