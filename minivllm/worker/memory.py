"""How many KV blocks fit, and where the memory goes: a ledger, not a guess.

    GPU                                              CPU
    |<------- gpu_memory_utilization ------->|       KV cache = what the weights take, at least 512 MiB or one sequence of
    | in use: context, | peak of  | KV cache |       max_model_len, at most 40% of the memory that is available
    | weights, others  | one step |          |       (untouched blocks are not resident)
       measured          measured   the rest

On a GPU the peak is measured by running the largest step there can be, sampler included, before the cache is allocated.
"""
from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivllm.core.plan import NULL_BLOCK, RowAdmission
from minivllm.errors import InvalidInput
from minivllm.kernels.layout import InputBatch, KVLayer
from minivllm.models.decoder import Decoder
from minivllm.sampling.sampler import Sampler
from minivllm.sampling_params import SamplingParams
from minivllm.worker.cuda_graphs import DECODES, SHORT, sharing_sizes
from minivllm.worker.kv_cache import BlockShape
from minivllm.worker.model_runner import MAX_LOGIT_ROWS

MIB, GIB = 1 << 20, 1 << 30
CPU_MINIMUM = 512 * MIB
CPU_FRACTION = 0.4  # of the available memory
DUMMY_CONTEXT = 4096  # keys per sequence in the dummy decode: enough to fill the attention's workspaces


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user asked for, as far as it concerns the size of the cache."""

    max_model_len: int
    length_is_explicit: bool  # then a cache that cannot hold it is an error; else the length is lowered
    chunk: int  # most tokens of one sequence in one step
    num_blocks: int | None = None
    cache_bytes: int | None = None
    utilization: float = 0.9


@dataclass(frozen=True, slots=True)
class CacheSize:
    """The answer."""

    num_blocks: int
    max_model_len: int
    account: str  # one line for the log
    ledger: Ledger | None = None  # on a GPU


@dataclass(frozen=True, slots=True)
class Ledger:
    """Where the memory of a GPU goes, in bytes, each figure measured."""

    total: int
    weights: int
    step: int  # what the largest step needs beyond them, for a moment
    other: int  # in use for what is not ours to choose: the driver's context, compiled kernels, other programs
    graphs_planned: int
    cache: int = 0
    graphs_taken: int = 0  # known once they are captured

    def table(self) -> tuple[str, str]:
        """Two lines in GiB: what the columns are, and the figures. What is left over nobody may use: see gpu_memory_utilization."""
        used = self.weights + self.step + self.graphs_taken + self.cache + self.other
        columns = {"weights": self.weights, "peak of a step": self.step, "CUDA graphs": self.graphs_taken,
                   "(set aside)": self.graphs_planned, "KV cache": self.cache, "other use": self.other,
                   "left": self.total - used, "total": self.total}
        widths = [max(len(name), 7) + 2 for name in columns]
        return ("GPU memory, GiB" + "".join(f"{name:>{width}}" for name, width in zip(columns, widths, strict=True)),
                " " * 15 + "".join(f"{value / GIB:{width}.2f}" for value, width in zip(columns.values(), widths, strict=True)))


def size_cache(wish: Wish, shape: BlockShape, budget: int, account: str, remedy: tuple[str, str]) -> CacheSize:
    """Blocks and length for a budget in bytes. `remedy`: (field, what to do) for a budget that is too small."""
    if wish.num_blocks is not None:
        num_blocks, account = wish.num_blocks, "num_gpu_blocks_override"
        remedy = ("num_gpu_blocks_override", "raise it")
    else:
        if wish.cache_bytes is not None:
            budget, account, remedy = wish.cache_bytes, "kv_cache_memory_bytes", ("kv_cache_memory_bytes", "raise it")
        num_blocks = max(budget, 0) // shape.block_bytes
    field, fix = remedy
    longest = shape.longest(num_blocks, wish.max_model_len, wish.chunk)
    size = f"{num_blocks:,} blocks of {shape.block_size} tokens, {num_blocks * shape.block_bytes / GIB:.2f} GiB"
    if longest < 1:
        raise InvalidInput(f"the KV cache has room for {max(num_blocks, 0)} blocks of {shape.block_bytes / MIB:.2f} MiB, fewer than any "
                           f"sequence needs ({account}): {fix}", field)
    if longest < wish.max_model_len and wish.length_is_explicit:
        needed = (shape.blocks_of(wish.max_model_len, wish.chunk) + 1) * shape.block_bytes
        raise InvalidInput(
            f"max_model_len {wish.max_model_len} needs {needed / GIB:.2f} GiB of KV cache and there is room for "
            f"{num_blocks * shape.block_bytes / GIB:.2f} GiB ({account}): lower max_model_len to {longest}, or for {field}: {fix}",
            "max_model_len")
    return CacheSize(num_blocks, longest, f"KV cache: {size} ({account})")


# --- CPU -----------------------------------------------------------------------------------------------------------


def cpu_cache(wish: Wish, shape: BlockShape, weight_bytes: int) -> CacheSize:
    """The size of a cache in host memory, with the weights loaded already."""
    available = available_host_memory()
    one_sequence = (shape.blocks_of(wish.max_model_len, wish.chunk) + 1) * shape.block_bytes
    budget = min(max(weight_bytes, CPU_MINIMUM, one_sequence), int(CPU_FRACTION * available))
    account = f"weights {weight_bytes / GIB:.2f} GiB, host memory available {available / GIB:.2f} GiB"
    return size_cache(wish, shape, budget, account, ("kv_cache_memory_bytes", "set it, at the price of memory for other programs"))


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


def cuda_cache(
    wish: Wish, shape: BlockShape, model: Decoder, max_num_seqs: int, max_num_batched_tokens: int, graph_bytes: int = 0,
) -> CacheSize:
    """The size of a cache on the GPU, with the weights loaded already; measures the peak of one step."""
    device = model.build.device
    peak = _peak_of_one_step(wish, shape, model, max_num_seqs, max_num_batched_tokens, graphs=graph_bytes > 0)
    peak += max_num_seqs * wish.max_model_len * torch.int32.itemsize  # the token table, which comes with the cache
    free, total = torch.cuda.mem_get_info(device)
    in_use, weights = total - free, torch.cuda.memory_allocated(device)
    budget = int(wish.utilization * total) - in_use - peak - graph_bytes
    account = (f"{wish.utilization:.2f} of {total / GIB:.2f} GiB, less {weights / GIB:.2f} weights, "
               f"{(in_use - weights) / GIB:.2f} other use, {peak / GIB:.2f} peak of a step, {graph_bytes / GIB:.2f} CUDA graphs")
    least = min(1.0, (in_use + peak + graph_bytes + (shape.blocks_of(wish.max_model_len, wish.chunk) + 1) * shape.block_bytes) / total)
    fix = f"raise it to {least + 0.005:.2f}" if least < 0.99 else "there is no room on this GPU; use a smaller model"
    if max_num_batched_tokens > 1024:
        fix += ", or lower max_num_batched_tokens, which sets the peak of a step"
    size = size_cache(wish, shape, budget, account, ("gpu_memory_utilization", fix))
    ledger = Ledger(total, weights, peak, in_use - weights, graph_bytes, size.num_blocks * shape.block_bytes)
    return replace(size, ledger=ledger)


@torch.inference_mode()
def _peak_of_one_step(
    wish: Wish, shape: BlockShape, model: Decoder, max_num_seqs: int, max_num_batched_tokens: int, *, graphs: bool,
) -> int:
    """Bytes that the largest steps allocate beyond the weights. All their blocks are the null block of a one-block cache."""
    device, spec = model.build.device, model.spec
    piece = (1, shape.block_size, spec.num_kv_heads, spec.head_dim)
    kv = [KVLayer(torch.zeros(piece, dtype=shape.dtype, device=device), torch.zeros(piece, dtype=shape.dtype, device=device))
          for _ in range(shape.block_bytes // (2 * shape.dtype.itemsize * int(np.prod(piece))))]
    limit = wish.max_model_len
    prompt = [min(limit, max_num_batched_tokens)] * max(1, max_num_batched_tokens // limit)
    decodes = [min(limit, DUMMY_CONTEXT)] * max_num_seqs
    if model.build.ops.compiling is not None:
        few = model.without_repetition()
        with model.build.ops.compiling():
            for seqs in (size for size in (*DECODES, max_num_seqs) if size <= max_num_seqs):
                for longest in sorted({1, min(limit, SHORT), limit}):  # from one program for all keys to as many as there can be
                    _dry_step(few, kv, _dummy_batch([1] * seqs, [longest] * seqs, shape, device), shape.block_size)
            for seqs in sharing_sizes(max_num_seqs, limit)[-1:] if graphs else ():  # the same kernels for all numbers
                batch = _dummy_batch([1] * seqs, [limit] * seqs, shape, device)
                _dry_step(few, kv, replace(batch, shared=torch.zeros(1, dtype=torch.int32, device=device)), shape.block_size)
            for last_only in (False, True):
                _dry_step(few, kv, replace(_dummy_batch(prompt, prompt, shape, device), last_only=last_only), shape.block_size)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    for query_lens, seq_lens in ((prompt, prompt), ([prompt[0]], [limit]), ([1] * len(decodes), decodes)):
        hidden = model.forward(_dummy_batch(query_lens, seq_lens, shape, device), kv, shape.block_size)
        _dummy_sampling(model, hidden)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del hidden, kv
    torch.cuda.empty_cache()
    return peak


def _dry_step(model: Decoder, kv: list[KVLayer], batch: InputBatch, block_size: int) -> None:
    """A step whose kernels are compiled only: what they would have computed is undefined, and nothing looks at it."""
    logits = model.logits(model.forward(batch, kv, block_size)[:MAX_LOGIT_ROWS], dtype=None)
    rows = len(logits)
    one, keys = torch.ones(rows, device=logits.device), torch.zeros((rows, 2), dtype=torch.int32, device=logits.device)
    top_k, sample = keys[:, 0].contiguous(), model.build.ops.sample
    sample(logits, one, keys)
    sample(logits, one, keys, top_p=one)
    sample(logits, one, keys, top_k=top_k, top_p=one)
    sample(logits.float(), one, keys, top_k=top_k, top_p=one, min_p=one)  # as `_dummy_sampling` does


def _dummy_batch(query_lens: list[int], seq_lens: list[int], shape: BlockShape, device: torch.device) -> InputBatch:
    total, groups = sum(query_lens), len(shape.groups)
    positions = np.concatenate([np.arange(s - q, s) for q, s in zip(query_lens, seq_lens, strict=True)])
    width = -(-max(seq_lens) // shape.block_size)

    def put(values: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(values).to(device=device, dtype=dtype)

    return InputBatch(
        tokens=torch.zeros(total, dtype=torch.int32, device=device), positions=put(positions, torch.int64),
        query_start=put(np.cumsum([0, *query_lens]), torch.int32), seq_lens=put(np.array(seq_lens), torch.int32),
        slots=(put(positions % shape.block_size, torch.int64),) * groups,
        block_tables=(torch.full((len(seq_lens), width), NULL_BLOCK, dtype=torch.int32, device=device),) * groups,
        logit_rows=torch.zeros(1, dtype=torch.int64, device=device), num_decodes=len(query_lens) if max(query_lens) == 1 else 0,
        query_lens_host=tuple(query_lens), seq_lens_host=tuple(seq_lens))


def _dummy_sampling(model: Decoder, hidden: Tensor) -> None:
    """Logits and sampling of as many rows as are ever held at once, in the most expensive way."""
    logits = model.logits(hidden[torch.arange(MAX_LOGIT_ROWS, device=hidden.device) % len(hidden)], dtype=None)
    sampler = Sampler(1, logits.shape[-1], hidden.device, ops=model.build.ops)
    params = SamplingParams(top_p=0.9, top_k=10, min_p=0.01, logprobs=20, logit_bias={0: 0.0})
    sampler.admit(RowAdmission(0, "dummy", (0,), 1, ((),), params, 0, 0))
    zeros = np.zeros(MAX_LOGIT_ROWS, np.int64)
    sampler.sample(logits, zeros, zeros, torch.zeros((1, 1), dtype=torch.int32, device=hidden.device))
