"""Where all parts meet: from an `EngineConfig` to an engine that runs.

    find_model ─▶ config.json ─▶ ModelSpec ─▶ LocalExecutor (weights, KV cache) ─▶ how many blocks ─▶ Scheduler
                └▶ tokenizer, generation_config.json (EOS, sampling defaults)
"""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from minivllm.config import EngineConfig
from minivllm.core.scheduler import Scheduler, SchedulerConfig
from minivllm.core.trace import RecordingScheduler, TraceWriter
from minivllm.engine.engine import LLMEngine
from minivllm.engine.executor import LocalExecutor
from minivllm.engine.messages import EngineInfo
from minivllm.engine.tokenizer import Tokenizer
from minivllm.errors import InvalidInput, ModelError
from minivllm.families import ModelSpec, parse_config
from minivllm.models.hub import find_model
from minivllm.sampling_params import SamplingParams

# generation_config.json's names of the sampling parameters that it may set, and ours
_DEFAULTS = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens",
}


def build_engine(config: EngineConfig) -> LLMEngine:
    """Find the model, load it, size the KV cache, and connect all parts."""
    files = find_model(config)
    spec = _with_length(parse_config(files.config), config.max_model_len)
    tokenizer = None if files.tokenizer_folder is None else Tokenizer(files.tokenizer_folder)
    eos = _eos_token_ids(files.generation_config, files.config, tokenizer)
    defaults = sampling_defaults(files.generation_config)
    executor = LocalExecutor.from_config(config, spec, files, eos_token_ids=eos)
    try:
        info = EngineInfo(
            model=files.name, model_folder=str(files.folder),
            tokenizer_folder=None if files.tokenizer_folder is None else str(files.tokenizer_folder),
            max_model_len=executor.max_model_len, vocab_size=spec.vocab_size, eos_token_ids=eos, device=str(executor.device),
            dtype=executor.dtype, num_blocks=executor.num_blocks, block_size=config.block_size, generation_config=defaults,
            scheduling_policy=config.scheduling_policy,
        )
        scheduler = _scheduler(config, executor, info)
    except BaseException:
        executor.close()
        raise
    return LLMEngine(
        executor=executor, scheduler=scheduler, tokenizer=tokenizer, info=info, seed=config.seed,
    )


def _scheduler(config: EngineConfig, executor: LocalExecutor, info: EngineInfo) -> Scheduler:
    ahead = executor.overlaps if config.async_scheduling is None else config.async_scheduling
    scheduling = SchedulerConfig(
        num_blocks=executor.num_blocks, block_size=config.block_size, max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=executor.max_num_batched_tokens, max_model_len=executor.max_model_len,
        kv_windows=executor.kv_windows, enable_prefix_caching=config.enable_prefix_caching,
        enable_chunked_prefill=config.enable_chunked_prefill,
        long_prefill_token_threshold=config.long_prefill_token_threshold, policy=config.scheduling_policy,
        max_queue=config.max_queue, planning_depth=int(ahead), num_host_blocks=executor.num_host_blocks,
        eos_token_ids=info.eos_token_ids,
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
            f"max_model_len {wanted} is more than the {spec.max_model_len} positions that the model was made for: lower it",
            "max_model_len",
        )
    return dataclasses.replace(spec, max_model_len=wanted)


def _eos_token_ids(generation: Mapping[str, Any], config: Mapping[str, Any], tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """All EOS ids of a model: chat models have more than one. generation_config.json comes first, then tokenizer, then config.json."""
    found: list[int] = []
    for value in (generation.get("eos_token_id"), tokenizer and tokenizer.eos_token_id, config.get("eos_token_id")):
        ids = value if isinstance(value, list) else [value]
        found += [i for i in ids if isinstance(i, int) and i not in found]
    return tuple(found)


def sampling_defaults(generation: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling parameters that the model's own generation_config.json sets."""
    found = {ours: generation[theirs] for theirs, ours in _DEFAULTS.items() if generation.get(theirs) is not None}
    try:
        SamplingParams(**found)
    except InvalidInput as error:
        raise ModelError(f"the model's generation_config.json is wrong: {error}", "model") from None
    return found
