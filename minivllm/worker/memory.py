"""How many KV blocks fit, and where the memory goes: measured, not guessed.

    GPU                                              CPU
    |<------- gpu_memory_utilization ------->|       KV cache = as much as the weights, at least 512 MiB or one sequence of
    | in use: context, | peak of  | KV cache |       max_model_len, at most 40% of the memory that is available
    | weights, others  | one step |          |       (untouched blocks are not resident)
       measured          measured   the rest

On a GPU the peak is measured by running the largest step there can be, sampler included, before the cache is allocated.

    LoadedModel.available_memory ──▶ MemoryBudget (bytes, one per rank) ──size_cache──▶ CacheSize (blocks, served length)
"""
from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivllm.config import EngineConfig
from minivllm.core.block_math import longest_sequence, max_blocks_held
from minivllm.core.plan import NULL_BLOCK, RowAdmission
from minivllm.errors import InvalidInput, NotEnoughMemory
from minivllm.families import linear_specs
from minivllm.kernels import tuning
from minivllm.kernels.layout import InputBatch, KVLayer
from minivllm.models.decoder import LanguageModel
from minivllm.quantization.dense import DENSE
from minivllm.sampling.rejection import DraftProbabilities
from minivllm.sampling.sampler import Sampler
from minivllm.sampling_params import SamplingParams
from minivllm.worker.batch import RowTable
from minivllm.worker.cuda_graphs import sharing_sizes
from minivllm.worker.kv_cache import KVLayout
from minivllm.worker.model_runner import MAX_LOGITS_ROWS

MIB, GIB = 1 << 20, 1 << 30
CPU_MINIMUM = 512 * MIB
CPU_FRACTION = 0.4  # of the available memory
DUMMY_CONTEXT = 4096  # keys per sequence in the dummy decode: enough to fill the attention's workspaces


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """What the user set, as far as it concerns the size of the cache."""

    max_model_len: int
    length_is_explicit: bool  # True: a cache that cannot hold max_model_len is an error. False: max_model_len is lowered
    chunk: int  # maximum number of tokens of one sequence in one step
    num_blocks: int | None = None
    cache_bytes: int | None = None
    utilization: float = 0.9

    @classmethod
    def of(cls, config: EngineConfig, max_model_len: int, max_num_batched_tokens: int) -> CacheSettings:
        """From the configuration; max_model_len: the length to serve."""
        return cls(max_model_len=max_model_len, length_is_explicit=config.max_model_len is not None,
                   chunk=min(max_num_batched_tokens, config.long_prefill_token_threshold or max_num_batched_tokens),
                   num_blocks=config.num_gpu_blocks_override, cache_bytes=config.kv_cache_memory_bytes,
                   utilization=config.gpu_memory_utilization)

    def bytes_of_one_sequence(self, layout: KVLayout) -> int:
        """The smallest cache that holds one sequence of max_model_len tokens, the null block included."""
        return (max_blocks_held(self.max_model_len, layout.block_size, layout.windows, self.chunk) + 1) * layout.block_bytes


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """What one rank measured: the bytes that its KV cache may take, and how to get more."""

    num_bytes: int  # may be negative: then not even the weights and one step fit
    account: str  # how num_bytes was calculated, for the log and for errors
    field: str  # the setting to change if it is too small
    fix: str  # how to change that setting
    ledger: MemoryLedger | None = None  # on a GPU


@dataclass(frozen=True, slots=True)
class CacheSize:
    """The size of the cache, equal on all ranks."""

    num_blocks: int
    max_model_len: int
    account: str  # one line for the log


@dataclass(frozen=True, slots=True)
class MemoryLedger:
    """Where the memory of a GPU goes, in bytes, each figure measured."""

    total: int
    weights: int
    step: int  # peak of the largest step beyond the weights
    other: int  # the driver's context, compiled kernels, other programs
    graphs_planned: int
    rows: int  # token table, block tables and what the sampler keeps: allocated with the cache, for max_num_seqs sequences
    cache: int = 0
    graphs_taken: int = 0  # by the graphs captured at the start

    def table(self) -> tuple[str, str]:
        """Two lines in GiB: the columns' names, and the figures. What is left stays unused: see gpu_memory_utilization."""
        used = self.weights + self.step + self.graphs_taken + self.rows + self.cache + self.other
        columns = {"weights": self.weights, "peak of a step": self.step, "CUDA graphs": self.graphs_taken,
                   "(set aside)": self.graphs_planned, "row tables": self.rows, "KV cache": self.cache, "other use": self.other,
                   "left": self.total - used, "total": self.total}
        widths = [max(len(name), 7) + 2 for name in columns]
        return ("GPU memory, GiB" + "".join(f"{name:>{width}}" for name, width in zip(columns, widths, strict=True)),
                " " * 15 + "".join(f"{value / GIB:{width}.2f}" for value, width in zip(columns.values(), widths, strict=True)))


def size_cache(request: CacheSettings, layout: KVLayout, budget: MemoryBudget) -> CacheSize:
    """Blocks and served length for a budget. Raises `InvalidInput` naming the setting to change if it is too small."""
    num_bytes, account, field, fix = budget.num_bytes, budget.account, budget.field, budget.fix
    if request.num_blocks is not None:
        num_blocks, account, field, fix = request.num_blocks, "num_gpu_blocks_override", "num_gpu_blocks_override", "raise it"
    else:
        if request.cache_bytes is not None:
            num_bytes, account, field, fix = request.cache_bytes, "kv_cache_memory_bytes", "kv_cache_memory_bytes", "raise it"
        num_blocks = max(num_bytes, 0) // layout.block_bytes
    longest = longest_sequence(num_blocks, request.max_model_len, layout.block_size, layout.windows, request.chunk)
    size = f"{num_blocks:,} blocks of {layout.block_size} tokens, {num_blocks * layout.block_bytes / GIB:.2f} GiB"
    if longest < 1:
        raise NotEnoughMemory(f"the KV cache has room for {max(num_blocks, 0)} blocks of {layout.block_bytes / MIB:.2f} MiB, fewer than "
                              f"any sequence needs ({account}): {fix}", field)
    if longest < request.max_model_len and request.length_is_explicit:
        needed, room = request.bytes_of_one_sequence(layout) / GIB, num_blocks * layout.block_bytes / GIB
        raise NotEnoughMemory(f"max_model_len {request.max_model_len} needs {needed:.2f} GiB of KV cache and there is room for {room:.2f} "
                              f"GiB ({account}): lower max_model_len to {longest}, or for {field}: {fix}", "max_model_len")
    return CacheSize(num_blocks, longest, f"KV cache: {size} ({account})")


def host_block_count(offloading_gib: float, layout: KVLayout) -> int:
    """Host blocks in `kv_offloading_size` GiB. Block 0 is never used there either, so one block alone is refused."""
    count = int(offloading_gib * GIB) // layout.block_bytes
    if offloading_gib and count < 2:
        each = layout.block_bytes / GIB
        raise InvalidInput(f"kv_offloading_size {offloading_gib:g} GiB holds no block (of {each:.6f} GiB, and one is reserved): "
                           f"set at least {2 * each:.6f}, or 0", "kv_offloading_size")
    return count


# --- CPU -----------------------------------------------------------------------------------------------------------


def cpu_budget(request: CacheSettings, layout: KVLayout, weight_bytes: int, available: int | None = None) -> MemoryBudget:
    """Host memory for the cache. available: with the weights loaded; None: they are, and this process can still get so much."""
    available = available_host_memory() if available is None else available
    num_bytes = min(max(weight_bytes, CPU_MINIMUM, request.bytes_of_one_sequence(layout)), int(CPU_FRACTION * available))
    account = f"weights {weight_bytes / GIB:.2f} GiB, host memory available {available / GIB:.2f} GiB"
    return MemoryBudget(num_bytes, account, "kv_cache_memory_bytes", "set it, at the price of memory for other programs")


def host_memory() -> int:
    """Bytes of memory that this process could ever have."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no control group, or no limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def available_host_memory() -> int:
    """Bytes this process can still get: the system's figure, or what its control group leaves."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # macOS and others do not say what is free
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return max(available, 0)


# --- GPU -----------------------------------------------------------------------------------------------------------


def cuda_budget(
    request: CacheSettings, layout: KVLayout, model: LanguageModel, max_num_seqs: int, max_num_batched_tokens: int, graph_bytes: int = 0,
    sampled_drafts: int = 0,
) -> MemoryBudget:
    """GPU memory for the cache, with the weights loaded already; measures the peak of one step.

    graph_bytes: set aside for CUDA graphs. sampled_drafts: see `row_bytes`."""
    device = model.build.device
    peak = _peak_of_one_step(request.max_model_len, layout, model, max_num_seqs, max_num_batched_tokens, graphs=graph_bytes > 0)
    peak += DraftProbabilities.peak_bytes(max_num_seqs, sampled_drafts, model.spec.vocab_size)
    rows = row_bytes(layout, max_num_seqs, request.max_model_len, model.spec.vocab_size, sampled_drafts)
    free, total = torch.cuda.mem_get_info(device)
    in_use, weights = total - free, torch.cuda.memory_allocated(device)
    account = (f"{request.utilization:.2f} of {total / GIB:.2f} GiB, less {weights / GIB:.2f} weights, "
               f"{(in_use - weights) / GIB:.2f} other use, {peak / GIB:.2f} peak of a step, {graph_bytes / GIB:.2f} CUDA graphs, "
               f"{rows / GIB:.2f} row tables")
    least = min(1.0, (in_use + peak + rows + graph_bytes + request.bytes_of_one_sequence(layout)) / total)
    fix = f"raise it to {least + 0.005:.2f}" if least < 0.99 else "there is no room on this GPU; use a smaller model"
    if max_num_batched_tokens > 1024:
        fix += ", or lower max_num_batched_tokens, which sets the peak of a step"
    if rows > GIB // 8:
        fix += ", or lower max_num_seqs, which sets the row tables"
    if sampled_drafts:
        fix += ", or leave draft_sample_method out of speculative_config: probabilistic keeps a distribution per draft"
    ledger = MemoryLedger(total, weights, peak, in_use - weights, graph_bytes, rows)
    num_bytes = int(request.utilization * total) - in_use - peak - rows - graph_bytes
    return MemoryBudget(num_bytes, account, "gpu_memory_utilization", fix, ledger)


def row_bytes(layout: KVLayout, max_num_seqs: int, max_model_len: int, vocab_size: int, sampled_drafts: int = 0) -> int:
    """What a worker keeps on its device for the rows of sequences. sampled_drafts: of each, whose distributions are kept."""
    return (RowTable.num_bytes(max_num_seqs, len(layout.groups), max_model_len, layout.block_size)
            + Sampler.num_bytes(max_num_seqs, vocab_size) + DraftProbabilities.num_bytes(max_num_seqs, sampled_drafts, vocab_size))


@torch.inference_mode()
def _peak_of_one_step(
    limit: int, layout: KVLayout, model: LanguageModel, max_num_seqs: int, max_num_batched_tokens: int, *, graphs: bool,
) -> int:
    """Bytes that the largest steps allocate beyond the weights. All their blocks are the null block of a one-block cache.

    limit: of a sequence, in tokens. graphs: whether steps will be captured."""
    device = model.build.device
    kv = layout.views(layout.allocate(1, device))
    prompt = [min(limit, max_num_batched_tokens)] * max(1, min(max_num_batched_tokens // limit, max_num_seqs))
    decodes = [min(limit, DUMMY_CONTEXT)] * max_num_seqs
    if model.build.ops.compiling is not None:
        few = model.without_repetition()
        with model.build.ops.compiling():
            for batch in compiled_batches(limit, layout, model, max_num_seqs, prompt, graphs=graphs):
                _dry_step(few, kv, batch, layout.block_size)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    chunks, keys = tuning.filling_chunks(sum(prompt), limit, max_num_seqs, min(a.attention.kv_size for a in model.spec.layers))
    later = max(1, min(sum(prompt) // chunks, keys - 1))  # new tokens of each, after earlier ones
    for query_lens, seq_lens in (
            (prompt, prompt), ([prompt[0]], [limit]), ([later] * chunks, [keys] * chunks), ([1] * len(decodes), decodes)):
        batch = _dummy_batch(query_lens, seq_lens, layout, device)
        hidden = model.forward(batch if model.build.adapters is None else _with_adapters(batch), kv, layout.block_size)
        _dummy_sampling(model, hidden)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del hidden, kv
    torch.cuda.empty_cache()
    return peak


def compiled_batches(
    limit: int, layout: KVLayout, model: LanguageModel, max_num_seqs: int, prompt: list[int], *, graphs: bool,
) -> Iterator[InputBatch]:
    """Batches that together use every kernel of a model. prompt: lengths of the largest prompts; the rest as `_peak_of_one_step`."""
    device = model.build.device
    for seqs in (size for size in (*tuning.DECODE_GRAPHS, max_num_seqs) if size <= max_num_seqs):
        for longest in sorted({1, min(limit, tuning.SHORT_KEYS), limit}):  # from one split of the keys to the most splits
            yield _dummy_batch([1] * seqs, [longest] * seqs, layout, device)
    for seqs in sharing_sizes(max_num_seqs, limit)[-1:] if graphs else ():  # all batch sizes use the same kernels
        yield replace(_dummy_batch([1] * seqs, [limit] * seqs, layout, device), shared=torch.zeros(1, dtype=torch.int32, device=device))
    for last_only in (False, True):
        yield replace(_dummy_batch(prompt, prompt, layout, device), last_only=last_only)
    yield _dummy_batch([(prompt[0] + 1) // 2], [limit], layout, device)  # a chunk after earlier keys
    # Products with packed weights have several kernels for few rows. Small prompts use all of them, also if few sequences are served.
    if any(model.build.method(linear) is not DENSE for linear in linear_specs(model.spec).values()):
        for tokens in sorted({min(1 << i, prompt[0]) for i in range(1, tuning.PACKED_MAX_ROWS.bit_length())}):
            yield _dummy_batch([tokens], [tokens], layout, device)


def _dry_step(model: LanguageModel, kv: Sequence[KVLayer], batch: InputBatch, block_size: int) -> None:
    """Compile the kernels of a step without running them. Its results are undefined and never read."""
    if model.build.adapters is not None:  # a step without LoRA adapters has other kernels
        model.forward(_with_adapters(batch), kv, block_size)
    logits = model.logits(model.forward(batch, kv, block_size)[:MAX_LOGITS_ROWS], dtype=None)
    rows = len(logits)
    one, keys = torch.ones(rows, device=logits.device), torch.zeros((rows, 2), dtype=torch.int32, device=logits.device)
    top_k, sample = keys[:, 0].contiguous(), model.build.ops.sample
    sample(logits, one, keys)
    sample(logits, one, keys, top_p=one)
    sample(logits, one, keys, top_k=top_k, top_p=one)
    sample(logits.float(), one, keys, top_k=top_k, top_p=one, min_p=one)  # as `_dummy_sampling` does


def _with_adapters(batch: InputBatch) -> InputBatch:
    """The batch with the LoRA adapter of slot 0 for all tokens."""
    return replace(batch, adapter_slots=torch.zeros_like(batch.tokens))


def _dummy_batch(query_lens: list[int], seq_lens: list[int], layout: KVLayout, device: torch.device) -> InputBatch:
    total, groups = sum(query_lens), len(layout.groups)
    positions = np.concatenate([np.arange(s - q, s) for q, s in zip(query_lens, seq_lens, strict=True)])
    width = -(-max(seq_lens) // layout.block_size)

    def put(values: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(values).to(device=device, dtype=dtype)

    return InputBatch(
        tokens=torch.zeros(total, dtype=torch.int32, device=device), positions=put(positions, torch.int64),
        query_start=put(np.cumsum([0, *query_lens]), torch.int32), seq_lens=put(np.array(seq_lens), torch.int32),
        slots=(put(positions % layout.block_size, torch.int64),) * groups,
        block_tables=(torch.full((len(seq_lens), width), NULL_BLOCK, dtype=torch.int32, device=device),) * groups,
        logit_rows=torch.zeros(1, dtype=torch.int64, device=device), num_decodes=len(query_lens) if max(query_lens) == 1 else 0,
        query_lens_host=tuple(query_lens), seq_lens_host=tuple(seq_lens))


def _dummy_sampling(model: LanguageModel, hidden: Tensor) -> None:
    """The largest sampling call: MAX_LOGITS_ROWS rows with every filter."""
    logits = model.logits(hidden[torch.arange(MAX_LOGITS_ROWS, device=hidden.device) % len(hidden)], dtype=None)
    sampler = Sampler(1, logits.shape[-1], hidden.device, ops=model.build.ops)
    params = SamplingParams(top_p=0.9, top_k=10, min_p=0.01, logprobs=20, logit_bias={0: 0.0}, repetition_penalty=1.1,
                            bad_words_token_ids=((0, 0),))
    sampler.admit(RowAdmission(0, "dummy", (0,), 1, ((),), params, 0, 0))
    zeros = np.zeros(MAX_LOGITS_ROWS, np.int64)
    sampler.sample(logits, zeros, zeros, torch.zeros((1, 1), dtype=torch.int32, device=hidden.device))
