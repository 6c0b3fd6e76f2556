"""Builds a `RequestOutput` (vLLM's shape) from the deltas of a request."""
from __future__ import annotations

import time
from dataclasses import replace

from minivllm.core.plan import TokenLogprobs
from minivllm.engine.tokenizer import Tokenizer
from minivllm.engine_request import EngineRequest
from minivllm.errors import RequestFailed
from minivllm.outputs import CompletionOutput, Logprob, OutputDelta, PoolingOutput, PoolingRequestOutput, RequestMetrics, RequestOutput
from minivllm.sampling_params import RequestOutputKind


class OutputBuilder:
    """The output of one request so far."""

    def __init__(self, request_id: str, prompt: str | None, request: EngineRequest, tokenizer: Tokenizer | None) -> None:
        params = request.params
        self._tokenizer = tokenizer if params.detokenize else None
        self._texts: list[list[str]] = [[] for _ in range(params.n)]
        self._unfinished = params.n
        self._kind = params.output_kind
        self._reported = [(0, 0, False)] * params.n  # of each completion: tokens, characters, finished; used with DELTA only
        self.num_tokens = 0
        self._pooled: bytes | None = None
        self._error: str | None = None
        self._pools = params.pooling is not None
        self.output = RequestOutput(
            request_id=request_id, prompt=prompt, prompt_token_ids=list(request.prompt_token_ids),
            outputs=[CompletionOutput(index=i, lora_request=request.lora_request) for i in range(params.n)],
            lora_request=request.lora_request,
        )
        for completion in self.output.outputs:
            if params.logprobs is not None:
                completion.logprobs, completion.cumulative_logprob = [], 0.0

    def add(self, delta: OutputDelta) -> bool:
        """Add one delta. True: it was the last one, so `output` is complete."""
        completion = self.output.outputs[delta.index]
        completion.token_ids.extend(delta.token_ids)
        self.num_tokens += len(delta.token_ids)
        self._texts[delta.index].append(delta.text)
        if completion.logprobs is not None and completion.cumulative_logprob is not None:
            for entry in delta.logprobs or ():
                completion.cumulative_logprob += entry.logprob
                completion.logprobs.append(logprob_dict(entry, self._tokenizer))
        if delta.prompt_logprobs is not None:
            self.output.prompt_logprobs = [
                None if entry is None else logprob_dict(entry, self._tokenizer) for entry in delta.prompt_logprobs
            ]
        self.output.num_cached_tokens = max(self.output.num_cached_tokens, delta.num_cached_tokens)
        if delta.finish_reason is None:
            return False
        self._pooled, self._error = delta.pooled, delta.error
        completion.text = "".join(self._texts[delta.index])
        completion.finish_reason, completion.stop_reason = delta.finish_reason, delta.stop_reason
        if delta.metrics is not None:
            self.output.metrics = _of_request(self.output.metrics, _by_wall_clock(delta.metrics))
        self._unfinished -= 1
        self.output.finished = self._unfinished == 0
        return self.output.finished

    def vector(self) -> bytes:
        """The float32 vector of a finished request with pooling. Raises `RequestFailed` if it ended without one."""
        if self._pooled is None:
            raise RequestFailed(f"the prompt of request {self.output.request_id!r} has no vector: {self._error or 'it was aborted'}")
        return self._pooled

    def pooling_output(self) -> PoolingRequestOutput:
        """The result of a finished request with pooling."""
        import torch

        output = self.output
        return PoolingRequestOutput(output.request_id, PoolingOutput(torch.frombuffer(bytearray(self.vector()), dtype=torch.float32)),
                                    output.prompt_token_ids, num_cached_tokens=output.num_cached_tokens)

    def so_far(self) -> RequestOutput | PoolingRequestOutput | None:
        """What the request's `output_kind` reports now, in objects that later deltas do not change. None: nothing."""
        if self._pools:
            return None if self._unfinished else self.pooling_output()
        if self._kind is RequestOutputKind.FINAL_ONLY and self._unfinished:
            return None
        completions = []
        for completion, parts in zip(self.output.outputs, self._texts, strict=True):
            parts[:] = ["".join(parts)]
            tokens, characters = 0, 0
            if self._kind is RequestOutputKind.DELTA:
                before, now = self._reported[completion.index], (len(completion.token_ids), len(parts[0]), completion.finished())
                if before == now:
                    continue
                (tokens, characters, _), self._reported[completion.index] = before, now
            logprobs = None if completion.logprobs is None else completion.logprobs[tokens:]
            completions.append(replace(
                completion, text=parts[0][characters:], token_ids=completion.token_ids[tokens:], logprobs=logprobs))
        return replace(self.output, outputs=completions)


def _by_wall_clock(metrics: RequestMetrics) -> RequestMetrics:
    """The times as readings of `time.time`, which users compare with their own clocks."""
    shift = time.time() - time.monotonic()
    times = {name: value + shift for name in ("arrival_time", "first_scheduled_time", "first_token_time", "finished_time")
             if (value := getattr(metrics, name)) is not None}
    return replace(metrics, **times)


def _of_request(before: RequestMetrics | None, child: RequestMetrics) -> RequestMetrics:
    """The metrics of a request: the first of its children's starts, the last of their ends."""
    if before is None:
        return child
    first = [t for t in (before.first_token_time, child.first_token_time) if t is not None]
    drafts = child.drafts if before.drafts is None or child.drafts is None else before.drafts + child.drafts
    return replace(child, first_token_time=min(first, default=None), num_preemptions=before.num_preemptions + child.num_preemptions,
                   drafts=drafts)


def logprob_dict(entry: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """vLLM's form of one position: the chosen token first, then the most probable ones."""
    text = (lambda token: None) if tokenizer is None else tokenizer.token_text
    found = {entry.token_id: Logprob(entry.logprob, entry.rank, text(entry.token_id))}
    for rank, (token, logprob) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), start=1):
        found.setdefault(token, Logprob(logprob, rank, text(token)))
    return found
