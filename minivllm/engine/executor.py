"""The executor: from an `EngineConfig` and a model's files to something that runs plans.

    EngineConfig, ModelSpec --> device, dtype --> weights --> how much KV fits --> cache --> ModelRunner
                                                             max_model_len

`Executor` is all that the engine asks of whatever runs its plans; `LocalExecutor` does it in this process on one device. Here,
and only here, "auto" becomes a device and a dtype, and what memory allows becomes a number of blocks.
"""
from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from minivllm.config import EngineConfig
from minivllm.core.plan import StepPlan, StepResult
from minivllm.errors import InvalidInput
from minivllm.families import ModelSpec, kv_groups, parameters
from minivllm.kernels import select
from minivllm.layers.build import BuildContext
from minivllm.models.hub import ModelFiles
from minivllm.models.loader import load_model
from minivllm.sampling.logits_processors import TokenMasks
from minivllm.worker.cuda_graphs import graph_bytes
from minivllm.worker.kv_cache import BlockShape, KVCache
from minivllm.worker.memory import GIB, CacheSize, Ledger, Wish, cpu_cache, cuda_cache
from minivllm.worker.model_runner import Handle, ModelRunner
from minivllm.worker.model_runner import Pending as LocalPending

log = logging.getLogger(__name__)

CUDA_BUDGET, CPU_BUDGET = 8192, 2048  # default max_num_batched_tokens


class PendingStep(Protocol):
    """A step whose result is on its way."""

    def wait(self) -> StepResult: ...


class Executor(Protocol):
    """Runs plans in the order they are launched. `sample` of one plan comes before `launch` of the next."""

    num_blocks: int
    num_host_blocks: int

    def launch(self, plan: StepPlan) -> Any: ...

    def sample(self, handle: Any, masks: TokenMasks | None = None) -> PendingStep: ...

    def close(self) -> None: ...


class LocalExecutor:
    """A model in this process, on one device."""

    def __init__(
        self, runner: ModelRunner, *, device: torch.device, dtype: torch.dtype, max_model_len: int, max_num_batched_tokens: int,
    ) -> None:
        self._runner: ModelRunner | None = runner
        self.device, self.dtype = device, str(dtype).removeprefix("torch.")
        self.max_model_len = max_model_len  # the model's or the user's, or less if the cache holds less
        self.max_num_batched_tokens = max_num_batched_tokens
        self.overlaps = device.type == "cuda"  # the host is free while a step runs, so planning ahead pays
        self.num_blocks = runner.kv.num_blocks
        self.num_host_blocks = runner.kv.num_host_blocks
        self.kv_windows = tuple(group.window for group in runner.kv.shape.groups)

    @classmethod
    def from_config(cls, config: EngineConfig, spec: ModelSpec, files: ModelFiles, *, eos_token_ids: Sequence[int] = ()) -> LocalExecutor:
        """Load the model and size its cache. `spec.max_model_len` is the length wished for."""
        passed = _Stopwatch()
        device = choose_device(config.device)
        dtype = choose_dtype(config.dtype, spec, device)
        budget = token_budget(config, spec, device)
        build = BuildContext(device=device, dtype=dtype, ops=select(device))
        build.ops.warm_up(spec.num_heads, spec.num_kv_heads, spec.head_dim, dtype)
        passed("device and kernels")
        shape = BlockShape(kv_groups(spec), config.block_size, dtype)
        weights = _weight_bytes(spec, dtype)
        with _enough_memory(f"the weights of {weights / GIB:.2f} GiB", "model", "use a smaller model, or a dtype of fewer bytes"):
            model = load_model(spec, Path(files.folder), config.load_format, build, config.seed)
        passed("weights")
        chunk = min(budget, config.long_prefill_token_threshold or budget)
        wish = Wish(max_model_len=spec.max_model_len, length_is_explicit=config.max_model_len is not None, chunk=chunk,
                    num_blocks=config.num_gpu_blocks_override, cache_bytes=config.kv_cache_memory_bytes,
                    utilization=config.gpu_memory_utilization)
        if device.type == "cuda":
            with _enough_memory(f"a step of {budget} tokens", "max_num_batched_tokens", "lower it"):
                graphs = 0 if config.enforce_eager else graph_bytes(spec, config.max_num_seqs, budget)
                size = cuda_cache(wish, shape, model, config.max_num_seqs, budget, graphs)
        else:
            size = cpu_cache(wish, shape, weights)
        passed("measuring memory")
        _announce(spec, device, dtype, config.dtype == "auto", size)
        host_blocks = host_block_count(config.kv_offloading_size, shape)
        field = "num_gpu_blocks_override" if config.num_gpu_blocks_override is not None else "kv_cache_memory_bytes"
        pools = f"{size.num_blocks * shape.block_bytes / GIB:.2f} GiB and {host_blocks * shape.block_bytes / GIB:.2f} GiB in host memory"
        with _enough_memory(f"a KV cache of {pools}", field, "lower it, or kv_offloading_size"):
            kv = KVCache(shape, size.num_blocks, host_blocks, device, build.ops)
        passed("KV cache")
        runner = ModelRunner(model, kv, max_num_seqs=config.max_num_seqs, max_model_len=size.max_model_len,
                             eos_token_ids=eos_token_ids, graph_tokens=budget if device.type == "cuda" and not config.enforce_eager else 0)
        if size.ledger is not None:
            _announce_memory(replace(size.ledger, graphs_taken=runner.graph_bytes))
            passed("CUDA graphs")
        log.info("started: %s", passed)
        return cls(runner, device=device, dtype=dtype, max_model_len=size.max_model_len, max_num_batched_tokens=budget)

    def launch(self, plan: StepPlan) -> Handle:
        """Start a step. On a GPU this returns before the step has run; on a CPU it runs here."""
        assert self._runner is not None, "the executor was closed"
        return self._runner.launch(plan)

    def sample(self, handle: Handle, masks: TokenMasks | None = None) -> LocalPending:
        """Finish a step: choose its tokens."""
        assert self._runner is not None, "the executor was closed"
        return self._runner.sample(handle, masks)

    def drop_rows(self) -> None:
        """Forget everything about rows; plans must admit them again. (The row table is a cache.)"""
        assert self._runner is not None, "the executor was closed"
        self._runner.drop_rows()

    def close(self) -> None:
        """Give all memory back. Safe to call twice."""
        self._runner = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class _Stopwatch:
    """How long each part of a start took: call it after each."""

    def __init__(self) -> None:
        self._parts: list[tuple[str, float]] = []
        self._last = time.perf_counter()

    def __call__(self, part: str) -> None:
        now = time.perf_counter()
        self._parts.append((part, now - self._last))
        self._last = now

    def __str__(self) -> str:
        return ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self._parts)


# --- choices -------------------------------------------------------------------------------------------------------


def choose_device(wanted: str) -> torch.device:
    """"auto" is the GPU if there is one."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InvalidInput("device is 'cuda', but PyTorch sees no CUDA GPU: check the driver (nvidia-smi), or use device='cpu'", "device")
    return torch.device(wanted, torch.cuda.current_device()) if wanted == "cuda" else torch.device(wanted)


def choose_dtype(wanted: str, spec: ModelSpec, device: torch.device) -> torch.dtype:
    """"auto": on a GPU the checkpoint's own, halved if it is float32; on a CPU bfloat16 only where the CPU multiplies it fast."""
    if wanted != "auto":
        return dtype_of(wanted)
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    if spec.dtype == "float16" or not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of this name."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has matrix (AMX) or vector (AVX512-BF16) units for bfloat16. Without them it is slower than float32."""
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        supported = getattr(torch.cpu, name, None)
        if supported is not None and supported():
            return True
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return bool(flags & {"amx_bf16", "avx512_bf16"})


def token_budget(config: EngineConfig, spec: ModelSpec, device: torch.device) -> int:
    """max_num_batched_tokens: as given, or the device's default; without chunked prefill, enough for the longest prompt."""
    if config.max_num_batched_tokens is not None:
        return config.max_num_batched_tokens
    budget = CUDA_BUDGET if device.type == "cuda" else CPU_BUDGET
    return budget if config.enable_chunked_prefill else max(budget, spec.max_model_len)


def host_block_count(offloading_gib: float, shape: BlockShape) -> int:
    """Host blocks in `kv_offloading_size` GiB; block 0 is never used there either, so one block alone is none."""
    count = int(offloading_gib * GIB) // shape.block_bytes
    if offloading_gib and count < 2:
        each = shape.block_bytes / GIB
        raise InvalidInput(f"kv_offloading_size {offloading_gib:g} GiB holds no block (of {each:.6f} GiB, and one is reserved): "
                           f"set at least {2 * each:.6f}, or 0", "kv_offloading_size")
    return count


def _weight_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    return sum(int(np.prod(p.shape)) for p in parameters(spec).values()) * dtype.itemsize


@contextmanager
def _enough_memory(what: str, field: str, fix: str) -> Iterator[None]:
    """Turns running out of memory into the user's error: what did not fit, and what to change."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        torch.cuda.empty_cache()
        raise InvalidInput(f"no memory for {what} ({str(error).split('. ')[0]}): for {field}: {fix}", field) from error


def _announce(spec: ModelSpec, device: torch.device, dtype: torch.dtype, automatic: bool, size: CacheSize) -> None:
    """The choices made for the user, printed; the ledger goes to the log."""
    name = str(dtype).removeprefix("torch.")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"
    why = ""
    if automatic and device.type == "cpu":
        fast = dtype == torch.bfloat16
        why = " (this CPU multiplies bfloat16 fast)" if fast else " (no AMX or AVX512-BF16 here, so bfloat16 would be slower)"
    print(f"minivllm: {spec.architecture} on {where}, {name}{why}", file=sys.stderr, flush=True)
    if size.max_model_len < spec.max_model_len:
        print(f"minivllm: max_model_len lowered from {spec.max_model_len} to {size.max_model_len}, which is what the KV cache holds",
              file=sys.stderr, flush=True)
    log.info("%s", size.account)


def _announce_memory(ledger: Ledger) -> None:
    """What a GPU's memory is used for, printed; how the size of the cache came about is in the log."""
    for line in ledger.table():
        print(f"minivllm: {line}", file=sys.stderr, flush=True)
