"""The model runner: a plan goes in, a result comes out, and the device works meanwhile.

    launch(plan)     row table, block copies and moves, pack, forward       returns while a GPU still computes
    sample(handle)   pick rows -> logits -> sample -> into the token table   likewise; a copy to the host is started
    wait()           the only place that waits for the device

Logits are never held for more than MAX_LOGIT_ROWS rows at a time, prompt logprobs included: 256 rows of a vocabulary of
150,000 are 150 MB, a prompt of 8,000 would be 5 GB.
"""
from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivllm.core.plan import StepPlan, StepResult, TokenLogprobs
from minivllm.models.decoder import Decoder
from minivllm.sampling.logits_processors import TokenMasks
from minivllm.sampling.sampler import LogprobColumns, Sampler
from minivllm.worker.batch import Packed, RowTable
from minivllm.worker.cuda_graphs import DecodeGraphs
from minivllm.worker.kv_cache import KVCache

log = logging.getLogger(__name__)

MAX_LOGIT_ROWS = 256
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Handle:
    """A launched step: what its sampling needs. `packed` and `hidden` are None if the plan held no request, or failed."""

    plan: StepPlan
    packed: Packed | None
    hidden: Tensor | None  # [T, hidden]
    finished_moves: tuple[int, ...]
    error: str | None = None


class Pending:
    """A step on its way: results are on the device, their copies to the host under way."""

    def __init__(self, handle: Handle, kv: KVCache, token_ids: Sequence[Tensor], logprobs: Sequence[tuple[int, LogprobColumns]],
                 prompt_logprobs: Sequence[LogprobColumns], error: str | None) -> None:
        self._handle, self._kv, self._error = handle, kv, error
        self._logprobs, self._prompt_logprobs = logprobs, prompt_logprobs
        tensors = [*token_ids, *(t for _, c in logprobs for t in c.tensors()), *(t for c in prompt_logprobs for t in c.tensors())]
        self._num_token_tensors = len(token_ids)
        self._host, self._event = _to_host(tensors)

    def wait(self) -> StepResult:
        """The step's result; waits for the device if need be."""
        if self._event is not None:
            self._event.synchronize()
        plan = self._handle.plan
        # The blocks of a failed step are given up at once, so nothing may still be writing to them.
        moves = self._handle.finished_moves + self._kv.finished_moves(wait=not plan.rows or self._error is not None)
        if self._error is not None:
            return StepResult(step_id=plan.step_id, token_ids=(), finished_moves=moves, error=self._error)
        host = iter(self._host)
        token_ids = [t for _ in range(self._num_token_tensors) for t in next(host).tolist()]
        logprobs: list[tuple[TokenLogprobs, ...] | None] = []
        if self._logprobs:
            logprobs = [None] * len(token_ids)
            for offset, columns in self._logprobs:
                entries = columns.entries([next(host) for _ in columns.tensors()])
                for i, entry in zip(columns.index.tolist(), entries, strict=True):
                    logprobs[offset + i] = (entry,)
        prompt = [e for columns in self._prompt_logprobs for e in columns.entries([next(host) for _ in columns.tensors()])]
        return StepResult(step_id=plan.step_id, token_ids=tuple((t,) for t in token_ids), logprobs=tuple(logprobs),
                          prompt_logprobs=self._by_request(prompt), finished_moves=moves)

    def _by_request(self, entries: list[TokenLogprobs]) -> tuple[tuple[int, int, tuple[TokenLogprobs, ...]], ...]:
        packed = self._handle.packed
        pieces, at = [], 0
        for piece in packed.prompt_pieces if packed else ():
            pieces.append((piece.request, piece.first, tuple(entries[at : at + piece.count])))
            at += piece.count
        return tuple(pieces)


def _to_host(tensors: Sequence[Tensor]) -> tuple[list[Tensor], torch.cuda.Event | None]:
    """Copies in pinned memory and the event after which they are whole; on a CPU the tensors themselves."""
    if not tensors or tensors[0].device.type == "cpu":
        return list(tensors), None
    host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
    event = torch.cuda.Event()
    event.record()
    return host, event


class ModelRunner:
    """One model, its KV cache, and the rows under way."""

    def __init__(self, model: Decoder, kv: KVCache, *, max_num_seqs: int, max_model_len: int, eos_token_ids: Sequence[int] = (),
                 cuda_graphs: bool = False) -> None:
        self.model, self.kv = model, kv
        self._graphs = DecodeGraphs(model, kv, max_num_seqs, max_model_len) if cuda_graphs else None
        self._sizes = max_num_seqs, max_model_len, tuple(eos_token_ids)
        self.drop_rows()

    def drop_rows(self) -> None:
        """Start with an empty row table. It is a cache of what plans said: every row must be admitted again."""
        max_num_seqs, max_model_len, eos_token_ids = self._sizes
        shape, device = self.kv.shape, self.model.build.device
        self.rows = RowTable(max_num_seqs, len(shape.groups), max_model_len, shape.block_size, device)
        self.sampler = Sampler(max_num_seqs, self.model.spec.vocab_size, device, eos_token_ids, self.model.build.ops)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Handle:
        """Everything up to the hidden states. Out of memory fails the step, not the worker."""
        self.rows.apply(plan)
        moves = self.kv.apply(plan)
        try:
            for admission in plan.admitted:
                self.sampler.admit(admission)
            if not plan.rows:
                return Handle(plan, None, None, moves)
            packed = self.rows.pack(plan)
            if self._graphs is not None and self._graphs.covers(packed.batch):
                hidden = self._graphs.forward(packed.batch)
            else:
                hidden = self.model.forward(packed.batch, self.kv.layers, self.kv.shape.block_size)
        except (RuntimeError, MemoryError) as error:
            return Handle(plan, None, None, moves, _failure(plan, error))
        return Handle(plan, packed, hidden, moves)

    @torch.inference_mode()
    def sample(self, handle: Handle, masks: TokenMasks | None = None) -> Pending:
        """Choose the plan's samples and put them into the token table; `masks`: what grammars allow."""
        error = handle.error
        if handle.packed is not None and handle.hidden is not None:
            try:
                tokens, logprobs = self._sample(handle.packed, handle.hidden, masks)
                return Pending(handle, self.kv, tokens, logprobs, self._prompt_logprobs(handle.packed, handle.hidden), None)
            except (RuntimeError, MemoryError) as failure:
                error = _failure(handle.plan, failure)
        return Pending(handle, self.kv, (), (), (), error)

    def _sample(self, packed: Packed, hidden: Tensor, masks: TokenMasks | None) -> tuple[list[Tensor], list[tuple[int, LogprobColumns]]]:
        tokens: list[Tensor] = []
        logprobs: list[tuple[int, LogprobColumns]] = []
        rows = packed.sample_rows
        for start in range(0, len(rows), MAX_LOGIT_ROWS):
            part = slice(start, min(start + MAX_LOGIT_ROWS, len(rows)))
            logits = self.model.logits(hidden[packed.batch.logit_rows[part]], dtype=None)  # [n, V]
            some_masks = None if masks is None else masks.part(part.start, part.stop)
            choice = self.sampler.sample(logits, rows[part], packed.sample_positions[part], self.rows.tokens, some_masks)
            self.rows.write_sampled(packed.sample_places[part], choice.token_ids)
            tokens.append(choice.token_ids)
            if choice.logprobs is not None:
                logprobs.append((start, choice.logprobs))
        return tokens, logprobs

    def _prompt_logprobs(self, packed: Packed, hidden: Tensor) -> list[LogprobColumns]:
        """Of the owed prompt positions, MAX_LOGIT_ROWS at a time, in the order of the pieces."""
        columns: list[LogprobColumns] = []
        logit_rows = packed.batch.logit_rows[len(packed.sample_rows) :]
        k = np.repeat([p.k for p in packed.prompt_pieces], [p.count for p in packed.prompt_pieces]).astype(np.int64)
        for start in range(0, len(logit_rows), MAX_LOGIT_ROWS):
            part = slice(start, start + MAX_LOGIT_ROWS)
            targets = self.rows.tokens.view(-1)[packed.prompt_places[part]].long()
            logits = self.model.logits(hidden[logit_rows[part]])
            columns.append(LogprobColumns.of(logits, targets, np.arange(len(targets)), k[part]))
        return columns


def _failure(plan: StepPlan, error: Exception) -> str:
    """The message for a failed step. A device that is lost stays lost: that is raised again."""
    if isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error):
        raise error
    log.error("step %d failed: %s", plan.step_id, error)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return f"{type(error).__name__}: {error}"
