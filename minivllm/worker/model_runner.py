"""The model runner: a plan goes in, a result comes out, and the device works meanwhile.

    launch(plan)     row table, block copies and moves, pack, forward       returns while a GPU still computes
    sample(step)     pick rows -> logits -> sample -> into the token table   likewise; a copy to the host is started
                     (a captured graph has done all of this in `launch`, unless a row needs more than a plain sample)
    wait()           the only call that waits for the device

A request with k drafts has 1 + k logits rows. Each row samples its own token with the noise of its position, as if the
drafts before it were output. So a draft is accepted exactly if it equals the token sampled before it, and the accepted tokens are
those of plain decoding, whatever the sampling parameters.

At most MAX_LOGITS_ROWS rows of logits exist at a time, prompt logprobs included: 256 rows of a vocabulary of 150,000 are 150 MB, and a
prompt of 8,000 tokens would take 5 GB.
"""
from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivllm.core.plan import RowAdmission, StepPlan, StepResult, TokenLogprobs
from minivllm.kernels import tuning
from minivllm.kernels.upload import upload
from minivllm.models.decoder import LanguageModel
from minivllm.sampling.logits_processors import TokenMasks
from minivllm.sampling.rejection import DraftProbabilities, rows_kept
from minivllm.sampling.sampler import LogprobColumns, Sampler, parts_of
from minivllm.sampling_params import SamplingParams
from minivllm.speculative.base import DeviceProposer
from minivllm.worker.batch import Columns, Packed, PoolSpan, RowTable
from minivllm.worker.cuda_graphs import MAX_LOGITS_ROWS, StepGraphs, VerifiedStep
from minivllm.worker.drafts import DraftRunner, Proposals
from minivllm.worker.kv_cache import KVCache

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class EagerStep:
    """A step whose forward pass was launched kernel by kernel."""

    packed: Packed
    hidden: Tensor  # [T, hidden], or [B, hidden] of last tokens


@dataclass(frozen=True, slots=True)
class ReplayedStep:
    """A step that a graph has computed up to sampled tokens. R rows: one per token of a decode, one per sequence of a mixed step."""

    columns: Columns
    logits: Tensor  # [R, V] in the model's dtype
    sampled: Tensor  # [R] int64: a plain sample of each row
    order: Array | None  # [L] index among the R rows of each logits row of the columns. None: all R rows, in order
    verified: VerifiedStep | None = None  # of a worker with a proposer


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A launched step: what its sampling needs. `work` is None if the plan has no sequence, or if the launch failed."""

    plan: StepPlan
    finished_moves: tuple[int, ...]
    work: EagerStep | ReplayedStep | None = None
    error: str | None = None
    failed: tuple[tuple[str, str], ...] = ()  # (sequence id, error): rows that could not be prepared


class SampledStep:
    """A step whose results are on the device, with their copies to the host under way."""

    def __init__(self, step: LaunchedStep, kv: KVCache, token_ids: Sequence[Tensor] = (),
                 logprobs: Sequence[tuple[int, LogprobColumns]] = (), prompt_logprobs: Sequence[LogprobColumns] = (),
                 error: str | None = None, order: Array | None = None, proposals: Proposals | None = None,
                 pooled: Tensor | None = None) -> None:
        """token_ids: together the tokens of all logits rows. logprobs: (first logits row, columns). order[i]: index among `token_ids` of
        the token of logits row i. None: the order is the same. pooled: [N, hidden] float32, of the N spans to pool."""
        self._step, self._kv, self._error, self._order = step, kv, error, order
        self._logprobs, self._prompt_logprobs = logprobs, prompt_logprobs
        self._proposals, self._pooled = proposals, pooled
        tensors = [*(() if proposals is None else (proposals.kept, proposals.drafts)), *token_ids,
                   *(t for _, c in logprobs for t in c.tensors()), *(t for c in prompt_logprobs for t in c.tensors()),
                   *(() if pooled is None else (pooled,))]
        self._num_token_tensors = len(token_ids)
        self._host, self._event = _to_host(tensors)

    @property
    def error(self) -> str | None:
        """Why the step failed, as far as the host knows before `wait`."""
        return self._error

    def wait(self) -> StepResult:
        """The step's result; waits for the device if necessary."""
        if self._event is not None:
            self._event.synchronize()
        plan = self._step.plan
        # The blocks of a failed step are freed at once, so no move may still be writing to them.
        moves = self._step.finished_moves + self._kv.finished_moves(wait=not plan.rows or self._error is not None)
        if self._error is not None:
            return StepResult(step_id=plan.step_id, token_ids=(), finished_moves=moves, error=self._error)
        host = iter(self._host)
        kept, drafts = None, tuple[tuple[int, ...], ...]()
        if self._proposals is not None:
            kept, drafts = self._proposals.on_host(next(host).tolist(), next(host).tolist(), len(plan.sample_rows))
        tokens = [t for _ in range(self._num_token_tensors) for t in next(host).tolist()]
        if self._order is not None:
            tokens = [tokens[i] for i in self._order.tolist()]
        entries: list[TokenLogprobs | None] = []
        if self._logprobs:
            entries = [None] * len(tokens)
            for offset, columns in self._logprobs:
                some = columns.entries([next(host) for _ in columns.tensors()])
                for i, entry in zip(columns.index.tolist(), some, strict=True):
                    entries[offset + i] = entry
        prompt = [e for columns in self._prompt_logprobs for e in columns.entries([next(host) for _ in columns.tensors()])]
        pooled = () if self._pooled is None else next(host).numpy()
        token_ids, logprobs = by_sample(plan, tokens, entries, kept)
        return StepResult(step_id=plan.step_id, token_ids=token_ids, logprobs=logprobs, prompt_logprobs=self._by_request(prompt),
                          finished_moves=moves, failed=self._step.failed, drafts=drafts, pooled=tuple(
                              (span.request, span.first, span.end - span.begin, row.tobytes())
                              for span, row in zip(self._pool_spans, pooled, strict=True)))

    @property
    def _pool_spans(self) -> tuple[PoolSpan, ...]:
        return () if self._pooled is None or not isinstance(self._step.work, EagerStep) else self._step.work.packed.columns.pool_spans

    def _by_request(self, entries: list[TokenLogprobs]) -> tuple[tuple[int, int, tuple[TokenLogprobs, ...]], ...]:
        parts, at = [], 0
        for span in self._step.work.packed.columns.prompt_spans if isinstance(self._step.work, EagerStep) else ():
            parts.append((span.request, span.first, tuple(entries[at : at + span.count])))
            at += span.count
        return tuple(parts)


def by_sample(
    plan: StepPlan, tokens: list[int], logprobs: list[TokenLogprobs | None], counts: Sequence[int] | None = None,
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[TokenLogprobs, ...] | None, ...]]:
    """Tokens and logprobs of all logits rows -> those of each sample: up to the first draft that was not sampled.

    counts: of each sample, if the worker knows them; drafts that it proposed itself have no values in the plan."""
    if not any(plan.drafts):
        return tuple((t,) for t in tokens), tuple(None if entry is None else (entry,) for entry in logprobs)
    token_ids: list[tuple[int, ...]] = []
    entries: list[tuple[TokenLogprobs, ...] | None] = []
    at = 0
    for sample, column in enumerate(plan.sample_from):
        drafts = plan.drafts[column]
        kept = 1 if counts is None else counts[sample]
        while counts is None and kept <= len(drafts) and tokens[at + kept - 1] == drafts[kept - 1]:
            kept += 1
        token_ids.append(tuple(tokens[at : at + kept]))
        if logprobs:
            some = [entry for entry in logprobs[at : at + kept] if entry is not None]
            entries.append(tuple(some) or None)
        at += 1 + len(drafts)
    return tuple(token_ids), tuple(entries)


def _to_host(tensors: Sequence[Tensor]) -> tuple[list[Tensor], torch.cuda.Event | None]:
    """Copies in pinned memory and the event after which they are complete; on a CPU the tensors themselves."""
    if not tensors or tensors[0].device.type == "cpu":
        return list(tensors), None
    host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
    event = torch.cuda.Event()
    event.record()
    return host, event


class ModelRunner:
    """One model, its KV cache, and the rows of the running sequences."""

    def __init__(self, model: LanguageModel, kv: KVCache, *, max_num_seqs: int, max_model_len: int, eos_token_ids: Sequence[int] = (),
                 graph_tokens: int = 0, query_widths: Sequence[int] = (1,), only_largest_graph: bool = False,
                 proposer: DeviceProposer | None = None, keep_probs: bool = False,
                 most_speculative_seqs: int = tuning.MAX_DRAFT_PROBS_ROWS) -> None:
        """proposer: of drafts. keep_probs: it samples its drafts, so keep their distributions.
        most_speculative_seqs: sequences of the largest step after which drafts are proposed.
        graph_tokens: capture CUDA graphs of decodes, and of mixed steps up to this many tokens; 0: none.
        query_widths: of the captured decodes, 1 plus their number of drafts.
        only_largest_graph: capture the others when steps need them, and by `capture_next`."""
        self.model, self.kv = model, kv
        groups = kv.layout.groups
        full_attention = [g for g, group in enumerate(groups) if group.window is None]
        self.rows = RowTable(max_num_seqs, len(groups), max_model_len, kv.layout.block_size, model.build.device,
                             full_attention if graph_tokens else (), 0 if proposer is None else proposer.num_drafts,
                             proposer is not None and proposer.needs_hidden)
        probs = None
        if proposer is not None and keep_probs:
            probs = DraftProbabilities(rows_kept(max_num_seqs), proposer.num_drafts, model.spec.vocab_size,
                                       model.build.device)
        self.sampler = Sampler(max_num_seqs, model.spec.vocab_size, model.build.device, eos_token_ids, model.build.ops, probs)
        self._drafts = None if proposer is None else DraftRunner(
            proposer, kv, self.rows, self.sampler, model.build.ops, most_speculative_seqs)
        self._graphs = None if not graph_tokens else StepGraphs(
            model, kv, self.rows, max_num_seqs, graph_tokens, query_widths, self._drafts, only_largest=only_largest_graph)
        self._only_replays = False  # True: only graphs were replayed since the last call of `before_replays`

    @property
    def graph_bytes(self) -> int:
        """Memory that capturing graphs has taken so far."""
        return 0 if self._graphs is None else self._graphs.bytes_taken

    @property
    def graphs_missing(self) -> int:
        """Number of graphs that are not captured yet."""
        return 0 if self._graphs is None else self._graphs.num_missing

    def capture_next(self) -> bool:
        """Capture one of the graphs that are missing. False: no other one is missing. Call it between steps."""
        if self._graphs is None or not self.graphs_missing:
            return False
        self._only_replays = False
        return self._graphs.capture_next()

    def drop_rows(self) -> None:
        """Start with an empty row table. It is a cache of what plans said: every row must be admitted again."""
        self.rows.reset()
        self.sampler.reset()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Run the forward pass, or a whole captured step. Out of memory fails the step, not the worker."""
        for slot, adapter_id in plan.adapter_loads:  # first: whatever fails later, the adapters are where the scheduler expects them
            assert self.model.build.adapters is not None
            self.model.build.adapters.load(slot, adapter_id)
        self.rows.apply(plan)
        moves = self.kv.apply(plan)
        if plan.adapter_loads or plan.admitted or plan.copies or plan.moves_in or plan.moves_out:
            self._only_replays = False
        try:
            failed = tuple(failure for admission in plan.admitted if (failure := self._admit(admission)) is not None)
            if not plan.rows:
                return LaunchedStep(plan, moves)
            columns = self.rows.columns(plan)
            replayed = None if self._graphs is None else self._replay(self._graphs, columns)
            if replayed is not None:
                return LaunchedStep(plan, moves, replayed, failed=failed)
            self._only_replays = False
            packed = self.rows.send(columns)
            hidden = self.model.forward(packed.batch, self.kv.layers, self.kv.layout.block_size)
            return LaunchedStep(plan, moves, EagerStep(packed, hidden), failed=failed)
        except (RuntimeError, MemoryError) as error:
            return LaunchedStep(plan, moves, error=_failure(plan, error))

    def _admit(self, admission: RowAdmission) -> tuple[str, str] | None:
        """Prepare a row's sampling. A bug in it fails this sequence and not the step: returns its id and the error."""
        try:
            self.sampler.admit(admission)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as bug:
            message = _failure_of(f"the sampling of {admission.request_id}", bug)
            self.sampler.admit(replace(admission, params=SamplingParams(temperature=0)))
            return admission.request_id, message
        return None

    def _replay(self, graphs: StepGraphs, columns: Columns) -> ReplayedStep | None:
        """The step computed by a captured graph; None if no graph fits."""
        columns = graphs.widened(columns)
        graph = graphs.find(columns)
        if graph is None:
            return None
        if not graph.captured:
            self._only_replays = False
            if not graphs.capture(graph):
                return None
        changes = self.rows.changes()
        if len(changes[0]) > graph.max_changes:
            self._only_replays = False
            self.rows.send_changes()
            changes = self.rows.changes()
        if not self._only_replays:
            self.model.build.ops.before_replays(self.model.build.device)
            self._only_replays = True
        self.model.settle()
        logits, sampled, order = graph.replay(columns, changes, self.sampler)
        self.rows.changes_sent()
        return ReplayedStep(columns, logits, sampled, order, None if self._drafts is None else graph.verified(len(columns.rows)))

    @torch.inference_mode()
    def sample(self, step: LaunchedStep, masks: TokenMasks | None = None) -> SampledStep:
        """Choose the plan's tokens and put them into the token table. masks: the tokens that grammars allow."""
        error = step.error
        try:
            if isinstance(step.work, ReplayedStep):
                return self._sample_replayed(step, step.work, masks)
            if isinstance(step.work, EagerStep):
                packed, hidden = step.work.packed, step.work.hidden
                before = self.rows.tokens.view(-1)[packed.sample_index] if packed.shift is not None else None
                tokens, logprobs = self._sample_eager(packed, hidden, masks)
                prompt_logprobs, proposals = self._prompt_logprobs(packed, hidden), None
                if self._drafts is not None and before is not None and packed.shift is not None:
                    sampled = torch.cat(tokens) if tokens else before.long()
                    kept = self._drafts.verify(packed.columns, before, sampled, packed.shift)
                    proposals = self._drafts.propose(packed, hidden, self._drafts.count(packed.columns, kept), step.plan.proposes)
                return SampledStep(step, self.kv, tokens, logprobs, prompt_logprobs, proposals=proposals, pooled=self._pool(packed, hidden))
        except (RuntimeError, MemoryError) as failure:
            error = _failure(step.plan, failure)
        return SampledStep(step, self.kv, error=error)

    def _sample_replayed(self, step: LaunchedStep, work: ReplayedStep, masks: TokenMasks | None) -> SampledStep:
        """The graph's own samples if they are enough, else new ones from its logits."""
        c, verified = work.columns, work.verified
        own = None if c.drafting is None else c.drafting.own_sample
        sampled_drafts = self.sampler.draft_probs is not None and c.has_drafts and bool(self.sampler.temperatures(c.sample_rows).any())
        if masks is None and not sampled_drafts and self.sampler.all_plain(c.sample_rows):
            proposals = None if verified is None or own is None else self._proposals(verified, own, step.plan.proposes)
            return SampledStep(step, self.kv, [work.sampled], order=work.order, proposals=proposals)
        self._only_replays = False
        index, draft_index, drafts, source = upload([c.sample_index, c.draft_index, c.drafts, c.source], work.logits.device)
        if len(c.drafts):  # the graph's samples have overwritten the drafts, which penalties must count
            self.rows.write_tokens(draft_index, drafts)
        order = None if work.order is None else upload([work.order], work.logits.device)[0]
        logits = work.logits if order is None else work.logits.index_select(0, order)
        shift = before = proposals = None
        if verified is not None:
            shift = verified.behind.index_select(0, source)
            index = index - shift
            before = verified.before if order is None else verified.before.index_select(0, order)
            self.rows.write_tokens(index, before)
        choice = self.sampler.sample(logits, c.sample_rows, c.sample_positions, self.rows.tokens, masks, shift)
        self.rows.write_tokens(index, choice.token_ids)
        if verified is not None and self._drafts is not None and own is not None and before is not None and shift is not None:
            kept = self._drafts.count(c, self._drafts.verify(c, before, choice.token_ids, shift))
            verified.kept.copy_(kept)
            proposals = self._proposals(verified, own, step.plan.proposes)
        logprobs = () if choice.logprobs is None else ((0, choice.logprobs),)
        return SampledStep(step, self.kv, [choice.token_ids], logprobs, proposals=proposals)

    def _proposals(self, verified: VerifiedStep, own: Array, proposes: bool) -> Proposals:
        """Run the proposer after a replay. proposes: of the plan."""
        assert self._drafts is not None
        kept = verified.kept
        if self._drafts.proposes(len(own)):
            if proposes:
                return Proposals(kept, verified.propose(), own)
            verified.store()
        return Proposals(kept, kept.new_empty((len(own), 0)), own)

    def _sample_eager(
        self, packed: Packed, hidden: Tensor, masks: TokenMasks | None,
    ) -> tuple[list[Tensor], list[tuple[int, LogprobColumns]]]:
        tokens: list[Tensor] = []
        logprobs: list[tuple[int, LogprobColumns]] = []
        c = packed.columns
        for part in parts_of(c.sample_rows, c.sample_positions, MAX_LOGITS_ROWS):
            logits = self.model.logits(hidden[packed.batch.logit_rows[part]], dtype=None)  # [n, V]
            some_masks = None if masks is None else masks.part(part.start, part.stop)
            shift = None if packed.shift is None else packed.shift[part]
            choice = self.sampler.sample(logits, c.sample_rows[part], c.sample_positions[part], self.rows.tokens, some_masks, shift)
            self.rows.write_tokens(packed.sample_index[part], choice.token_ids)
            tokens.append(choice.token_ids)
            if choice.logprobs is not None:
                logprobs.append((part.start, choice.logprobs))
        return tokens, logprobs

    def _prompt_logprobs(self, packed: Packed, hidden: Tensor) -> list[LogprobColumns]:
        """Those of the prompt positions that need them, MAX_LOGITS_ROWS at a time, in the order of the spans."""
        columns: list[LogprobColumns] = []
        spans = packed.columns.prompt_spans
        logit_rows = packed.batch.logit_rows[len(packed.columns.sample_rows) :]
        k = np.repeat([span.k for span in spans], [span.count for span in spans]).astype(np.int64)
        for start in range(0, len(logit_rows), MAX_LOGITS_ROWS):
            part = slice(start, start + MAX_LOGITS_ROWS)
            targets = self.rows.tokens.view(-1)[packed.prompt_index[part]].long()
            logits = self.model.logits(hidden[logit_rows[part]], dtype=None)
            for some in range(0, len(targets), self.sampler.wide_rows):
                wide = slice(some, some + self.sampler.wide_rows)
                columns.append(LogprobColumns.of(logits[wide].float(), targets[wide], np.arange(len(targets[wide])), k[part][wide]))
        return columns

    def _pool(self, packed: Packed, hidden: Tensor) -> Tensor | None:
        """[N, hidden] float32: for each of the spans to pool, the sum of its final hidden states. None: there are none.

        Each span is added up by a separate kernel, so that a sum does not depend on what else the step computes."""
        spans = packed.columns.pool_spans
        if not spans:
            return None
        last_only = packed.columns.last_only  # then `hidden` has one row for each sequence
        rows = torch.cat([hidden[span.index : span.index + 1] if last_only else hidden[span.begin : span.end] for span in spans])
        states = self.model.final_hidden(rows).split([span.end - span.begin for span in spans])
        return torch.stack([some.sum(0, dtype=torch.float32) for some in states])


def _failure(plan: StepPlan, error: Exception) -> str:
    """The message for a failed step."""
    return _failure_of(f"step {plan.step_id}", error)


def _failure_of(what: str, error: Exception) -> str:
    """The message for something that failed. A lost device cannot recover, so its error is raised again."""
    if isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error):
        raise error
    log.error("%s failed: %s", what, error, exc_info=error)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return f"{type(error).__name__}: {error}"
