"""`LLM`: vLLM's class for scripts and notebooks. The engine runs in this process.

    with LLM() as llm:
        for output in llm.generate(["Once upon a time", "2 + 2 ="], SamplingParams(temperature=0)):
            print(output.outputs[0].text)
"""
from __future__ import annotations

import dataclasses
import logging
import numbers
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from minivllm.compat.settings import UnbuiltMethods
from minivllm.config import EngineConfig
from minivllm.engine.assemble import OutputBuilder
from minivllm.engine.beam_search import BeamSearchOutput, BeamSearchParams, beam_search
from minivllm.engine.compose import build_engine
from minivllm.engine.llm_engine import LLMEngine
from minivllm.engine.messages import EngineInfo
from minivllm.engine.metrics import EngineMetrics
from minivllm.engine.metrics_reader import Metric, read_metrics
from minivllm.engine.pooling import cosine, floats
from minivllm.engine.prompts import Prompt, checked_lora, prepare_request
from minivllm.engine_request import LoRARequest
from minivllm.errors import InvalidInput, refuse_unbuilt, shown
from minivllm.outputs import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from minivllm.sampling_params import PoolingParams, SamplingParams

log = logging.getLogger(__name__)

_OfflineRequest: TypeAlias = tuple[Prompt, SamplingParams | PoolingParams, LoRARequest | None, int]  # with its adapter and its priority
Conversation = Sequence[Mapping[str, Any]]  # messages: {"role": ..., "content": ...}


class LLM(UnbuiltMethods):
    """A model that answers lists of prompts. Its keywords are the fields of `EngineConfig`."""

    def __init__(
        self, model: str | None = None, *, chat_template: str | None = None, disable_log_stats: bool = True, **kwargs: Any,
    ) -> None:
        """`chat_template`: Jinja source, or a file with it, that replaces the model's own in `chat`.

        `disable_log_stats=False` collects what `get_metrics` returns, which costs about 0.1 µs per token.
        """
        self.config = EngineConfig.from_kwargs(model=model, **kwargs)
        self._chat_template = _template_source(chat_template)
        self.llm_engine = LLMEngine(build_engine(self.config))
        self._metrics = None if disable_log_stats else EngineMetrics(self.llm_engine.info().model)
        self._num_requests = 0
        self._queued: list[_OfflineRequest] = []  # of `enqueue`
        self._profile: Any = None
        self._profile_prefix = ""

    @classmethod
    def from_engine_args(cls, engine_args: Any) -> LLM:
        """The model that an `EngineArgs` describes."""
        return cls(**dataclasses.asdict(engine_args))

    @property
    def model_config(self) -> EngineInfo:
        """The model's constants, such as `max_model_len`."""
        return self.llm_engine.info()

    # -- vLLM's methods -------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None, priority: Sequence[int] | None = None, tokenization_kwargs: Mapping[str, Any] | None = None, *,
        prompt_token_ids: Sequence[Any] | None = None, inputs: Prompt | Sequence[Prompt] | None = None, prompt_adapter_request: Any = None,
        guided_options_request: Any = None,
    ) -> list[RequestOutput]:
        """Complete each prompt. The outputs have the order of the prompts.

        A prompt is text, {"prompt": text} or {"prompt_token_ids": ids}. `sampling_params` is one object for
        all prompts, or a list with one for each. `use_tqdm` may be a class to use in place of `tqdm`.
        `lora_request` is a `LoRARequest` for all prompts, or a list with one or None for each; it needs `enable_lora=True`.
        `prompt_token_ids` and `inputs` are older forms of `prompts`.
        """
        refuse_unbuilt(tokenization_kwargs=tokenization_kwargs, prompt_adapter_request=prompt_adapter_request,
                       guided_options_request=guided_options_request)
        forms = [form for form in (prompts, prompt_token_ids, inputs) if form is not None]
        if len(forms) != 1:
            raise InvalidInput("give exactly one of prompts and its older forms prompt_token_ids and inputs", "prompts")
        given = forms[0]
        if isinstance(lora_request, bool):  # the fourth argument was use_tqdm in older versions
            use_tqdm, lora_request = lora_request, None
        return self._run(self._requests(given, sampling_params, lora_request, priority), use_tqdm)

    def enqueue(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        lora_request: Any = None, priority: Sequence[int] | None = None,
    ) -> None:
        """Add prompts that `wait_for_completion` answers, together with those of other calls."""
        self._queued += self._requests(prompts, sampling_params, lora_request, priority)

    def wait_for_completion(self, use_tqdm: bool | Callable[..., Any] = True) -> list[RequestOutput]:
        """Answer all prompts of `enqueue`, in their order."""
        requests, self._queued = self._queued, []
        return self._run(requests, use_tqdm)

    def chat(
        self, messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None, chat_template: str | None = None, chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True, continue_final_message: bool = False, tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None, tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of messages) or several (a list of such lists).

        `tools` are described to the model in the prompt. Its calls are part of the output's text, in the model's own format.
        """
        refuse_unbuilt(mm_processor_kwargs=mm_processor_kwargs, tokenization_kwargs=tokenization_kwargs)
        if chat_template_content_format not in ("auto", "string", "openai"):  # the form that a template takes is found by rendering it
            raise InvalidInput(f"chat_template_content_format must be auto, string or openai, got {chat_template_content_format!r}",
                               "chat_template_content_format")
        tokenizer = self.llm_engine.core.tokenizer
        if tokenizer is None:
            raise InvalidInput("this LLM has no tokenizer (skip_tokenizer_init): use generate with token ids", "skip_tokenizer_init")
        template = chat_template or self._chat_template
        conversations: Sequence[Any] = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts: list[Prompt] = []
        for one in conversations:
            text = tokenizer.apply_chat_template(
                one, tokenize=False, chat_template=template, add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message, tools=tools, **(chat_template_kwargs or {}),
            )
            assert isinstance(text, str)
            ids = tokenizer.encode(text, add_special_tokens=False)  # the template has written the special tokens
            prompts.append({"prompt": text, "prompt_token_ids": ids})
        return self.generate(prompts, sampling_params, use_tqdm, lora_request)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, lora_request: Any = None, use_tqdm: bool = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """The `beam_width` most probable outputs of each prompt, best first.

        `use_tqdm` and `concurrency_limit` are vLLM's: here all searches share the engine's batches, and there is no progress bar.
        """
        every = _as_list(prompts)
        request_ids = [f"beam-{self._new_id()}" for _ in every]
        return beam_search(self.llm_engine, request_ids, every, params, _lora_list(lora_request, len(every)))

    # -- embeddings -----------------------------------------------------------------------------------------------------

    def encode(
        self, prompts: Prompt | Sequence[Prompt], pooling_params: PoolingParams | Sequence[PoolingParams] | None = None, *,
        use_tqdm: bool | Callable[..., Any] = True, lora_request: Any = None, pooling_task: str | None = None,
        truncate_prompt_tokens: int | None = None, tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[PoolingRequestOutput]:
        """The vector of each prompt as a tensor, `outputs.data` [size] float32. `embed` gives the same as numbers.

        `pooling_params` is one object for all prompts, or a list with one for each. `truncate_prompt_tokens` is an older form of its field.
        """
        return [builder.pooling_output() for builder in self._pool(
            prompts, pooling_params, use_tqdm, lora_request, pooling_task, truncate_prompt_tokens, tokenization_kwargs)]

    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, use_tqdm: bool | Callable[..., Any] = True,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None, lora_request: Any = None,
        truncate_prompt_tokens: int | None = None, tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """An embedding of each prompt, `outputs.embedding`: its pooled hidden states, scaled to length 1 unless the parameters say no.

        Any model serves. One that was trained for embeddings gives useful ones.
        """
        return [
            EmbeddingRequestOutput(builder.output.request_id, EmbeddingOutput(floats(builder.vector())), builder.output.prompt_token_ids,
                                   num_cached_tokens=builder.output.num_cached_tokens)
            for builder in self._pool(prompts, pooling_params, use_tqdm, lora_request, "embed", truncate_prompt_tokens, tokenization_kwargs)
        ]

    def score(
        self, data_1: Prompt | Sequence[Prompt], data_2: Prompt | Sequence[Prompt], /, *, use_tqdm: bool | Callable[..., Any] = True,
        pooling_params: PoolingParams | None = None, lora_request: Any = None, truncate_prompt_tokens: int | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[ScoringRequestOutput]:
        """How similar prompts are: the cosine of their embeddings, `outputs.score`. One prompt with each of several, or pair by pair."""
        first, second = _as_list(data_1), _as_list(data_2)
        if len(first) not in (1, len(second)):
            raise InvalidInput(f"{len(first)} prompts cannot be compared with {len(second)}: give one, or as many", "data_1")
        builders = self._pool(
            [*first, *second], pooling_params, use_tqdm, lora_request, "embed", truncate_prompt_tokens, tokenization_kwargs)
        results = []
        for i, two in enumerate(builders[len(first):]):
            one = builders[i if len(first) > 1 else 0]
            results.append(ScoringRequestOutput(
                two.output.request_id, ScoringOutput(cosine(one.vector(), two.vector())),
                one.output.prompt_token_ids + two.output.prompt_token_ids,
                num_cached_tokens=one.output.num_cached_tokens + two.output.num_cached_tokens))
        return results

    def _pool(
        self, prompts: Prompt | Sequence[Prompt], params: PoolingParams | Sequence[PoolingParams] | None,
        use_tqdm: bool | Callable[..., Any], lora_request: Any, task: str | None, truncate: int | None, tokenization_kwargs: Any,
    ) -> list[OutputBuilder]:
        refuse_unbuilt(tokenization_kwargs=tokenization_kwargs)
        every = _as_list(prompts)
        one_each = list(params) if isinstance(params, Sequence) else [PoolingParams() if params is None else params] * len(every)
        if not all(isinstance(p, PoolingParams) for p in one_each):
            raise InvalidInput("pooling_params must be PoolingParams or a list of them", "pooling_params")
        if len(one_each) != len(every):
            raise InvalidInput(f"{len(every)} prompts, but {len(one_each)} PoolingParams: give one for all or one each", "pooling_params")
        given = {"task": task, "truncate_prompt_tokens": truncate}
        change: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return self._run_all([
            (prompt, dataclasses.replace(p, **change), lora, 0)
            for prompt, p, lora in zip(every, one_each, _lora_list(lora_request, len(every)), strict=True)
        ], use_tqdm)

    def get_tokenizer(self) -> Any:
        """The Transformers tokenizer where that package is installed, else the engine's own."""
        return self.llm_engine.get_tokenizer()

    def get_metrics(self) -> list[Metric]:
        """Counters, gauges and histograms of the requests of this object, under the names of the server's /metrics."""
        if self._metrics is None:
            raise InvalidInput("get_metrics needs an LLM that collects metrics: LLM(..., disable_log_stats=False)", "disable_log_stats")
        return read_metrics(self._metrics)

    def start_profile(self, profile_prefix: str | None = None) -> None:
        """Record a torch profiler trace until `stop_profile`. `profile_prefix` begins the name of its file."""
        import torch

        if self._profile is not None:
            raise InvalidInput("a profile is being recorded: call stop_profile first")
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile, self._profile_prefix = torch.profiler.profile(activities=activities), profile_prefix or "minivllm"
        self._profile.start()

    def stop_profile(self) -> Path:
        """Write the trace into VLLM_TORCH_PROFILER_DIR, by default the current folder, and return its path. Perfetto shows it."""
        if self._profile is None:
            raise InvalidInput("no profile is being recorded: call start_profile first")
        profile, self._profile = self._profile, None
        profile.stop()
        folder = Path(os.environ.get("VLLM_TORCH_PROFILER_DIR", ".")).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self._profile_prefix}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.json"
        profile.export_chrome_trace(str(path))
        print(f"minivllm: wrote the profile {path}", file=sys.stderr, flush=True)
        return path

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's own defaults (generation_config.json). They are used where no `sampling_params` are given."""
        return SamplingParams(**self.llm_engine.info().generation_config)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Forget all cached prefixes. The arguments are vLLM's and change nothing: no request runs between two calls."""
        return self.llm_engine.reset_prefix_cache()

    def close(self) -> None:
        """Free the weights, the KV cache and host memory. The object cannot be used afterwards."""
        self.llm_engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- running a batch ------------------------------------------------------------------------------------------------

    def _requests(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None, lora_request: Any,
        priority: Sequence[int] | None,
    ) -> list[_OfflineRequest]:
        """One entry per prompt. Raises `InvalidInput` if the lists have different lengths."""
        every = _as_list(prompts)
        if priority is not None and len(priority) != len(every):
            raise InvalidInput(f"{len(every)} prompts, but {len(priority)} priorities: give one each", "priority")
        return list(zip(every, self._params_list(params, len(every)), _lora_list(lora_request, len(every)), priority or [0] * len(every),
                        strict=True))

    def _params_list(self, params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * count
        if not isinstance(params, Sequence) or not all(isinstance(p, SamplingParams) for p in params):
            raise InvalidInput(f"sampling_params must be SamplingParams or a list of them, got {type(params).__name__}", "sampling_params")
        if len(params) != count:
            raise InvalidInput(f"{count} prompts, but {len(params)} SamplingParams: give one for all or one each", "sampling_params")
        return list(params)

    def _run(self, requests: Sequence[_OfflineRequest], use_tqdm: bool | Callable[..., Any]) -> list[RequestOutput]:
        return [builder.output for builder in self._run_all(requests, use_tqdm)]

    def _run_all(self, requests: Sequence[_OfflineRequest], use_tqdm: bool | Callable[..., Any]) -> list[OutputBuilder]:
        """Add requests as long as the engine's queue has room, run steps, and collect the deltas."""
        engine, core, metrics = self.llm_engine, self.llm_engine.core, self._metrics
        builders: dict[str, OutputBuilder] = {}
        finished: dict[str, OutputBuilder] = {}
        request_ids: list[str] = []  # of the prompts that were added
        progress = _Progress(len(requests), use_tqdm)
        try:
            while len(request_ids) < len(requests) or builders:
                while (i := len(request_ids)) < len(requests) and core.has_room:  # steps make room
                    prompt, params, lora_request, priority = requests[i]
                    request_ids.append(self._new_id())
                    text, request = prepare_request(
                        request_ids[i], prompt, params, core.tokenizer, core.max_model_len, priority=priority,
                        lora_request=lora_request)
                    core.add(request)
                    builders[request_ids[i]] = OutputBuilder(request_ids[i], text, request, core.tokenizer)
                    if metrics is not None:
                        metrics.added(request_ids[i], request.arrival_time, len(request.prompt_token_ids), request.params.n)
                deltas = engine.advance()
                if metrics is not None:
                    metrics.observe(deltas, core.stats())
                for delta in deltas:
                    builder = builders.get(delta.request_id)  # None: the caller added this request through `llm_engine`
                    if builder is not None and builder.add(delta):
                        finished[delta.request_id] = builders.pop(delta.request_id)
                        progress.done(builder)
        finally:
            progress.close()
            for request_id in builders:  # after an error or Ctrl-C: leave no request behind
                engine.abort_request(request_id)
        return [finished[request_id] for request_id in request_ids]

    def _new_id(self) -> str:
        """The next number that is not the id of a request which the caller has added through `llm_engine`."""
        while (name := str(self._num_requests)) in self.llm_engine.core:
            self._num_requests += 1
        self._num_requests += 1
        return name


def _template_source(template: str | None) -> str | None:
    """A chat template given as Jinja source, or as the path of a file with it."""
    if template is None or "{" in template or not Path(template).expanduser().is_file():
        return template
    return Path(template).expanduser().read_text(encoding="utf-8")


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list. A list of integers is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, (bytes, bytearray, Set)):  # bytes are not tokens, and a set has no order
        raise InvalidInput(f"prompts are texts or lists of token ids, got {shown(prompts)}", "prompts")
    every = list(prompts)
    return [every] if every and isinstance(every[0], numbers.Integral) else every  # type: ignore[list-item,return-value]


def _lora_list(lora_request: Any, count: int) -> list[LoRARequest | None]:
    """One adapter for all prompts, or a list with one (or None) for each."""
    if not isinstance(lora_request, Sequence):
        return [checked_lora(lora_request)] * count
    if len(lora_request) != count:
        raise InvalidInput(f"{count} prompts, but {len(lora_request)} LoRARequests: give one for all or one each", "lora_request")
    return [checked_lora(one) for one in lora_request]


class _Progress:
    """The progress bar on stderr, with prompt and output tokens per second."""

    def __init__(self, total: int, shown: bool | Callable[..., Any], clock: Callable[[], float] = time.monotonic) -> None:
        from tqdm import tqdm

        make = shown if callable(shown) else tqdm
        self._bar = make(total=total, desc="Processed prompts", unit="prompt", dynamic_ncols=True, disable=not shown)
        self._clock = clock
        self._start = clock()
        self._prompt_tokens = 0
        self._output_tokens = 0

    def done(self, builder: OutputBuilder) -> None:
        self._prompt_tokens += len(builder.output.prompt_token_ids)
        self._output_tokens += builder.num_tokens
        seconds = max(self._clock() - self._start, 1e-9)
        self._bar.set_postfix_str(
            f"in {self._prompt_tokens / seconds:.0f} tok/s, out {self._output_tokens / seconds:.0f} tok/s", refresh=False,
        )
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
