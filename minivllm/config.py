"""What a user may set, as frozen dataclasses: input only, checked on construction, never filled in later.

Command-line flags, their help texts and defaults, and `LLM(...)`'s keywords are all generated from the fields below, so they
cannot drift apart. Derived values (how many KV blocks fit, the dtype that "auto" became) live with whoever derives them.
"""
from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from minivllm.errors import InvalidInput, NotSupportedYet, nearest

# Names vLLM users know that are not built yet: refused by name, absent from the help.
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
    """A config field with what the command line needs to know about it."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "metavar": metavar})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of one engine. Raises `InvalidInput` naming the field, the value and what is allowed."""

    model: str | None = option(None, "folder, .gguf file or hub id; the embedded SmolLM2-135M-Instruct if left out")
    tokenizer: str | None = option(None, "folder or hub id of the tokenizer, if not the model's own")
    skip_tokenizer_init: bool = option(False, "no tokenizer: prompts are token ids and no text comes out")
    revision: str | None = option(None, "branch, tag or commit of a hub id")
    load_format: str = option("auto", "where weights come from; dummy: random ones", choices=("auto", "safetensors", "gguf", "dummy"))
    dtype: str = option("auto", "of weights and activations; auto: the checkpoint's on a GPU, bfloat16 or float32 on a CPU, whichever is faster there",
                        choices=("auto", "float32", "bfloat16", "float16"))
    device: str = option("auto", "auto: the GPU if there is one", choices=("auto", "cpu", "cuda"))
    seed: int = option(0, "of dummy weights and of requests that bring no seed")
    max_model_len: int | None = option(None, "longest prompt + output, in tokens; the model's own limit if left out, lowered to what the KV cache holds")
    block_size: int = option(16, "tokens per KV block, 1 to 256")
    gpu_memory_utilization: float = option(0.9, "fraction of the GPU's memory for weights, activations and KV cache together")
    kv_cache_memory_bytes: int | None = option(None, "bytes of KV cache; derived from gpu_memory_utilization (GPU) or the model's size (CPU) if left out")
    num_gpu_blocks_override: int | None = option(None, "number of KV blocks, instead of measuring what fits")
    max_num_seqs: int = option(256, "most sequences in one step")
    max_num_batched_tokens: int | None = option(None, "token budget of one step; long prompts are computed in chunks of at most this; 8192 on a GPU, 2048 on a CPU")
    enable_prefix_caching: bool = option(True, "share KV blocks between requests that start with the same tokens")
    enable_chunked_prefill: bool = option(True, "let a prompt be computed in several steps; off: a prompt waits until it fits one step")
    long_prefill_token_threshold: int = option(0, "most tokens of one prompt in one step, so that others keep their pace; 0: only the budget limits it")
    scheduling_policy: str = option("fcfs", "fcfs: by arrival; priority: by the request's priority (lower first), then arrival", choices=("fcfs", "priority"))
    enforce_eager: bool = option(False, "on a GPU: launch every kernel from Python instead of replaying CUDA graphs of decode steps")
    async_scheduling: bool | None = option(None, "plan and launch the next step while this one runs; left out: on a GPU, whose host is free meanwhile")
    kv_offloading_size: float = option(0.0, "GiB of host memory for KV blocks that the device has no room for")
    max_queue: int | None = option(None, "most requests waiting; one more is refused")
    trace: str | None = option(None, "file to record every plan and result in, as JSON lines", metavar="FILE")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            choices = f.metadata.get("choices")
            if choices and value not in choices:
                raise InvalidInput(f"{f.name} must be one of {', '.join(choices)}, got {value!r}{nearest(str(value), choices)}", f.name)
            if (f.type == "bool" or (f.type == "bool | None" and value is not None)) and not isinstance(value, bool):
                raise InvalidInput(f"{f.name} must be True or False, got {value!r}", f.name)
            if f.type in ("int", "int | None") and value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise InvalidInput(f"{f.name} must be a whole number, got {value!r}", f.name)
            if f.type == "float" and (isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)):
                raise InvalidInput(f"{f.name} must be a finite number, got {value!r}", f.name)
        self._between("block_size", 1, 256)
        self._between("max_num_seqs", 1, 65536)
        self._between("long_prefill_token_threshold", 0, None)
        self._between("kv_offloading_size", 0, None)
        for name in ("max_model_len", "max_num_batched_tokens", "kv_cache_memory_bytes", "max_queue"):
            self._between(name, 1, None)
        self._between("num_gpu_blocks_override", 2, None)  # one is the null block
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise InvalidInput(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}", "gpu_memory_utilization")

    def _between(self, name: str, low: float, high: float | None) -> None:
        value = getattr(self, name)
        if value is not None and (value < low or (high is not None and value > high)):
            span = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
            raise InvalidInput(f"{name} must be {span}, got {value}", name)

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineConfig:
        """Like the constructor, but an unknown name gets a `TypeError` with the nearest known one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in kwargs:
            if name in NOT_YET:
                raise NotSupportedYet(f"{name} ({NOT_YET[name]}) is not supported yet: leave it out", name)
            if name not in known:
                raise TypeError(f"unknown keyword {name!r}{nearest(name, known)}")
        return cls(**kwargs)
