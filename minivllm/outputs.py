"""The output of a request: `RequestOutput` (vLLM's names), and the `OutputDelta`s that it is assembled from.

The engine emits deltas, because a stream sends only what is new, and messages between processes stay small. `LLM.generate` adds them
up to one `RequestOutput` per prompt.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

from minivllm.core.plan import TokenLogprobs
from minivllm.engine_request import LoRARequest

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability at one position (vLLM's class)."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class DraftCounts:
    """Speculative decoding: drafts that were verified, and how many of them were accepted."""

    num_steps: int = 0  # steps of a sequence with drafts
    num_drafts: int = 0
    accepted_per_position: list[int] = field(default_factory=list)  # [i]: steps in which the first i + 1 drafts were accepted

    @property
    def num_accepted(self) -> int:
        return sum(self.accepted_per_position)

    def add(self, num_drafts: int, num_accepted: int) -> None:
        """Count one step of a sequence."""
        self.num_steps += 1
        self.num_drafts += num_drafts
        counts = self.accepted_per_position
        counts.extend([0] * (num_drafts - len(counts)))
        for position in range(num_accepted):
            counts[position] += 1

    def __add__(self, other: DraftCounts) -> DraftCounts:
        """The counts of two sequences together."""
        positions = zip_longest(self.accepted_per_position, other.accepted_per_position, fillvalue=0)
        return DraftCounts(self.num_steps + other.num_steps, self.num_drafts + other.num_drafts, [a + b for a, b in positions])


@dataclass(slots=True)
class RequestMetrics:
    """Times and counts of one request, in seconds: of `time.monotonic` in deltas, of `time.time` in a `RequestOutput`, as in vLLM."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0
    drafts: DraftCounts | None = None  # None: no speculative decoding

    @property
    def last_token_time(self) -> float | None:
        """vLLM's name of `finished_time`."""
        return self.finished_time

    @property
    def time_in_queue(self) -> float | None:
        """From the arrival to the first step."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time


class OutputDelta(NamedTuple):
    """What one step added to one child of one request. It is a tuple because one is created and sent for every token."""

    request_id: str
    index: int  # type: ignore[assignment]  # child, 0..n-1 (hides tuple.index)
    token_ids: tuple[int, ...]
    text: str  # text that is final now; it may lag behind the tokens
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop string or stop token id; None for EOS
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # in the first delta, if requested
    metrics: RequestMetrics | None = None  # in the last delta
    error: str | None = None
    error_param: str | None = None  # the request's field that caused the error, if it is one field
    pooled: bytes | None = None  # in the last delta of a request with pooling: its vector, as float32


@dataclass
class CompletionOutput:
    """One completion of a prompt."""

    index: int  # 0 to n - 1
    text: str = ""  # the output's text
    token_ids: list[int] = field(default_factory=list)  # its tokens
    cumulative_logprob: float | None = None  # sum of the sampled tokens' log-probabilities, if logprobs were requested
    logprobs: list[dict[int, Logprob]] | None = None  # per token: token id -> log-probability, the sampled token among them
    finish_reason: FinishReason | None = None  # None: it still runs
    stop_reason: int | str | None = None  # the stop string or stop token id; None for EOS
    lora_request: LoRARequest | None = None  # the request's adapter

    def finished(self) -> bool:
        """A method, as in vLLM."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """All completions of one prompt, with vLLM's attribute names."""

    request_id: str  # the engine's id of the request
    prompt: str | None  # the prompt's text; None: it was given as token ids
    prompt_token_ids: list[int]  # the prompt as the model sees it
    outputs: list[CompletionOutput]  # one per completion, n in all
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # per prompt token, as in CompletionOutput; the first one has none
    num_cached_tokens: int = 0  # prompt tokens that the prefix cache had
    metrics: RequestMetrics | None = None  # times and counts of the request
    finished: bool = False  # all completions have ended
    lora_request: LoRARequest | None = None  # the adapter it was computed with
    # vLLM's further attributes, for features that are not built
    encoder_prompt: None = None
    encoder_prompt_token_ids: None = None
    kv_transfer_params: None = None


@dataclass
class PoolingOutput:
    """The vector of one prompt (vLLM's class)."""

    data: Any  # torch.Tensor [size] float32


@dataclass
class EmbeddingOutput:
    """The vector of one prompt as numbers (vLLM's class)."""

    embedding: list[float]  # its entries

    @property
    def hidden_size(self) -> int:
        """Number of entries."""
        return len(self.embedding)


@dataclass
class ScoringOutput:
    """How similar two prompts are (vLLM's class)."""

    score: float  # cosine similarity, from -1 to 1


@dataclass
class PoolingRequestOutput:
    """The result of a request with `PoolingParams`, with vLLM's attribute names."""

    request_id: str  # the engine's id of the request
    outputs: Any  # PoolingOutput; of `LLM.embed` an EmbeddingOutput, of `LLM.score` a ScoringOutput
    prompt_token_ids: list[int]  # the prompt as the model sees it; of a score both prompts
    finished: bool = True  # always true
    num_cached_tokens: int = 0  # prompt tokens that the prefix cache had


class EmbeddingRequestOutput(PoolingRequestOutput):
    """What `LLM.embed` returns: `outputs` is an `EmbeddingOutput`."""


class ScoringRequestOutput(PoolingRequestOutput):
    """What `LLM.score` returns: `outputs` is a `ScoringOutput`."""
