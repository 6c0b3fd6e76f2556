"""From the engine's deltas to the responses of `/v1/completions` and `/v1/chat/completions`, streamed or complete.

    stream     first_events() events() events() ... last_events()     bytes of server-sent events
    complete   collect()  collect() ... body()                        one JSON object

A choice is one completion: choice p * n + c is child c of prompt p. Most chunks hold a piece of text and nothing else, and there is one
per token and stream, so such a chunk is put together from a prepared head and tail instead of being encoded as a whole.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from minivllm.core.plan import TokenLogprobs
from minivllm.engine_request import EngineRequest
from minivllm.outputs import OutputDelta, RequestMetrics
from minivllm.server.errors import ApiError, encode, encode_text
from minivllm.server.logprobs import CompletionLogprobs, TokenNames, chat_entries, prompt_logprobs
from minivllm.server.output_spec import OutputSpec

DONE = b"data: [DONE]\n\n"


def event(body: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(body) + b"\n\n"


@dataclass(frozen=True, kw_only=True)
class PreparedRequest:
    """One HTTP request, ready for the engine: an engine request for each prompt, and the form of the response."""

    id: str
    owner: str = ""  # label of the API key
    created: int  # Unix time
    model: str
    fingerprint: str
    prompts: tuple[EngineRequest, ...]
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    return_prompt_logprobs: bool = False  # `echo` computes them too, but does not return them
    echo: tuple[str, ...] | None = None  # each prompt's text
    ignored: tuple[str, ...] = ()  # fields that had no effect
    output: OutputSpec | None = None  # of a chat whose output is more than text

    @property
    def n(self) -> int:
        return self.prompts[0].params.n


@dataclass(slots=True)
class ChoiceState:
    """One completion so far."""

    index: int
    prompt: int
    pieces: list[str] = field(default_factory=list)  # of text, for a complete response
    token_ids: list[int] = field(default_factory=list)
    logprobs: Any = None
    completion_logprobs: CompletionLogprobs | None = None
    started: bool = False
    num_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class GenerationState:
    """All choices of one request so far, and its usage and timings."""

    def __init__(self, request: PreparedRequest) -> None:
        self.choices = [ChoiceState(index, index // request.n) for index in range(len(request.prompts) * request.n)]
        self.prompt_logprobs: list[tuple[TokenLogprobs | None, ...]] = [()] * len(request.prompts)
        self._request = request
        self._cached = [0] * len(request.prompts)  # tokens that each prompt found in the prefix cache
        self._metrics: list[RequestMetrics] = []  # of children that have ended

    def update(self, prompt: int, deltas: Sequence[OutputDelta]) -> Iterator[tuple[ChoiceState, OutputDelta]]:
        """Record a prompt's values, then yield each delta with its choice."""
        for delta in deltas:
            self._cached[prompt] = max(self._cached[prompt], delta.num_cached_tokens)
            if delta.prompt_logprobs is not None:
                self.prompt_logprobs[prompt] = delta.prompt_logprobs
        for delta in deltas:
            choice = self.choices[prompt * self._request.n + delta.index]
            choice.num_tokens += len(delta.token_ids)
            choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
            if delta.metrics is not None:
                self._metrics.append(delta.metrics)
            yield choice, delta

    def usage(self) -> dict[str, Any]:
        prompt = sum(len(request.prompt_token_ids) for request in self._request.prompts)
        completion = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached)},
        }

    def metrics(self) -> dict[str, Any] | None:
        """Durations in seconds since the request arrived; None if no child reported any."""
        times = self._metrics
        if not times:
            return None
        arrival = min(t.arrival_time for t in times)
        scheduled = [t.first_scheduled_time for t in times if t.first_scheduled_time is not None]
        tokens = [t.first_token_time for t in times if t.first_token_time is not None]
        ends = [t.finished_time for t in times if t.finished_time is not None]
        return {
            "queue_time": min(scheduled) - arrival if scheduled else None, "time_to_first_token": min(tokens) - arrival if tokens else None,
            "e2e_latency": max(ends) - arrival if ends else None, "num_preemptions": sum(t.num_preemptions for t in times),
        }


def _count(entries: Sequence[TokenLogprobs | None] | None) -> int:
    return sum(1 + len(entry.top_ids) for entry in entries or () if entry is not None)


class ResponseFormatter(ABC):
    """The response to one request, as `GenerationResponse` sends it."""

    def __init__(self, request: PreparedRequest, names: TokenNames) -> None:
        self.request = request
        self.names = names
        self.state = GenerationState(request)
        params = request.prompts[0].params
        self.num_logprobs = params.logprobs
        self.skip_special = params.skip_special_tokens

    def num_entries(self, prompt: int, deltas: Sequence[OutputDelta]) -> int:
        """About how many log-probabilities, with alternatives, will be written for these new deltas of a prompt."""
        request, entries = self.request, 0
        if self.num_logprobs is None and not request.return_prompt_logprobs:
            return 0  # most requests
        repeats = request.n if request.return_prompt_logprobs else 1
        echoed = 0
        if request.echo is not None and self.num_logprobs is not None:
            echoed = len(request.prompts[prompt].prompt_token_ids) * (1 + max(self.num_logprobs, 0))
        for delta in deltas:
            entries += _count(delta.logprobs) + _count(delta.prompt_logprobs) * repeats
            if echoed and not self.state.choices[prompt * request.n + delta.index].started:
                entries += echoed
        return entries

    # -- streamed -----------------------------------------------------------------------------------------------------

    def first_events(self) -> bytes:
        """Events before all others."""
        return b""

    @abstractmethod
    def events(self, prompt: int, deltas: Sequence[OutputDelta]) -> bytes:
        """The events for a prompt's deltas of one step. Empty if the deltas have nothing to show yet."""

    def text_events(self, deltas: Sequence[OutputDelta]) -> bytes | None:
        """A faster `events` for a single prompt whose deltas are text only. None: not applicable, and nothing is recorded."""
        return None

    @abstractmethod
    def last_events(self) -> bytes:
        """Events after all others."""

    @abstractmethod
    def error_events(self, error: ApiError) -> bytes:
        """The last events of a stream that fails."""

    # -- complete -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def collect(self, prompt: int, deltas: Sequence[OutputDelta]) -> None: ...

    @abstractmethod
    def body(self) -> dict[str, Any]:
        """The body of the complete response."""


class ChoicesFormatter(ResponseFormatter):
    """A response with a list of choices."""

    OBJECT: ClassVar[str]
    CHUNK_OBJECT: ClassVar[str]
    CONTENT: ClassVar[str]  # name of a choice's content in a complete response
    CHUNK_CONTENT: ClassVar[str]  # and in a chunk
    # A chunk's JSON before and after its text. None: the text is parsed first, so text alone does not make a chunk.
    TEXT_CHUNK: ClassVar[tuple[str, str] | None]

    def __init__(self, request: PreparedRequest, names: TokenNames) -> None:
        super().__init__(request, names)
        self._text_only = self.TEXT_CHUNK is not None and not (
            request.continuous_usage or request.return_token_ids or self.num_logprobs is not None)
        before, after = self.TEXT_CHUNK or ("", "")
        opening = encode(self._chunk_fields()).decode()[:-1]
        self._heads = [f'data: {opening},"choices":[{{"index":{choice.index},{before}' for choice in self.state.choices]
        self._tail = after + ('],"usage":null}\n\n' if request.include_usage else "]}\n\n")

    # -- the differences between the endpoints ------------------------------------------------------------------------

    @abstractmethod
    def format_logprobs(self, choice: ChoiceState, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> Any:
        """Log-probabilities of some tokens in the endpoint's format."""

    @abstractmethod
    def chunk_content(self, choice: ChoiceState, text: str) -> Any:
        """The content of a chunk for new text. Empty if it has none."""

    @abstractmethod
    def complete_content(self, choice: ChoiceState) -> Any: ...

    def finish_reason(self, choice: ChoiceState) -> str | None:
        return choice.finish_reason

    def keep_text(self, choice: ChoiceState, text: str) -> None:
        """Collect text for the complete response."""
        choice.pieces.append(text)

    # -- streamed -----------------------------------------------------------------------------------------------------

    def events(self, prompt: int, deltas: Sequence[OutputDelta]) -> bytes:
        out = []
        for choice, delta in self.state.update(prompt, deltas):
            if self._text_only and delta.finish_reason is None and (choice.started or self.request.echo is None):
                choice.started = True
                if delta.text:
                    out.append(self._text_event(choice.index, delta.text))
                continue
            text, logprobs = self._text_and_logprobs(choice, delta)
            content = self.chunk_content(choice, text)
            if content or logprobs or delta.finish_reason is not None or (self.request.return_token_ids and delta.token_ids):
                body = self._choice(choice, self.CHUNK_CONTENT, content, logprobs)
                if self.request.return_token_ids:
                    body["token_ids"] = list(delta.token_ids)
                out.append(self._chunk([body], self.state.usage() if self.request.continuous_usage else None))
        return b"".join(out)

    def text_events(self, deltas: Sequence[OutputDelta]) -> bytes | None:
        if not self._text_only:
            return None
        events, choices = b"", self.state.choices
        for delta in deltas:
            choice = choices[delta.index]
            if delta.finish_reason is not None or not choice.started:
                return None
            if delta.text:
                events += self._text_event(delta.index, delta.text)
        for delta in deltas:
            choices[delta.index].num_tokens += len(delta.token_ids)
        return events

    def _text_event(self, choice: int, text: str) -> bytes:
        """A chunk with nothing but text. The only place that makes one, so a stream's bytes do not depend on which caller was faster."""
        return encode_text(self._heads[choice], text, self._tail)

    def last_events(self) -> bytes:
        return (self._chunk([], self.state.usage(), self.state.metrics()) if self.request.include_usage else b"") + DONE

    def error_events(self, error: ApiError) -> bytes:
        return event(error.body()) + DONE

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None, metrics: dict[str, Any] | None = None) -> bytes:
        body: dict[str, Any] = {**self._chunk_fields(), "choices": choices}
        if self.request.include_usage or usage is not None:
            body["usage"] = usage
        if metrics is not None:
            body["metrics"] = metrics
        return event(body)

    def _chunk_fields(self) -> dict[str, Any]:
        request = self.request
        return {"id": request.id, "object": self.CHUNK_OBJECT, "created": request.created, "model": request.model,
                "system_fingerprint": request.fingerprint}

    # -- complete -----------------------------------------------------------------------------------------------------

    def collect(self, prompt: int, deltas: Sequence[OutputDelta]) -> None:
        for choice, delta in self.state.update(prompt, deltas):
            text, logprobs = self._text_and_logprobs(choice, delta)
            self.keep_text(choice, text)
            if self.request.return_token_ids:
                choice.token_ids += delta.token_ids
            if logprobs is not None:
                if choice.logprobs is None:
                    choice.logprobs = {name: [] for name in logprobs}
                for name, values in choice.logprobs.items():
                    values += logprobs[name]

    def body(self) -> dict[str, Any]:
        return {
            **self._chunk_fields(), "object": self.OBJECT, "choices": [self._complete_choice(choice) for choice in self.state.choices],
            "usage": self.state.usage(), "metrics": self.state.metrics(),
        }

    def _complete_choice(self, choice: ChoiceState) -> dict[str, Any]:
        body = self._choice(choice, self.CONTENT, self.complete_content(choice), choice.logprobs)
        if self.request.return_token_ids:
            body["prompt_token_ids"] = list(self.request.prompts[choice.prompt].prompt_token_ids)
            body["token_ids"] = choice.token_ids
        if self.request.return_prompt_logprobs:
            body["prompt_logprobs"] = prompt_logprobs(self.names, self.state.prompt_logprobs[choice.prompt])
        return body

    # -- both ---------------------------------------------------------------------------------------------------------

    def _choice(self, choice: ChoiceState, name: str, content: Any, logprobs: Any) -> dict[str, Any]:
        return {"index": choice.index, name: content, "logprobs": logprobs,
                "finish_reason": self.finish_reason(choice), "stop_reason": choice.stop_reason}

    def _text_and_logprobs(self, choice: ChoiceState, delta: OutputDelta) -> tuple[str, Any]:
        """A delta's text and log-probabilities. The first delta also has those of the prompt if it is echoed."""
        text, logprobs = delta.text, None
        token_ids: Sequence[int] = delta.token_ids
        entries: Sequence[TokenLogprobs | None] = delta.logprobs or ()
        if self.request.echo is not None and not choice.started:
            text = self.request.echo[choice.prompt] + text
            token_ids = (*self.request.prompts[choice.prompt].prompt_token_ids, *token_ids)
            entries = (*self.state.prompt_logprobs[choice.prompt], *entries)
        choice.started = True
        if self.num_logprobs is not None and entries:
            logprobs = self.format_logprobs(choice, token_ids[:len(entries)], entries)
        return text, logprobs


class CompletionFormatter(ChoicesFormatter):
    """`/v1/completions`."""

    OBJECT = CHUNK_OBJECT = "text_completion"
    CONTENT = CHUNK_CONTENT = "text"
    TEXT_CHUNK = '"text":', ',"logprobs":null,"finish_reason":null,"stop_reason":null}'

    def format_logprobs(self, choice: ChoiceState, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> Any:
        if choice.completion_logprobs is None:
            echo = self.request.echo
            prompt = (0, "") if echo is None else (len(self.request.prompts[choice.prompt].prompt_token_ids), echo[choice.prompt])
            choice.completion_logprobs = CompletionLogprobs(self.names, self.num_logprobs or 0, self.skip_special, prompt)
        return choice.completion_logprobs.add(token_ids, entries)

    def chunk_content(self, choice: ChoiceState, text: str) -> str:
        return text

    def complete_content(self, choice: ChoiceState) -> str:
        return "".join(choice.pieces)


class ChatFormatter(ChoicesFormatter):
    """`/v1/chat/completions` with an output that is text and nothing else."""

    OBJECT = "chat.completion"
    CHUNK_OBJECT = "chat.completion.chunk"
    CONTENT, CHUNK_CONTENT = "message", "delta"
    TEXT_CHUNK: ClassVar[tuple[str, str] | None] = '"delta":{"content":', '},"logprobs":null,"finish_reason":null,"stop_reason":null}'
    no_content: str | None = ""  # content of the first chunk, and of a complete message without text

    def first_events(self) -> bytes:
        """One chunk with the role for every choice."""
        usage = self.state.usage() if self.request.continuous_usage else None
        return b"".join(
            self._chunk([self._choice(choice, "delta", {"role": "assistant", "content": self.no_content}, None)], usage)
            for choice in self.state.choices
        )

    def format_logprobs(self, choice: ChoiceState, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> Any:
        return {"content": chat_entries(self.names, (e for e in entries if e is not None), self.num_logprobs or 0)}

    def chunk_content(self, choice: ChoiceState, text: str) -> dict[str, Any]:
        return {"content": text} if text else {}

    def complete_content(self, choice: ChoiceState) -> dict[str, Any]:
        return {"role": "assistant", "content": "".join(choice.pieces), "reasoning": None}
