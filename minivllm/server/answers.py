"""The engine's deltas as the JSON of the two generation endpoints, whole or streamed.

    stream     first() chunk() chunk() ... last()     bytes of server-sent events
    whole      keep()  keep() ... whole()             one JSON object

A choice is one completion: prompt p's child c is choice p * n + c. Most chunks carry a piece of text and nothing else, and there
is one per token and stream, so those are joined from a prepared head and tail instead of being encoded as a whole.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any, ClassVar

from minivllm.core.plan import TokenLogprobs
from minivllm.engine_request import EngineRequest
from minivllm.outputs import OutputDelta, RequestMetrics
from minivllm.server.errors import ApiError, encode
from minivllm.server.logprobs import CompletionLogprobs, TokenNames, chat_entries, prompt_logprobs
from minivllm.server.reading import Reading

DONE = b"data: [DONE]\n\n"


def event(body: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(body) + b"\n\n"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One HTTP request, ready for the engine: its prompts, and how it wants to be answered."""

    id: str
    created: int  # Unix time
    model: str
    fingerprint: str
    requests: tuple[EngineRequest, ...]  # one per prompt
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    show_prompt_logprobs: bool = False  # asked for by name; echo uses them for itself
    echo: tuple[str, ...] | None = None  # each prompt's text
    ignored: tuple[str, ...] = ()  # fields that changed nothing
    reading: Reading | None = None  # of a chat whose output is more than text

    @property
    def n(self) -> int:
        return self.requests[0].params.n


@dataclass(slots=True)
class Choice:
    """What is known of one completion."""

    index: int
    prompt: int
    head: str  # of a chunk, up to its text
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: Any = None
    counter: CompletionLogprobs | None = None
    started: bool = False
    num_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Answer(ABC):
    """What the client of one request is told."""

    OBJECT: ClassVar[str]
    CHUNK_OBJECT: ClassVar[str]
    TAIL: ClassVar[str]  # of a chunk, from the end of its text to the end of its choice

    def __init__(self, job: Job, names: TokenNames) -> None:
        self.job = job
        self.names = names
        params = job.requests[0].params
        self.top_logprobs = params.logprobs
        self.skip_special = params.skip_special_tokens
        self.cached = [0] * len(job.requests)
        self._times: list[RequestMetrics] = []  # of children that have ended
        self.prompt_logprobs: list[tuple[TokenLogprobs | None, ...] | None] = [None] * len(job.requests)
        opening = encode({"id": job.id, "object": self.CHUNK_OBJECT, "created": job.created, "model": job.model,
                          "system_fingerprint": job.fingerprint}).decode()[:-1]
        self.choices = [
            Choice(index, index // job.n, f'data: {opening},"choices":[{{"index":{index},{self.text_opening()}')
            for index in range(len(job.requests) * job.n)
        ]
        self._tail = self.TAIL + ('],"usage":null}\n\n' if job.include_usage else "]}\n\n")
        # Whether a token's chunk is its text and nothing else; then `plain` may speak for `chunk`, where that is this class's own.
        self._plain = not (job.continuous_usage or job.return_token_ids or self.top_logprobs is not None)
        self._plain_alone = self._plain and type(self).chunk is Answer.chunk

    # -- what differs between the endpoints ---------------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def text_opening() -> str:
        """JSON in front of a chunk's text."""

    @abstractmethod
    def new_logprobs(self, choice: Choice, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> Any:
        """The endpoint's form of some tokens' log-probabilities."""

    @abstractmethod
    def chunk_choice(self, choice: Choice, text: str, logprobs: Any) -> dict[str, Any]: ...

    @abstractmethod
    def whole_choice(self, choice: Choice) -> dict[str, Any]: ...

    def echoed(self, choice: Choice) -> str:
        """Text in front of the output."""
        return ""

    # -- streamed -----------------------------------------------------------------------------------------------------

    def first(self) -> bytes:
        """Events in front of everything."""
        return b""

    def chunk(self, prompt: int, deltas: Sequence[OutputDelta]) -> bytes:
        """The events for what one step brought one prompt's children; empty if nothing can be told yet."""
        out = []
        for choice, delta in self._take(prompt, deltas):
            if self._plain and delta.finish_reason is None and (choice.started or self.job.echo is None):
                choice.started = True
                if delta.text:
                    out.append((choice.head + encode_basestring(delta.text) + self._tail).encode("utf-8", "replace"))
                continue
            text, logprobs = self._news(choice, delta)
            if text or logprobs or delta.finish_reason is not None or (self.job.return_token_ids and delta.token_ids):
                body = self.chunk_choice(choice, text, logprobs)
                if self.job.return_token_ids:
                    body["token_ids"] = list(delta.token_ids)
                out.append(self._event([body], self.usage() if self.job.continuous_usage else None))
        return b"".join(out)

    def plain(self, deltas: Sequence[OutputDelta]) -> bytes | None:
        """`chunk` for the midst of a single prompt's stream: text and nothing else. None: this is something else."""
        if not self._plain_alone:
            return None
        events = ""
        for delta in deltas:
            choice = self.choices[delta.index]
            if delta.finish_reason is not None or not choice.started:
                return None
            if delta.text:
                events += choice.head + encode_basestring(delta.text) + self._tail
        for delta in deltas:
            self.choices[delta.index].num_tokens += len(delta.token_ids)
        return events.encode("utf-8", "replace")

    def last(self) -> bytes:
        """The events after everything."""
        return (self._event([], self.usage(), self.metrics()) if self.job.include_usage else b"") + DONE

    def failed(self, error: ApiError) -> bytes:
        """The events after everything, when it went wrong in the middle."""
        return event(error.body()) + DONE

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None, metrics: dict[str, Any] | None = None) -> bytes:
        job = self.job
        body: dict[str, Any] = {"id": job.id, "object": self.CHUNK_OBJECT, "created": job.created, "model": job.model,
                                "system_fingerprint": job.fingerprint, "choices": choices}
        if job.include_usage or usage is not None:
            body["usage"] = usage
        if metrics is not None:
            body["metrics"] = metrics
        return event(body)

    # -- whole --------------------------------------------------------------------------------------------------------

    def keep(self, prompt: int, deltas: Sequence[OutputDelta]) -> None:
        for choice, delta in self._take(prompt, deltas):
            text, logprobs = self._news(choice, delta)
            choice.pieces.append(text)
            if self.job.return_token_ids:
                choice.token_ids += delta.token_ids
            if logprobs is not None:
                choice.logprobs = logprobs if choice.logprobs is None else _joined(choice.logprobs, logprobs)

    def whole(self) -> dict[str, Any]:
        """The body of the response."""
        job = self.job
        return {
            "id": job.id, "object": self.OBJECT, "created": job.created, "model": job.model, "system_fingerprint": job.fingerprint,
            "choices": [self._full_choice(choice) for choice in self.choices], "usage": self.usage(), "metrics": self.metrics(),
        }

    def _full_choice(self, choice: Choice) -> dict[str, Any]:
        body = self.whole_choice(choice)
        if self.job.return_token_ids:
            body["prompt_token_ids"] = list(self.job.requests[choice.prompt].prompt_token_ids)
            body["token_ids"] = choice.token_ids
        if self.job.show_prompt_logprobs:
            body["prompt_logprobs"] = prompt_logprobs(self.names, self.prompt_logprobs[choice.prompt] or ())
        return body

    def usage(self) -> dict[str, Any]:
        prompt = sum(len(request.prompt_token_ids) for request in self.job.requests)
        completion = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached)},
        }

    def metrics(self) -> dict[str, Any] | None:
        """How long this request took, in seconds since it arrived; None if no child says so."""
        times = self._times
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

    # -- both ---------------------------------------------------------------------------------------------------------

    def _take(self, prompt: int, deltas: Sequence[OutputDelta]) -> Iterator[tuple[Choice, OutputDelta]]:
        """Note what the deltas say of the request as a whole; then pair each with its choice, brought up to date."""
        for delta in deltas:
            self.cached[prompt] = max(self.cached[prompt], delta.num_cached_tokens)
            if delta.prompt_logprobs is not None:
                self.prompt_logprobs[prompt] = delta.prompt_logprobs
        for delta in deltas:
            choice = self.choices[prompt * self.job.n + delta.index]
            choice.num_tokens += len(delta.token_ids)
            choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
            if delta.metrics is not None:
                self._times.append(delta.metrics)
            yield choice, delta

    def _news(self, choice: Choice, delta: OutputDelta) -> tuple[str, Any]:
        """A delta's text and log-probabilities, with the prompt's in front if it is echoed and this is the first."""
        text, logprobs = delta.text, None
        token_ids: Sequence[int] = delta.token_ids
        entries: Sequence[TokenLogprobs | None] = delta.logprobs or ()
        if self.job.echo is not None and not choice.started:
            text = self.echoed(choice) + text
            token_ids = (*self.job.requests[choice.prompt].prompt_token_ids, *token_ids)
            entries = (*(self.prompt_logprobs[choice.prompt] or ()), *entries)
        choice.started = True
        if self.top_logprobs is not None and entries:
            logprobs = self.new_logprobs(choice, token_ids[:len(entries)], entries)
        return text, logprobs


def _joined(old: Any, new: Any) -> Any:
    """Two pieces of log-probabilities: lists, or objects of lists."""
    if isinstance(old, list):
        return old + new
    return {key: old[key] + new[key] for key in old}


class CompletionAnswer(Answer):
    """`/v1/completions`."""

    OBJECT = CHUNK_OBJECT = "text_completion"
    TAIL = ',"logprobs":null,"finish_reason":null,"stop_reason":null}'

    @staticmethod
    def text_opening() -> str:
        return '"text":'

    def echoed(self, choice: Choice) -> str:
        return self.job.echo[choice.prompt] if self.job.echo is not None else ""

    def new_logprobs(self, choice: Choice, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> Any:
        if choice.counter is None:
            choice.counter = CompletionLogprobs(self.names, self.top_logprobs or 0, self.skip_special)
        return choice.counter.add(token_ids, entries)

    def chunk_choice(self, choice: Choice, text: str, logprobs: Any) -> dict[str, Any]:
        return {"index": choice.index, "text": text, "logprobs": logprobs,
                "finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}

    def whole_choice(self, choice: Choice) -> dict[str, Any]:
        return self.chunk_choice(choice, "".join(choice.pieces), choice.logprobs)


class ChatAnswer(Answer):
    """`/v1/chat/completions`."""

    OBJECT = "chat.completion"
    CHUNK_OBJECT = "chat.completion.chunk"
    TAIL = '},"logprobs":null,"finish_reason":null,"stop_reason":null}'

    @staticmethod
    def text_opening() -> str:
        return '"delta":{"content":'

    def first(self) -> bytes:
        """Every choice begins by saying whose words it is."""
        usage = self.usage() if self.job.continuous_usage else None
        return b"".join(
            self._event([{"index": choice.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                          "finish_reason": None, "stop_reason": None}], usage)
            for choice in self.choices
        )

    def new_logprobs(self, choice: Choice, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> Any:
        return {"content": chat_entries(self.names, (e for e in entries if e is not None), self.top_logprobs or 0)}

    def chunk_choice(self, choice: Choice, text: str, logprobs: Any) -> dict[str, Any]:
        return {"index": choice.index, "delta": {"content": text} if text else {}, "logprobs": logprobs,
                "finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}

    def whole_choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index, "message": {"role": "assistant", "content": "".join(choice.pieces)}, "logprobs": choice.logprobs,
            "finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason,
        }
