"""Plans of memory and speed from what the running engine asks too: the weights' methods, the KV cache's layout, the row tables, the graphs.

    config.json ─▶ ModelSpec ─┬▶ resident_weights, KVLayout, graph_bytes, row_bytes      as a start does
    EngineConfig, GPU ────────┘▶ step_peak, context                                      estimates of what a start measures
                               └▶ size_cache ─▶ MemoryPlan, Roofline, the smallest change
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minivllm.config import EngineConfig
from minivllm.errors import InvalidInput, NotSupportedYet
from minivllm.families import ModelSpec, linear_specs
from minivllm.kernels import tuning
from minivllm.lora.layout import AdapterLayout
from minivllm.models.transformers_spec import read_spec
from minivllm.parallel.shard import shard_spec
from minivllm.planning.advice import FEWER_SEQS, FEWER_TOKENS, Change, shorter, smallest_change
from minivllm.planning.gpus import GPU, card_here
from minivllm.planning.memory_plan import MIB, MemoryPlan, step_peak, weights_by_kind
from minivllm.planning.roofline import Roofline, bytes_per_step
from minivllm.planning.weight_offload import WeightOffload, choose_layers
from minivllm.planning.what_if import quantization_config
from minivllm.quantization.base import MethodOf
from minivllm.quantization.dense import DENSE
from minivllm.quantization.kv_cache import kv_format
from minivllm.quantization.methods import METHODS, ONLINE, Methods, ResidentWeight, layer_bytes, method_of, resident_weights
from minivllm.sampling.rejection import DraftProbabilities
from minivllm.sampling.sampler import Sampler
from minivllm.speculative.load import describe_draft
from minivllm.worker.cuda_graphs import can_capture, graph_bytes
from minivllm.worker.device import choose_dtype, dtype_of
from minivllm.worker.kv_cache import KVLayout
from minivllm.worker.memory import CacheSettings, available_host_memory, cpu_budget, row_bytes
from minivllm.worker.worker import sampled_drafts, token_budget

# Estimates of what a start measures: the driver's context and the kernels that are loaded into it, and cuBLAS's workspace, which counts as
# weights in the ledger. 90: on an H200 "other use" was 747 MiB (0.73 GiB) for Qwen3-0.6B's shape and 867 MiB for Mistral-7B's in AWQ.
CONTEXT_BYTES = {80: 450 * MIB, 90: 770 * MIB}  # by architecture; others like 80
WORKSPACE_BYTES = {90: 32 * MIB}  # others: 8 MiB
FP8_ARCH = 89  # from which on GPUs convert fp8 numbers
MOST_UTILIZATION = 0.95  # that is suggested, for a GPU that no other program uses


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """A model on a device with these settings: what it takes, how fast it could be, and what would make it fit."""

    memory: MemoryPlan
    roofline: Roofline | None  # None: the data sheet is not known
    change: tuple[Change, ...] | None  # () if it fits, None if no change of settings helps
    notes: tuple[str, ...] = ()  # what was assumed

    def advice(self) -> str:
        """The verdict, and the smallest change, in one or two sentences."""
        if self.memory.fits:
            return self.memory.verdict()
        if not self.change:
            return f"{self.memory.verdict()}. No setting changes that: use a smaller model or a larger device"
        return f"{self.memory.verdict()}. The smallest change that makes it fit: {', '.join(change.flags for change in self.change)}"


def plan_model(config: EngineConfig, model_config: Mapping[str, Any], gpu: GPU | None, quantization: str | None = None,
               methods: Methods = METHODS) -> ModelPlan:
    """Plan a model. gpu: None for the CPU of this machine. quantization: a storage that its checkpoint does not have, see `what_if`.
    Raises `InvalidInput` for settings that can never be served, and `ModelError` for a model that cannot run here."""
    stored = (model_config.get("quantization_config") or {}).get("quant_method")
    if quantization in ONLINE and stored is None:  # no what-if: a start can do it
        config, quantization = dataclasses.replace(config, quantization=quantization), None
    elif quantization is not None and stored is not None:
        raise InvalidInput(f"quantization is {quantization!r}, but the checkpoint is stored as {stored!r}: leave quantization out, or plan "
                           "the unquantized checkpoint", "quantization")
    planner = _Planner(config, model_config, gpu, methods)
    if planner.spec.parameters and quantization is not None:
        raise NotSupportedYet(f"quantization {quantization!r}: {planner.spec.architecture} runs in Transformers' code, unquantized only: "
                              "leave it out", "quantization")
    found = planner.evaluate([] if quantization is None else [Change("", quantization=quantization)])
    change = () if found.fits else planner.smallest_change(found, quantization)
    notes = [] if quantization is None else [f"what if: weights stored as {quantization}, as its usual tools store them"]
    if planner.spec.parameters:
        notes.append(f"{planner.spec.architecture} runs in Transformers' code: no CUDA graphs, and its times are not predicted")
    if config.tensor_parallel_size > 1:
        notes.append("the figures are those of one rank; predicted times are without the exchange between ranks")
    return ModelPlan(memory=found, roofline=planner.roofline(quantization), change=change, notes=tuple(notes))


def check_settings(config: EngineConfig) -> Callable[[Mapping[str, Any]], object]:
    """A check for `describe_model`: raises for a model that cannot run here, or not with these settings."""
    return lambda found: _Planner(config, found, None)


def slot_bytes(config: EngineConfig, spec: ModelSpec, dtype: torch.dtype) -> int:
    """Device memory for LoRA adapters."""
    return AdapterLayout.of(spec, config.max_lora_rank).num_bytes(config.max_loras, dtype.itemsize) if config.enable_lora else 0


def gpu_here() -> GPU | None:
    """This machine's card."""
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.current_device()
    major, minor = torch.cuda.get_device_capability(device)
    return card_here(torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1], 10 * major + minor)


class _Planner:
    """One model and device; `evaluate` plans it with changed settings."""

    def __init__(self, config: EngineConfig, model_config: Mapping[str, Any], gpu: GPU | None, methods: Methods = METHODS) -> None:
        self.config, self.model_config, self.gpu, self.methods = config, model_config, gpu, methods
        self.num_ranks = config.tensor_parallel_size
        self.spec = shard_spec(read_spec(config, model_config, methods), self.num_ranks)  # the plan is for one GPU of several
        self.dtype = self._dtype()
        self.draft = describe_draft(config, self.spec)
        if config.max_model_len is not None and config.max_model_len > self.spec.max_model_len:
            raise InvalidInput(f"max_model_len {config.max_model_len} exceeds the model's context length of {self.spec.max_model_len} "
                               "tokens: lower it", "max_model_len")
        if config.kv_cache_dtype == "fp8" and gpu is not None and gpu.arch < FP8_ARCH:
            raise InvalidInput(f"kv_cache_dtype 'fp8' needs a GPU of compute capability 8.9 or later, and {gpu.title} has "
                               f"{gpu.arch / 10:g}: use 'int8', which is as small", "kv_cache_dtype")

    def _dtype(self) -> torch.dtype:
        """As `choose_dtype` on that device."""
        if self.config.dtype != "auto":
            return dtype_of(self.config.dtype)
        if self.gpu is None:
            return choose_dtype("auto", self.spec.dtype, torch.device("cpu"))
        return torch.float16 if self.spec.dtype == "float16" or self.gpu.arch < 80 else torch.bfloat16

    def weights(self, config: EngineConfig, quantization: str | None) -> list[ResidentWeight]:
        """The loaded weights, in the checkpoint's storage or in another one."""
        return list(resident_weights(self.spec, self._method(config, quantization), self.dtype.itemsize, self.gpu is not None))

    def _method(self, config: EngineConfig, quantization: str | None) -> MethodOf:
        if quantization is None:
            return method_of(self.model_config, self.methods, config.quantization)
        return method_of({"quantization_config": quantization_config(quantization, self.spec, self.methods)}, self.methods)

    def evaluate(self, changes: Sequence[Change]) -> MemoryPlan:
        """The plan with these changes."""
        settings = {name: value for change in changes for name, value in change.settings.items()}
        config = dataclasses.replace(self.config, **settings)
        spec = dataclasses.replace(self.spec, max_model_len=config.max_model_len or self.spec.max_model_len)
        quantization = next((change.quantization for change in changes if change.quantization), None)
        weights = weights_by_kind(self.weights(config, quantization), str(self.dtype).removeprefix("torch."))
        if config.enable_lora:
            weights["LoRA slots", str(self.dtype).removeprefix("torch.")] = slot_bytes(config, spec, self.dtype)
        budget = token_budget(config, spec.max_model_len, torch.device("cpu" if self.gpu is None else "cuda"))
        if self.draft is not None:
            weights["draft", str(self.dtype).removeprefix("torch.")] = self.draft.weight_bytes(self.dtype.itemsize, self.gpu is not None)
        layout = KVLayout.of(spec, config.block_size, self.dtype, kv_format(config.kv_cache_dtype),
                             None if self.draft is None else self.draft.spec)
        request = CacheSettings.of(config, spec.max_model_len, budget)
        parts: dict[str, int] = {}
        offloaded = self._offload(config, quantization).saved_bytes
        if self.gpu is None:
            total = usable = available_host_memory() // self.num_ranks
            num_bytes = cpu_budget(request, layout, sum(weights.values()), max(0, usable - sum(weights.values()))).num_bytes
        else:
            total = self.gpu.memory
            usable = int(config.gpu_memory_utilization * total)
            parts = self._parts(config, spec, layout, budget, self._unpacked(config, quantization))
            num_bytes = usable - sum(weights.values()) + offloaded - sum(parts.values())
        num_blocks = request.num_blocks or max(request.cache_bytes or num_bytes, 0) // layout.block_bytes
        return MemoryPlan(
            device=self._device(), total=total, usable=usable, weights=weights, offloaded=offloaded,
            **parts, dtype=str(self.dtype).removeprefix("torch."), kv_dtype=str(layout.dtype).removeprefix("torch."),
            block_bytes=layout.block_bytes, block_size=config.block_size, num_blocks=num_blocks,
            windows=layout.windows, chunk=request.chunk, max_model_len=spec.max_model_len,
            length_is_explicit=config.max_model_len is not None)

    def _device(self) -> str:
        name = "CPU" if self.gpu is None else self.gpu.title
        return name if self.num_ranks == 1 else f"each of {self.num_ranks} x {name}"

    def _offload(self, config: EngineConfig, quantization: str | None) -> WeightOffload:
        """The layers in host memory. (A start also checks that this memory is large enough.)"""
        if config.cpu_offload_gb and self.gpu is None:
            raise InvalidInput(f"cpu_offload_gb is {config.cpu_offload_gb:g}, and the plan is for a CPU: leave it out", "cpu_offload_gb")
        sizes = layer_bytes(self.spec, self._method(config, quantization), self.dtype.itemsize, self.gpu is not None)
        return choose_layers(sizes, config.cpu_offload_gb)

    def _unpacked(self, config: EngineConfig, quantization: str | None) -> int:
        """Bytes of the largest piece of a packed weight that a prompt's products unpack."""
        method = self._method(config, quantization)
        sizes = [sum(linear.rows) * linear.cols for linear in linear_specs(self.spec).values() if method(linear) is not DENSE]
        return min(max(sizes, default=0), tuning.UNPACK_ELEMENTS) * self.dtype.itemsize

    def _ordered(self, config: EngineConfig, spec: ModelSpec, budget: int) -> int:
        """Bytes of the workspace of `kernels/triton/gathered_prompts.py`, if the model uses it."""
        sizes = [a.kv_size for a in (layer.attention for layer in spec.layers) if a.head_dim in (64, 128) and a.window is None
                 and a.softcap is None and a.alibi is None and not a.sinks and self.dtype.itemsize == 2]
        chunks = ((size, *tuning.filling_chunks(budget, spec.max_model_len, config.max_num_seqs, size)) for size in set(sizes))
        return max((min(tuning.WORKSPACE_BYTES, 4 * size * seqs * keys) for size, seqs, keys in chunks), default=0)

    def _parts(self, config: EngineConfig, spec: ModelSpec, layout: KVLayout, budget: int, unpacked: int) -> dict[str, int]:
        """Bytes on a GPU beside weights and cache."""
        assert self.gpu is not None
        arch, sampled = self.gpu.arch // 10 * 10, sampled_drafts(config.speculation)
        return {
            "step": step_peak(spec, self.dtype.itemsize, budget, spec.max_model_len, config.max_num_seqs,
                              Sampler.peak_bytes(spec.vocab_size, self.dtype.itemsize), unpacked,
                              self._ordered(config, spec, budget) if arch == 90 else 0)
            + DraftProbabilities.peak_bytes(config.max_num_seqs, sampled, spec.vocab_size),
            "graphs": 0 if config.enforce_eager or not can_capture(spec, layout) else
            graph_bytes(spec, config.max_num_seqs, budget, config.enable_lora),
            "rows": row_bytes(layout, config.max_num_seqs, spec.max_model_len, spec.vocab_size, sampled),
            "other": CONTEXT_BYTES.get(arch, CONTEXT_BYTES[80]) + WORKSPACE_BYTES.get(arch, 8 * MIB),
        }

    def smallest_change(self, found: MemoryPlan, quantization: str | None) -> tuple[Change, ...] | None:
        """What makes a plan fit that does not."""
        config, gpu = self.config, self.gpu
        given = [] if quantization is None else [Change("", quantization=quantization)]
        recent = gpu is None or gpu.arch >= FP8_ARCH
        keeping: list[Change] = []
        if config.kv_cache_dtype == "auto" and all(layer.attention.latent is None for layer in self.spec.layers):
            kind = "fp8" if recent else "int8"
            keeping.append(Change(f"--kv-cache-dtype {kind}", {"kv_cache_dtype": kind}))
        if config.max_model_len is not None:
            length = shorter(found) or shorter(self.evaluate([*given, *keeping]))
            keeping += [] if length is None else [length]
        if gpu is not None and (config.max_num_seqs > FEWER_SEQS or (config.max_num_batched_tokens or math.inf) > FEWER_TOKENS):
            seqs, tokens = min(config.max_num_seqs, FEWER_SEQS), min(config.max_num_batched_tokens or FEWER_TOKENS, FEWER_TOKENS)
            keeping.append(Change(f"--max-num-seqs {seqs} --max-num-batched-tokens {tokens}",
                                  {"max_num_seqs": seqs, "max_num_batched_tokens": tokens}))
        if gpu is not None and not config.enforce_eager:
            keeping.append(Change("--enforce-eager", {"enforce_eager": True}))
        if gpu is not None and config.gpu_memory_utilization < MOST_UTILIZATION:
            keeping.append(Change(f"--gpu-memory-utilization {MOST_UTILIZATION}", {"gpu_memory_utilization": MOST_UTILIZATION}))
        smaller: list[Change] = []
        if quantization is None and config.quantization is None and not self.model_config.get("quantization_config"):
            kind = "fp8" if recent else "int8"
            smaller = [Change(f"--quantization {kind}", {"quantization": kind}),
                       Change("a 4-bit AWQ or GPTQ checkpoint of this model", quantization="awq"),
                       Change("a Q4_K_M GGUF file of this model", quantization="Q4_K_M")]
        return smallest_change(lambda changes: self.evaluate([*given, *changes]), keeping, smaller, offload=gpu is not None)

    def roofline(self, quantization: str | None) -> Roofline | None:
        """Predictions for the model as it is, if the card's data sheet and the model's layers are known."""
        if self.spec.parameters or self.gpu is None or self.gpu.bandwidth is None or self.gpu.tflops is None:
            return None
        layout = KVLayout.of(self.spec, self.config.block_size, self.dtype, kv_format(self.config.kv_cache_dtype))
        stored = (self.model_config.get("quantization_config") or {}).get("quant_method")
        weights = self.weights(self.config, quantization)
        return Roofline(self.spec, self.gpu, bytes_per_step(self.spec, weights), layout.token_bytes,
                        token_budget(self.config, self.spec.max_model_len, torch.device("cuda")),
                        fp8="fp8" in (quantization, self.config.quantization, stored),
                        streamed=self._offload(self.config, quantization).step_bytes,
                        expert_bytes=sum(w.num_bytes for w in weights if ".experts_" in w.name))
