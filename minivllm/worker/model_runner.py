"""The model runner: a plan goes in, a result comes out, and the device works meanwhile.

    launch(plan)     row table, block copies and moves, pack, forward       returns while a GPU still computes
    sample(step)   pick rows -> logits -> sample -> into the token table   likewise; a copy to the host is started
                     (a captured graph has done all of this in `launch`, unless a row asks for more than a plain draw)
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
from minivllm.kernels.upload import upload
from minivllm.models.decoder import Decoder
from minivllm.sampling.logits_processors import TokenMasks
from minivllm.sampling.sampler import LogprobColumns, Sampler
from minivllm.worker.batch import Columns, Packed, RowTable
from minivllm.worker.cuda_graphs import StepGraphs
from minivllm.worker.kv_cache import KVCache

log = logging.getLogger(__name__)

MAX_LOGIT_ROWS = 256
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A launched step: what its sampling needs. Neither `forward` nor `replay` is there if the plan held no request, or failed."""

    plan: StepPlan
    finished_moves: tuple[int, ...]
    forward: tuple[Packed, Tensor] | None = None  # an eager step, and its hidden states: [T, hidden], or [B, hidden] of last tokens
    replay: Replay | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Replay:
    """A step that a graph has computed, in the batch's order."""

    columns: Columns
    logits: Tensor  # [n, V] in the model's dtype
    drawn: Tensor  # [n] int64: a plain draw for each sequence


class SampledStep:
    """A step on its way: results are on the device, their copies to the host under way."""

    def __init__(self, step: LaunchedStep, kv: KVCache, token_ids: Sequence[Tensor], logprobs: Sequence[tuple[int, LogprobColumns]],
                 prompt_logprobs: Sequence[LogprobColumns], error: str | None, order: Array | None = None) -> None:
        """order: where each sample's token is among `token_ids`; None: they are in order."""
        self._step, self._kv, self._error, self._order = step, kv, error, order
        self._logprobs, self._prompt_logprobs = logprobs, prompt_logprobs
        tensors = [*token_ids, *(t for _, c in logprobs for t in c.tensors()), *(t for c in prompt_logprobs for t in c.tensors())]
        self._num_token_tensors = len(token_ids)
        self._host, self._event = _to_host(tensors)

    def wait(self) -> StepResult:
        """The step's result; waits for the device if need be."""
        if self._event is not None:
            self._event.synchronize()
        plan = self._step.plan
        # The blocks of a failed step are given up at once, so nothing may still be writing to them.
        moves = self._step.finished_moves + self._kv.finished_moves(wait=not plan.rows or self._error is not None)
        if self._error is not None:
            return StepResult(step_id=plan.step_id, token_ids=(), finished_moves=moves, error=self._error)
        host = iter(self._host)
        token_ids = [t for _ in range(self._num_token_tensors) for t in next(host).tolist()]
        if self._order is not None:
            token_ids = [token_ids[i] for i in self._order.tolist()]
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
        pieces, at = [], 0
        for piece in self._step.forward[0].prompt_pieces if self._step.forward else ():
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
                 graph_tokens: int = 0) -> None:
        """graph_tokens: capture CUDA graphs of decodes and of mixed steps up to this many tokens; 0: none."""
        self.model, self.kv = model, kv
        self._sizes = max_num_seqs, tuple(eos_token_ids)
        groups = kv.layout.groups
        whole = [g for g, group in enumerate(groups) if group.window is None]
        self.rows = RowTable(max_num_seqs, len(groups), max_model_len, kv.layout.block_size, model.build.device,
                             whole if graph_tokens else ())
        self.sampler = self._new_sampler()
        self._graphs = StepGraphs(model, kv, self.rows, max_num_seqs, graph_tokens) if graph_tokens else None
        self._only_replays = False  # since the last call of `before_replays`

    @property
    def graph_bytes(self) -> int:
        """Memory that capturing graphs has taken."""
        return 0 if self._graphs is None else self._graphs.bytes_taken

    def _new_sampler(self) -> Sampler:
        max_num_seqs, eos_token_ids = self._sizes
        return Sampler(max_num_seqs, self.model.spec.vocab_size, self.model.build.device, eos_token_ids, self.model.build.ops)

    def drop_rows(self) -> None:
        """Start with an empty row table. It is a cache of what plans said: every row must be admitted again."""
        self.rows.reset()
        self.sampler = self._new_sampler()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Everything up to the hidden states, or beyond. Out of memory fails the step, not the worker."""
        self.rows.apply(plan)
        moves = self.kv.apply(plan)
        if plan.admitted or plan.copies or plan.moves_in or plan.moves_out:
            self._only_replays = False
        try:
            for admission in plan.admitted:
                self.sampler.admit(admission)
            if not plan.rows:
                return LaunchedStep(plan, moves)
            columns = self.rows.columns(plan)
            graph = self._graphs.find(columns) if self._graphs is not None else None
            if graph is not None:
                changes = self.rows.changes()
                if len(changes[0]) > graph.max_changes:
                    self._only_replays = False
                    self.rows.send_changes()
                    changes = self.rows.changes()
                if not self._only_replays:
                    self.model.build.ops.before_replays(self.model.build.device)
                    self._only_replays = True
                logits, drawn = graph.replay(columns, changes, *self.sampler.plain_columns(columns.rows, columns.seq_lens))
                self.rows.changes_sent()
                return LaunchedStep(plan, moves, replay=Replay(columns, logits, drawn))
            self._only_replays = False
            packed = self.rows.send(columns)
            return LaunchedStep(plan, moves, forward=(packed, self.model.forward(packed.batch, self.kv.layers, self.kv.layout.block_size)))
        except (RuntimeError, MemoryError) as error:
            return LaunchedStep(plan, moves, error=_failure(plan, error))

    @torch.inference_mode()
    def sample(self, step: LaunchedStep, masks: TokenMasks | None = None) -> SampledStep:
        """Choose the plan's samples and put them into the token table; `masks`: what grammars allow."""
        error = step.error
        try:
            if step.replay is not None:
                return self._sample_replay(step, step.replay, masks)
            if step.forward is not None:
                tokens, logprobs = self._sample(*step.forward, masks)
                return SampledStep(step, self.kv, tokens, logprobs, self._prompt_logprobs(*step.forward), None)
        except (RuntimeError, MemoryError) as failure:
            error = _failure(step.plan, failure)
        return SampledStep(step, self.kv, (), (), (), error)

    def _sample_replay(self, step: LaunchedStep, replay: Replay, masks: TokenMasks | None) -> SampledStep:
        """The graph's own draw if that is enough, else a new one from its logits."""
        c = replay.columns
        in_order = np.array_equal(c.source, np.arange(len(c.rows)))
        if masks is None and self.sampler.all_plain(c.sample_rows):
            return SampledStep(step, self.kv, [replay.drawn], (), (), None, None if in_order else c.source)
        self._only_replays = False
        source, places = upload([c.source, c.sample_places], replay.logits.device)
        logits = replay.logits if in_order else replay.logits.index_select(0, source)
        choice = self.sampler.sample(logits, c.sample_rows, c.sample_positions, self.rows.tokens, masks)
        self.rows.write_sampled(places, choice.token_ids)
        logprobs = () if choice.logprobs is None else ((0, choice.logprobs),)
        return SampledStep(step, self.kv, [choice.token_ids], logprobs, (), None)

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
