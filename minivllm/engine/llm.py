"""`LLM`: vLLM's class for scripts and notebooks. The engine runs in this process.

    with LLM() as llm:
        for output in llm.generate(["Once upon a time", "2 + 2 ="], SamplingParams(temperature=0)):
            print(output.outputs[0].text)
"""
from __future__ import annotations

import logging
import numbers
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from minivllm.config import EngineConfig
from minivllm.engine.assemble import OutputBuilder
from minivllm.engine.beam_search import BeamSearchOutput, BeamSearchParams, beam_search
from minivllm.engine.compose import build_engine
from minivllm.engine.llm_engine import LLMEngine
from minivllm.engine.prompts import Prompt, prepare_request
from minivllm.engine.tokenizer import Tokenizer
from minivllm.errors import InvalidInput
from minivllm.outputs import RequestOutput
from minivllm.sampling_params import SamplingParams

log = logging.getLogger(__name__)

Conversation = Sequence[Mapping[str, Any]]  # messages: {"role": ..., "content": ...}


class LLM:
    """A model that answers lists of prompts. Its keywords are the fields of `EngineConfig`."""

    def __init__(self, model: str | None = None, **kwargs: Any) -> None:
        self.config = EngineConfig.from_kwargs(model=model, **kwargs)
        self.llm_engine = LLMEngine(build_engine(self.config))
        self._num_requests = 0

    # -- vLLM's methods -------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *,
        use_tqdm: bool = True, priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt. The outputs have the order of the prompts.

        A prompt is text, {"prompt": text} or {"prompt_token_ids": ids}. `sampling_params` is one object for
        all prompts, or a list with one for each.
        """
        every = _as_list(prompts)
        params = self._params_list(sampling_params, len(every))
        if priority is not None and len(priority) != len(every):
            raise InvalidInput(f"{len(every)} prompts, but {len(priority)} priorities: give one each", "priority")
        return self._run(every, params, priority or [0] * len(every), use_tqdm)

    def chat(
        self, messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *, use_tqdm: bool = True,
        chat_template: str | None = None, add_generation_prompt: bool = True, continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None, chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of messages) or several (a list of such lists).

        `tools` are described to the model in the prompt. Its calls are part of the output's text, in the model's own format.
        """
        tokenizer = self.get_tokenizer()
        conversations: Sequence[Any] = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts: list[Prompt] = []
        for one in conversations:
            text = tokenizer.apply_chat_template(
                one, tokenize=False, chat_template=chat_template, add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message, tools=tools, **(chat_template_kwargs or {}),
            )
            assert isinstance(text, str)
            ids = tokenizer.encode(text, add_special_tokens=False)  # the template has written the special tokens
            prompts.append({"prompt": text, "prompt_token_ids": ids})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def beam_search(self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams) -> list[BeamSearchOutput]:
        """The `beam_width` most probable outputs of each prompt, best first."""
        every = _as_list(prompts)
        request_ids = [f"beam-{self._new_id()}" for _ in every]
        return beam_search(self.llm_engine, request_ids, every, params)

    def get_tokenizer(self) -> Tokenizer:
        return self.llm_engine.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's own defaults (generation_config.json). They are used where no `sampling_params` are given."""
        return SamplingParams(**self.llm_engine.info().generation_config)

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes."""
        self.llm_engine.reset_prefix_cache()

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

    def _run(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], priorities: Sequence[int], use_tqdm: bool,
    ) -> list[RequestOutput]:
        """Add requests as long as the engine's queue has room, run steps, and collect the deltas."""
        engine, core = self.llm_engine, self.llm_engine.core
        builders: dict[str, OutputBuilder] = {}
        finished: dict[str, RequestOutput] = {}
        request_ids: list[str] = []  # of the prompts that were added
        progress = _Progress(len(prompts), use_tqdm)
        try:
            while len(request_ids) < len(prompts) or builders:
                while (i := len(request_ids)) < len(prompts) and core.has_room:  # steps make room
                    request_ids.append(self._new_id())
                    text, request = prepare_request(
                        request_ids[i], prompts[i], params[i], core.tokenizer, core.max_model_len, priority=priorities[i])
                    core.add(request)
                    builders[request_ids[i]] = OutputBuilder(request_ids[i], text, request, core.tokenizer)
                for delta in engine.advance():
                    builder = builders.get(delta.request_id)  # None: the caller added this request through `llm_engine`
                    if builder is not None and builder.add(delta):
                        finished[delta.request_id] = builders.pop(delta.request_id).output
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


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list. A list of integers is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise InvalidInput(f"prompts are texts or lists of token ids, got {prompts!r}", "prompts")
    every = list(prompts)
    return [every] if every and isinstance(every[0], numbers.Integral) else every  # type: ignore[list-item,return-value]


class _Progress:
    """The progress bar on stderr, with prompt and output tokens per second."""

    def __init__(self, total: int, shown: bool, clock: Callable[[], float] = time.monotonic) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, desc="Processed prompts", unit="prompt", dynamic_ncols=True, disable=not shown)
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
