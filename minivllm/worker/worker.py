"""A worker: one rank's device, weights, KV cache and model runner.

    LoadedModel(config, spec, ...)         device, dtype, kernels, weights
        .available_memory() ──▶ MemoryBudget          every rank measures its own; the smallest decides
        .allocate(CacheSize) ──▶ Worker               KV cache, row table, CUDA graphs
                                   .launch(plan), .sample(launched, masks)

Every rank builds the same two objects and receives the same plans. A plan and the noise of its samples are pure values, so
all ranks sample the same tokens without exchanging them.
"""
from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minivllm.config import EngineConfig
from minivllm.core.plan import StepPlan, StepResult
from minivllm.errors import NotEnoughMemory
from minivllm.families import ModelSpec
from minivllm.kernels import Ops, select
from minivllm.layers.build import BuildContext
from minivllm.lora.adapter import read_adapter
from minivllm.lora.layout import AdapterLayout
from minivllm.lora.slots import AdapterStore, PackedAdapter
from minivllm.models.decoder import LanguageModel
from minivllm.models.hub import find_adapter
from minivllm.models.loader import load_model, weight_bytes
from minivllm.models.streaming import WeightStream
from minivllm.models.transformers_load import load_transformers
from minivllm.models.transformers_spec import ForeignSpec
from minivllm.parallel.group import SINGLE, ParallelGroup
from minivllm.parallel.shard import shard_spec
from minivllm.quantization.kv_cache import KVFormat, kv_format
from minivllm.quantization.methods import METHODS, MethodOf, Methods, all_dense
from minivllm.sampling.logits_processors import TokenMasks
from minivllm.speculative.adaptive import most_speculative_seqs
from minivllm.speculative.base import DeviceProposer
from minivllm.speculative.load import Draft, load_draft
from minivllm.speculative.ngram_lookup import NgramLookup
from minivllm.speculative_config import SpeculativeConfig
from minivllm.worker.cuda_graphs import can_capture, graph_bytes
from minivllm.worker.device import choose_device, choose_dtype
from minivllm.worker.kv_cache import KVCache, KVLayout
from minivllm.worker.memory import (
    GIB,
    CacheSettings,
    CacheSize,
    MemoryBudget,
    MemoryLedger,
    available_host_memory,
    cpu_budget,
    cuda_budget,
    row_bytes,
)
from minivllm.worker.model_runner import LaunchedStep, ModelRunner, SampledStep
from minivllm.worker.weight_offload import describe, plan_weight_offload

CUDA_TOKEN_BUDGET, CPU_TOKEN_BUDGET = 8192, 2048  # default max_num_batched_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """The exchangeable parts of a worker. Tests and extensions pass their own."""

    methods: Methods = field(default_factory=lambda: METHODS)  # linear methods by the name in a checkpoint's quantization_config
    kv_format: KVFormat | None = None  # how keys and values are stored; None: as kv_cache_dtype says
    ops: Callable[[torch.device], Ops] = select  # kernels of a device
    proposer: Callable[[Any], DeviceProposer] | None = None  # of drafts; None: as speculative_config says


DEFAULT_COMPONENTS = Components()


class LoadedModel:
    """A model on a device, before its KV cache exists."""

    def __init__(self, config: EngineConfig, spec: ModelSpec, folder: Path, *, method: MethodOf = all_dense, draft: Draft | None = None,
                 components: Components = DEFAULT_COMPONENTS, group: ParallelGroup = SINGLE) -> None:
        """Load the weights in `folder`, and those of the draft. `spec.max_model_len` is the length to serve. group: the ranks that share
        the model.

        Raises `InvalidInput` if they do not fit."""
        self.config, self.spec, self._num_ranks = config, spec, group.size
        self._shard = shard = shard_spec(spec, group.size)
        self.device = choose_device(config.device)
        self.dtype = choose_dtype(config.dtype, spec.dtype, self.device)
        self.max_num_batched_tokens = token_budget(config, spec.max_model_len, self.device)
        adapters = None
        if config.enable_lora:
            layout = AdapterLayout.of(spec, config.max_lora_rank, group.size)
            with enough_memory(f"{config.max_loras} LoRA slots of {layout.num_bytes(1, self.dtype.itemsize) / GIB:.3f} GiB", "max_loras",
                               "lower it, or max_lora_rank"):
                adapters = AdapterStore(layout, config.max_loras, self.dtype, self.device, group)
        build = BuildContext(self.device, self.dtype, components.ops(self.device), method, adapters, group)
        self.layout = KVLayout.of(shard, config.block_size, self.dtype, components.kv_format or kv_format(config.kv_cache_dtype),
                                  None if draft is None else draft.spec)
        for shape in dict.fromkeys((*shard.attention_shapes, *(() if draft is None else draft.spec.attention_shapes))):
            build.ops.warm_up(*shape, self.dtype, self.layout.dtype)
        offload = plan_weight_offload(config.cpu_offload_gb, shard, method, self.dtype, self.device)
        self._weight_bytes = weight_bytes(spec, build) - offload.saved_bytes  # on the device
        self._weight_bytes += 0 if draft is None else draft.weight_bytes(self.dtype.itemsize, self.device.type == "cuda")
        with enough_memory(f"the weights of {self._weight_bytes / GIB:.2f} GiB", "model", "use a smaller model, or a dtype of fewer bytes"):
            stream = WeightStream(offload.layers, self.device) if offload.layers else None
            self.model: LanguageModel
            self.proposer: DeviceProposer | None = None
            if isinstance(spec, ForeignSpec):
                self.model = load_transformers(spec, folder, config.load_format, build, config.seed)
            else:
                self.model = target = load_model(spec, folder, config.load_format, build, config.seed, stream)
                self.proposer = load_draft(draft, target) if draft is not None else None
            if config.speculation is not None and config.speculation.method == "ngram" and self.device.type == "cuda":
                self.proposer = NgramLookup(config.speculation, build.ops)
            if components.proposer is not None:
                self.proposer = components.proposer(self.model)
        if adapters is not None:
            self._weight_bytes += adapters.layout.num_bytes(config.max_loras, self.dtype.itemsize)
        self.streaming = None if stream is None else describe(offload, len(spec.layers), stream)  # for the user

    @property
    def cache_settings(self) -> CacheSettings:
        """What the configuration says about the size of the cache."""
        return CacheSettings.of(self.config, self.spec.max_model_len, self.max_num_batched_tokens)

    @property
    def _captures_graphs(self) -> bool:
        return self.device.type == "cuda" and not self.config.enforce_eager and can_capture(self.spec, self.layout)

    def available_memory(self) -> MemoryBudget:
        """What this rank's KV cache may take. On a GPU this runs the largest steps."""
        config, budget = self.config, self.max_num_batched_tokens
        if self.device.type != "cuda":
            return cpu_budget(self.cache_settings, self.layout, self._weight_bytes, available_host_memory() // self._num_ranks)
        with enough_memory(f"a step of {budget} tokens", "max_num_batched_tokens", "lower it"):
            graphs = graph_bytes(self._shard, config.max_num_seqs, budget, config.enable_lora) if self._captures_graphs else 0
            return cuda_budget(self.cache_settings, self.layout, self.model, config.max_num_seqs, budget, graphs,
                               sampled_drafts(config.speculation))

    def allocate(self, size: CacheSize, num_host_blocks: int = 0, *, eos_token_ids: Sequence[int] = (),
                 ledger: MemoryLedger | None = None, make_worker: Callable[..., Worker] | None = None) -> Worker:
        """The KV cache and everything that runs plans on it. ledger: of `available_memory`. Raises `InvalidInput` if they do not fit."""
        config, layout = self.config, self.layout
        field = "num_gpu_blocks_override" if config.num_gpu_blocks_override is not None else "kv_cache_memory_bytes"
        device_gib, host_gib = (blocks * layout.block_bytes / GIB for blocks in (size.num_blocks, num_host_blocks))
        pools = f"a KV cache of {device_gib:.2f} GiB and {host_gib:.2f} GiB in host memory"
        with enough_memory(pools, field, "lower it, or kv_offloading_size"):
            kv = KVCache(layout, size.num_blocks, num_host_blocks, self.device, self.model.build.ops)
        speculation, sampled = config.speculation, sampled_drafts(config.speculation)
        runner = ModelRunner(self.model, kv, max_num_seqs=config.max_num_seqs, max_model_len=size.max_model_len,
                             eos_token_ids=eos_token_ids, graph_tokens=self.max_num_batched_tokens if self._captures_graphs else 0,
                             only_largest_graph=config.cuda_graph_capture == "background" and self._num_ranks == 1,
                             proposer=self.proposer, query_widths=query_widths(speculation), keep_probs=sampled > 0,
                             most_speculative_seqs=0 if speculation is None else most_speculative_seqs(speculation, self.device.type))
        if ledger is not None:
            rows = row_bytes(layout, config.max_num_seqs, size.max_model_len, self.spec.vocab_size, sampled)
            ledger = replace(ledger, rows=rows, cache=size.num_blocks * layout.block_bytes, graphs_taken=runner.graph_bytes)
        return (make_worker or Worker)(
            runner, max_model_len=size.max_model_len, max_num_batched_tokens=self.max_num_batched_tokens, ledger=ledger,
            weight_bytes=self._weight_bytes, max_lora_rank=config.max_lora_rank, find_adapter=partial(find_adapter, config=config))


class Worker:
    """Runs plans in the order in which they are launched. `sample` of one plan comes before `launch` of the next."""

    def __init__(self, runner: ModelRunner, *, max_model_len: int, max_num_batched_tokens: int, ledger: MemoryLedger | None = None,
                 weight_bytes: int = 0, max_lora_rank: int = 0, find_adapter: Callable[[str], Path] = Path) -> None:
        self._runner: ModelRunner | None = runner
        self.device, self.dtype = runner.model.build.device, runner.model.build.dtype
        self.overlaps = self.device.type == "cuda"  # the host is idle while a step runs, so asynchronous scheduling pays
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len  # the model's or the user's, or less if the cache holds less
        self.max_lora_rank, self._find_adapter = max_lora_rank, find_adapter
        self.num_blocks = runner.kv.num_blocks
        self.num_host_blocks = runner.kv.num_host_blocks
        self.kv_windows = runner.kv.layout.windows
        self.num_device_drafts = runner.rows.proposals  # that it proposes itself, for each sequence
        self.ledger = ledger  # where a GPU's memory went
        self.weight_bytes, self.kv_cache_bytes = weight_bytes, self.num_blocks * runner.kv.layout.block_bytes
        self.kv_cache_dtype = runner.kv.layout.dtype

    @property
    def runner(self) -> ModelRunner:
        assert self._runner is not None, "the worker was closed"
        return self._runner

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Start a step. On a GPU this returns before the step has run; on a CPU it runs here."""
        return self.runner.launch(plan)

    def sample(self, step: LaunchedStep, masks: TokenMasks | None = None) -> SampledStep:
        """Finish a step: choose its tokens. masks: the tokens that grammars allow, computed while the step runs."""
        return self.runner.sample(step, masks)

    def execute(self, plan: StepPlan, masks: TokenMasks | None = None) -> StepResult:
        """A whole step, waited for."""
        return self.sample(self.launch(plan), masks).wait()

    def prepare_ahead(self) -> bool:
        """Capture one of the CUDA graphs that the start has left for later. False: no other one is left. Call it between steps."""
        return self.runner.capture_next()

    def read_adapter(self, lora_path: str) -> PackedAdapter:
        """A LoRA adapter in host memory, not known to the worker yet. lora_path: folder or hub id. It may be called on any thread.

        Raises `InvalidInput`."""
        store = self._adapters
        return store.pack(read_adapter(self._find_adapter(lora_path), store.layout, self.max_lora_rank))

    def add_adapter(self, adapter_id: int, packed: PackedAdapter) -> None:
        """From now on plans may bring this adapter into a slot."""
        self._adapters.add(adapter_id, packed)

    def remove_adapter(self, adapter_id: int) -> None:
        """Free an adapter that no later plan names."""
        self._adapters.remove(adapter_id)

    @property
    def _adapters(self) -> AdapterStore:
        store = self.runner.model.build.adapters
        assert store is not None, "the engine was started without enable_lora"
        return store

    def drop_rows(self) -> None:
        """Forget everything about rows; plans must admit them again. (The row table is a cache.)"""
        self.runner.drop_rows()

    def when_failed(self, call: Callable[[Exception], None]) -> None:
        """Call this, from another thread, if the worker cannot go on although no step runs. One device alone never fails so."""

    def close(self) -> None:
        """Give all memory back. Safe to call twice."""
        self._runner = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def query_widths(speculation: SpeculativeConfig | None) -> tuple[int, ...]:
    """Tokens of the decodes whose steps are captured. A decode with another number of drafts is lengthened to the next one."""
    most = 0 if speculation is None else speculation.num_speculative_tokens
    return tuple(sorted({1, 1 + (most + 1) // 2, 1 + most}))


def sampled_drafts(speculation: SpeculativeConfig | None) -> int:
    """Drafts of a sequence that are sampled from a distribution, which is kept."""
    return 0 if speculation is None or speculation.draft_sample_method == "greedy" else speculation.num_speculative_tokens


def token_budget(config: EngineConfig, max_model_len: int, device: torch.device) -> int:
    """max_num_batched_tokens: as given, or the device's default; without chunked prefill, enough for the longest prompt."""
    if config.max_num_batched_tokens is not None:
        return config.max_num_batched_tokens
    budget = CUDA_TOKEN_BUDGET if device.type == "cuda" else CPU_TOKEN_BUDGET
    return budget if config.enable_chunked_prefill else max(budget, max_model_len)


@contextmanager
def enough_memory(what: str, field: str, fix: str) -> Iterator[None]:
    """Turns running out of memory into a user error: what did not fit, and what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # PyTorch's allocator of host memory has no class of errors for this.
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        torch.cuda.empty_cache()
        raise NotEnoughMemory(f"no memory for {what} ({str(error).split('. ')[0]}): for {field}: {fix}", field) from error
