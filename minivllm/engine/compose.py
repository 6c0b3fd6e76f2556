"""The composition root: from an `EngineConfig` to an engine that runs. Workers, memory sizing and engine are built here only.

    find_model ─▶ config.json ─▶ ModelSpec ─▶ LoadedModel ─▶ MemoryBudget ─▶ CacheSize ─▶ Worker ─▶ Scheduler ─▶ EngineCore
                └▶ tokenizer, generation_config.json (EOS, sampling defaults)
"""
from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from minivllm.config import EngineConfig
from minivllm.core.scheduler import Scheduler, SchedulerConfig
from minivllm.core.trace import RecordingScheduler, TraceWriter
from minivllm.engine.engine import EngineCore
from minivllm.engine.messages import EngineInfo
from minivllm.engine.model_choice import BetterModels, check_weights_fit, with_plan
from minivllm.engine.pooling import default_pooling
from minivllm.engine.speculation import Speculation
from minivllm.engine.tokenizer import Tokenizer
from minivllm.errors import InvalidInput, ModelError
from minivllm.families import ModelSpec, parse_config
from minivllm.families.config_json import token_ids
from minivllm.kernels.tuning import SHARED_TOKENS
from minivllm.models.decoder import Decoder
from minivllm.models.hub import ModelFiles, find_model
from minivllm.models.transformers_spec import read_spec
from minivllm.parallel.group import SINGLE
from minivllm.parallel.shard import shard_spec
from minivllm.quantization.kv_cache import QUANTIZED
from minivllm.quantization.methods import METHODS, kv_cache_notice, method_of
from minivllm.sampling_params import SamplingParams
from minivllm.speculative.load import Draft, find_draft
from minivllm.worker.device import check_kv_cache_dtype, check_ranks, choose_device, choose_dtype
from minivllm.worker.memory import CacheSize, host_block_count, size_cache
from minivllm.worker.ranks import Ranks
from minivllm.worker.worker import DEFAULT_COMPONENTS, Components, LoadedModel, Worker

log = logging.getLogger(__name__)

# generation_config.json's names of the sampling parameters that it may set, and ours
_DEFAULTS = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens",
}


def build_engine(config: EngineConfig, components: Components = DEFAULT_COMPONENTS) -> EngineCore:
    """Find the model, load it, size the KV cache, and connect all parts."""
    def checked_spec(model_config: Mapping[str, Any]) -> ModelSpec:
        spec = _with_length(read_spec(config, model_config, components.methods), config.max_model_len)
        device = choose_device(config.device)
        check_ranks(config.tensor_parallel_size, device)
        shard_spec(spec, config.tensor_parallel_size)  # raises if so many ranks cannot share it
        check_kv_cache_dtype(config.kv_cache_dtype, choose_dtype(config.dtype, spec.dtype, device), device)
        with with_plan(config, model_config, components.methods):
            check_weights_fit(config, spec, method_of(model_config, components.methods, config.quantization))
        return spec

    better = BetterModels(config)

    files = find_model(config, checked_spec)
    spec = checked_spec(files.config)
    ranks = Ranks(config.tensor_parallel_size) if config.tensor_parallel_size > 1 else None
    try:
        draft = None if components.proposer is not None else find_draft(config, spec, files.folder, files.tokenizer_folder)
        tokenizer = None if files.tokenizer_folder is None else Tokenizer(files.tokenizer_folder, config.trust_remote_code)
        eos = _eos_token_ids(files.generation_config, files.config, tokenizer, spec.vocab_size)
        defaults = sampling_defaults(files.generation_config)
        with with_plan(config, files.config, components.methods):
            worker = start_worker(config, spec, files, eos_token_ids=eos, draft=draft, components=components, ranks=ranks)
    except BaseException:
        if ranks is not None:
            ranks.close()
        raise
    try:
        info = EngineInfo(
            model=files.name, model_folder=str(files.folder),
            tokenizer_folder=None if files.tokenizer_folder is None else str(files.tokenizer_folder),
            max_model_len=worker.max_model_len, vocab_size=spec.vocab_size, eos_token_ids=eos, device=str(worker.device),
            dtype=_name(worker.dtype), num_blocks=worker.num_blocks, block_size=config.block_size, generation_config=defaults,
            trust_remote_code=config.trust_remote_code, scheduling_policy=config.scheduling_policy,
            weight_bytes=worker.weight_bytes, kv_cache_bytes=worker.kv_cache_bytes,
            max_logprobs=config.max_logprobs, kv_cache_dtype=_name(worker.kv_cache_dtype),
            max_running=min(config.max_num_seqs, worker.max_num_batched_tokens),
            max_requests=None if config.max_queue is None else config.max_queue + min(config.max_num_seqs, worker.max_num_batched_tokens),
            max_loras=config.max_loras if config.enable_lora else 0, max_lora_rank=config.max_lora_rank if config.enable_lora else 0,
            max_queue=config.max_queue, embedding_size=spec.embed_size, pooling=config.pooling.complete(default_pooling(files.folder)),
        )
        scheduler = _scheduler(config, worker, info)
        if (line := better.line(worker.device)) is not None:
            print(f"minivllm: {line}", file=sys.stderr, flush=True)
    except BaseException:
        worker.close()
        raise
    speculation = config.speculation
    return EngineCore(
        executor=worker, scheduler=scheduler, tokenizer=tokenizer, info=info, seed=config.seed, max_cpu_loras=config.max_cpu_loras,
        speculation=None if speculation is None else Speculation(
            speculation, info.device, scheduler.config.planning_depth > 0, worker.num_device_drafts == 0),
        max_grammar_seconds=config.max_grammar_seconds,
    )


def load_target(config: EngineConfig) -> tuple[ModelFiles, Decoder, Tokenizer, tuple[int, ...]]:
    """A model without a KV cache, to train a draft for it: its files, weights, tokenizer and EOS ids."""
    files = find_model(config)
    spec = parse_config(files.config, methods=METHODS)
    assert files.tokenizer_folder is not None
    tokenizer = Tokenizer(files.tokenizer_folder, config.trust_remote_code)
    loaded = LoadedModel(config, spec, files.folder, method=method_of(files.config, wanted=config.quantization))
    assert isinstance(loaded.model, Decoder)
    return files, loaded.model, tokenizer, _eos_token_ids(files.generation_config, files.config, tokenizer, spec.vocab_size)


def start_worker(config: EngineConfig, spec: ModelSpec, files: ModelFiles, *, eos_token_ids: Sequence[int] = (),
                 draft: Draft | None = None, components: Components = DEFAULT_COMPONENTS, ranks: Ranks | None = None) -> Worker:
    """Load the model, measure what is left, and allocate the KV cache. `spec.max_model_len` is the length to serve. ranks: the other
    tensor-parallel ranks, which do the same at the same time."""
    passed = _Stopwatch()
    group = SINGLE
    if ranks is not None:
        group = ranks.connect(config, spec, files, tuple(eos_token_ids), components, choose_device(config.device))
        passed("ranks")
    loaded = LoadedModel(config, spec, Path(files.folder), components=components, draft=draft, group=group,
                         method=method_of(files.config, components.methods, config.quantization))
    passed("weights and kernels")
    budget = loaded.available_memory() if ranks is None else ranks.smallest_budget(loaded.available_memory)
    size = size_cache(loaded.cache_settings, loaded.layout, budget)
    num_host_blocks = host_block_count(config.kv_offloading_size / group.size, loaded.layout)
    passed("measuring memory")
    _announce(loaded, size)
    if (line := kv_cache_notice(files.config, config.kv_cache_dtype in QUANTIZED)) is not None:
        print(f"minivllm: {line}", file=sys.stderr, flush=True)
    if ranks is None:
        worker = loaded.allocate(size, num_host_blocks, eos_token_ids=eos_token_ids, ledger=budget.ledger)
    else:
        worker = ranks.allocate(loaded, size, num_host_blocks, eos_token_ids=eos_token_ids, ledger=budget.ledger)
    passed("KV cache and CUDA graphs" if worker.ledger is not None else "KV cache")
    for line in () if worker.ledger is None else worker.ledger.table():
        print(f"minivllm: {line}", file=sys.stderr, flush=True)
    log.info("started: %s", passed)
    return worker


def _announce(loaded: LoadedModel, size: CacheSize) -> None:
    """Print the choices made for the user. The calculation of the cache size is logged."""
    device, dtype, wanted = loaded.device, loaded.dtype, loaded.spec.max_model_len
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"
    if (ranks := loaded.config.tensor_parallel_size) > 1:
        where = f"{ranks} x {where}"
    why = ""
    if loaded.config.dtype == "auto" and device.type == "cpu":
        fast = dtype == torch.bfloat16
        why = " (this CPU multiplies bfloat16 fast)" if fast else " (no AMX or AVX512-BF16 here, so bfloat16 would be slower)"
    print(f"minivllm: {loaded.spec.architecture} on {where}, {_name(dtype)}{why}", file=sys.stderr, flush=True)
    if loaded.streaming is not None:
        print(f"minivllm: {loaded.streaming}", file=sys.stderr, flush=True)
    layout = loaded.layout
    tokens, each = (size.num_blocks - 1) * layout.block_size, layout.block_bytes / layout.block_size
    print(f"minivllm: KV cache in {_name(layout.dtype)}: {each / 1024:.1f} KiB per token, room for {tokens:,} tokens",
          file=sys.stderr, flush=True)
    if size.max_model_len < wanted:
        print(f"minivllm: max_model_len lowered from {wanted} to {size.max_model_len}, the capacity of the KV cache",
              file=sys.stderr, flush=True)
    log.info("%s", size.account)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Stopwatch:
    """How long each part of a start took. Call it after each part."""

    def __init__(self) -> None:
        self._parts: list[tuple[str, float]] = []
        self._last = time.perf_counter()

    def __call__(self, part: str) -> None:
        now = time.perf_counter()
        self._parts.append((part, now - self._last))
        self._last = now

    def __str__(self) -> str:
        return ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self._parts)


def _scheduler(config: EngineConfig, worker: Worker, info: EngineInfo) -> Scheduler:
    ahead = worker.overlaps if config.async_scheduling is None else config.async_scheduling
    scheduling = SchedulerConfig(
        num_blocks=worker.num_blocks, block_size=config.block_size, max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=worker.max_num_batched_tokens, max_model_len=worker.max_model_len,
        kv_windows=worker.kv_windows, enable_prefix_caching=config.enable_prefix_caching,
        enable_chunked_prefill=config.enable_chunked_prefill,
        long_prefill_token_threshold=config.long_prefill_token_threshold, policy=config.scheduling_policy,
        max_queue=config.max_queue, planning_depth=int(ahead), num_host_blocks=worker.num_host_blocks,
        eos_token_ids=info.eos_token_ids, max_loras=info.max_loras, num_device_drafts=worker.num_device_drafts,
        free_tokens=SHARED_TOKENS[info.device.partition(":")[0]],
    )
    if config.trace is None:
        return Scheduler(scheduling)
    about = {"model": info.model, "device": info.device, "dtype": info.dtype}
    return RecordingScheduler(scheduling, TraceWriter(config.trace, scheduling, about))


def _with_length(spec: ModelSpec, wanted: int | None) -> ModelSpec:
    if wanted is None:
        return spec
    if wanted > spec.max_model_len:
        raise InvalidInput(
            f"max_model_len {wanted} exceeds the model's context length of {spec.max_model_len} tokens: lower it",
            "max_model_len",
        )
    return dataclasses.replace(spec, max_model_len=wanted)


def _eos_token_ids(
    generation: Mapping[str, Any], config: Mapping[str, Any], tokenizer: Tokenizer | None, vocab_size: int,
) -> tuple[int, ...]:
    """All EOS ids of a model: chat models have more than one. generation_config.json comes first, then tokenizer, then config.json."""
    found: list[int] = []
    from_tokenizer = {} if tokenizer is None else {"eos_token_id": tokenizer.eos_token_id}
    for file, source in (("generation_config.json", generation), ("the tokenizer", from_tokenizer), ("config.json", config)):
        ids, others = token_ids(file, source, "eos_token_id", vocab_size)
        if others:
            print(f"minivllm: {file}: eos_token_id {others[0]} is outside the model's vocabulary (0 to {vocab_size - 1}), and not used",
                  file=sys.stderr, flush=True)
        found += ids
    return tuple(dict.fromkeys(found))


def sampling_defaults(generation: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling parameters that the model's own generation_config.json sets."""
    found = {ours: generation[theirs] for theirs, ours in _DEFAULTS.items() if generation.get(theirs) is not None}
    try:
        SamplingParams(**found)
    except InvalidInput as error:
        raise ModelError(f"the model's generation_config.json is wrong: {error}", "model") from None
    return found
