"""vLLM's engine and server settings that are not fields of this project's configs. Each is a keyword and a flag.

    refused   it would change the output or the machine's use, and is not built: an error names it
    inert     it cannot change the output: accepted, and one line says that it has no effect
    neutral   a value that requests nothing, such as pipeline_parallel_size=1: accepted without a line

`None` is neutral for every setting, as in vLLM, where it means "the default".
"""
from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from minivllm.errors import InvalidInput, NotSupportedYet, nearest


@dataclass(frozen=True, slots=True)
class VllmSetting:
    """A setting that exists in vLLM only."""

    name: str
    built: bool  # False: refused unless the value is neutral. True: inert
    why: str  # the missing feature, or why the setting has no effect
    default: Any = None  # vLLM's default; a bool makes the flag a switch (--name, --no-name)
    neutral: tuple[Any, ...] = ()  # further values that request nothing

    def is_neutral(self, value: Any) -> bool:
        if value is None or value in ("", "None", [], {}, ()):
            return True
        return any(type(value) is type(other) and value == other for other in (self.default, *self.neutral)) or (
            _is_number(value) and any(_is_number(other) and value == other for other in (self.default, *self.neutral)))

    def line(self, value: Any) -> str:
        """What is printed for a value of an inert setting that is not neutral."""
        return f"{self.name}={value!r} has no effect: {self.why}"

    def error(self, value: Any) -> NotSupportedYet:
        fix = "leave it out" if self.default in (None, False) else f"leave it out, or give {self.default!r}"
        return NotSupportedYet(f"{self.name}={value!r} ({self.why}) is not supported yet: {fix}", self.name)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _refused(why: str, **settings: Any) -> list[VllmSetting]:
    """Settings of one feature that is not built. A value is vLLM's default, or a tuple of it and further neutral values."""
    return [_setting(name, False, why, value) for name, value in settings.items()]


def _inert(why: str, **settings: Any) -> list[VllmSetting]:
    return [_setting(name, True, why, value) for name, value in settings.items()]


def _setting(name: str, built: bool, why: str, value: Any) -> VllmSetting:
    default, *neutral = value if isinstance(value, tuple) else (value,)
    return VllmSetting(name, built, why, default, tuple(neutral))


ENGINE_SETTINGS: tuple[VllmSetting, ...] = (
    *_refused("quantization='bitsandbytes' quantizes to 4 bits, 'int8' to 8", load_in_4bit=False, load_in_8bit=False),
    *_refused("KV scales from a file, and a KV cache with several dtypes", quantization_param_path=None, kv_cache_dtype_skip_layers=None),
    *_inert("each token of a quantized KV cache has its own scales", calculate_kv_scales=False),
    *_refused("context parallelism", decode_context_parallel_size=1, prefill_context_parallel_size=1),
    *_refused("several machines", nnodes=1, node_rank=0, master_addr=(None, "127.0.0.1"), master_port=(None, 29501), headless=False),
    *_refused("pipeline parallelism", pipeline_parallel_size=1),
    *_refused("replicas on other machines", data_parallel_size_local=(None, 1), data_parallel_rank=(None, 0),
              data_parallel_start_rank=(None, 0), data_parallel_hybrid_lb=False, data_parallel_external_lb=False),
    *_refused("expert parallelism", enable_expert_parallel=False, enable_eplb=False, eplb_config=None, num_redundant_experts=0,
              all2all_backend=None, enable_dbo=False),
    *_refused("LoRA adapters that depend on images or audio, or on the context length", default_mm_loras=None,
              long_lora_scaling_factors=None),
    *_inert("LoRA adapters have the model's dtype, and none adds tokens", lora_dtype="auto", lora_extra_vocab_size=256),
    *_inert("each rank has the parts of an adapter that belong to its parts of the model", fully_sharded_loras=False),
    *_refused("another length limit for the draft", speculative_max_model_len=None),
    *_refused("tensor parallelism of a draft", speculative_draft_tensor_parallel_size=(None, 1)),
    *_inert("there is one implementation of speculative decoding", use_v2_spec_decode=False),
    *_refused("prompt adapters", enable_prompt_adapter=False, max_prompt_adapters=(1, 0), max_prompt_adapter_token=0,
              qlora_adapter_name_or_path=None),
    *_refused("state-space models", mamba_cache_dtype="auto", mamba_ssm_cache_dtype="auto", mamba_block_size=None, mamba_cache_mode=None),
    *_refused("sharing of KV between layers", kv_sharing_fast_prefill=False),
    *_refused("other ways to keep weights in host memory", offload_backend=(None, "auto", "prefetch"), offload_group_size=0,
              offload_params=None),
    *_refused("sleep mode", enable_sleep_mode=False),
    *_refused("prompts as embeddings", enable_prompt_embeds=False),
    *_refused("Python logits processors", logits_processors=None, logits_processor_pattern=None),
    *_refused("weights that another program sends", weight_transfer_config=None),
    *_refused("KV transfer between engines", kv_transfer_config=None, kv_events_config=None, ec_transfer_config=None),
    *_refused("a scheduler or worker from a class name", scheduler_cls=(None, "vllm.v1.core.sched.scheduler.Scheduler"), worker_cls="auto",
              worker_extension_cls=None),
    *_refused("OpenTelemetry traces", otlp_traces_endpoint=None, collect_detailed_traces=None),
    *_refused("full attention in place of a sliding window", disable_sliding_window=False),
    *_refused("other kinds of logprobs", logprobs_mode=("raw_logprobs", "default")),
    *_refused("another format of config.json", config_format=("auto", "hf"), hf_config_path=None),
    *_refused("tasks other than text generation and embeddings", task=("auto", "generate", "embed", "embedding"),
              runner=("auto", "generate", "pooling"), convert=("auto", "none", "embed")),
    *_refused("another tokenizer", tokenizer_mode=("auto", "slow", "hf")),
    *_inert("with trust_remote_code, code is run from the model's own folder, at its revision", code_revision=None),
    *_inert("host memory for KV blocks is set with kv_offloading_size", swap_space=(4, 0), kv_offloading_backend="native"),
    *_inert("a preempted request is swapped out if host blocks are free, and else recomputed", preemption_mode=None),
    *_inert("nothing is compiled by torch.compile here", compilation_config=None, optimization_level=(2, 0), cudagraph_capture_sizes=None,
            max_cudagraph_capture_size=None, cuda_graph_sizes=None, max_seq_len_to_capture=8192, max_context_len_to_capture=None,
            performance_mode="balanced", additional_config=None, kernel_config=None, enable_flashinfer_autotune=False, moe_backend="auto"),
    *_inert("there is one attention backend for each device", attention_backend=None, attention_config=None, disable_cascade_attn=False),
    *_inert("one block manager serves every kind of layer", use_v2_block_manager=True, disable_hybrid_kv_cache_manager=False),
    *_inert("this engine takes text only", limit_mm_per_prompt=None, mm_processor_kwargs=None, allowed_local_media_path="",
            allowed_media_domains=None, mm_processor_cache_type=None, mm_encoder_attn_backend=None, video_pruning_rate=None,
            image_input_type=None, io_processor_plugin=None, disable_mm_preprocessor_cache=False,
            mm_processor_cache_gb=4, mm_encoder_tp_mode="weights", media_io_kwargs=None, enable_mm_embeds=False,
            interleave_mm_strings=False, skip_mm_profiling=False, language_model_only=False, disable_chunked_mm_input=False),
    *_inert("metrics are at /metrics and in LLM.get_metrics()", disable_log_stats=False, show_hidden_metrics_for_version=None,
            kv_cache_metrics=False, cudagraph_metrics=False, aggregate_engine_logging=False),
    *_inert("the server logs one line per request with access_log", disable_log_requests=False, enable_log_requests=False),
    *_inert("ranks are processes of one machine", distributed_executor_backend=(None, "mp", "uni", "ray"), worker_use_ray=False,
            engine_use_ray=False, ray_workers_use_nsight=False, max_parallel_loading_workers=None, disable_custom_all_reduce=False,
            data_parallel_address=None, data_parallel_rpc_port=None, distributed_timeout_seconds=None),
    *_inert("it has no counterpart in this engine's loader", model_loader_extra_config=None, ignore_patterns=None, use_tqdm_on_load=True,
            pt_load_map_location="cpu", safetensors_load_strategy=None),
    *_inert("it has no counterpart in this engine's scheduler", num_scheduler_steps=1, multi_step_stream_outputs=True,
            num_lookahead_slots=0, scheduler_delay_factor=0.0, max_num_partial_prefills=1, max_long_partial_prefills=1, stream_interval=1,
            disable_async_output_proc=False, prefix_caching_hash_algo=("sha256", "builtin"), max_paddings=None,
            tokenizer_pool_size=0, tokenizer_pool_type="ray", tokenizer_pool_extra_config=None),
    *_inert("grammars are compiled by llguidance", guided_decoding_backend=("auto", "guidance"), guided_decoding_disable_fallback=False,
            guided_decoding_disable_additional_properties=False),
    *_refused("JSON without whitespace for every request; a request can set disable_any_whitespace",
              guided_decoding_disable_any_whitespace=False),
    *_refused("settings of grammars for every request", structured_outputs_config=(
        None, {"backend": "auto"}, {"backend": "guidance"}, {"backend": "xgrammar"}, {"backend": "outlines"})),
    *_inert("LLM.start_profile writes into VLLM_TORCH_PROFILER_DIR", profiler_config=None),
    *_inert("it is for other hardware", override_neuron_config=None, override_attention_dtype=None),
)

SERVER_SETTINGS: tuple[VllmSetting, ...] = (
    *_inert("prompts and outputs are not logged", max_log_len=None, enable_log_outputs=False, enable_log_deltas=True),
    *_inert("use engine_process", disable_frontend_multiprocessing=False),
    *_inert("one process serves HTTP", api_server_count=1),
    *_inert("the form that a chat template takes is found by rendering it", chat_template_content_format=("auto", "string", "openai")),
    *_inert("a model never sees the tools of a request with tool_choice none", exclude_tools_when_tool_choice_none=False),
    *_inert("use drain_timeout", shutdown_timeout=0),
    *_refused("gRPC", grpc=False),
    *_inert("/docs shows no outside page", disable_fastapi_docs=False, enable_offline_docs=False),
    *_inert("the fingerprint names the version and the settings", fingerprint_mode="full", fingerprint_value=None),
    *_inert("each request is logged in one line", disable_access_log_for_endpoints=None, log_error_stack=False),
    *_refused("usage in every stream", enable_force_include_usage=False),
    *_refused("the tokenizer's settings at /tokenizer_info", enable_tokenizer_info_endpoint=False),
    *_refused("a server that takes token ids only", tokens_only=False),
    *_inert("use reasoning_parser", enable_reasoning=False),
    *_inert("it is always on", enable_prompt_tokens_details=False, enable_server_load_tracking=False, enable_request_id_headers=False),
    *_inert("bounds of the HTTP parser are fixed", h11_max_incomplete_event_size=None, h11_max_header_count=None),
    *_refused("another role than assistant", response_role="assistant"),
    *_refused("token ids in place of token texts", return_tokens_as_token_ids=False),
    *_refused("ASGI middleware from a class name", middleware=None),
    *_refused("parsers from a file", tool_parser_plugin="", reasoning_parser_plugin=None),
    *_refused("tools that the server runs", tool_server=None),
    *_refused("a logging configuration file", log_config_file=None),
    *_refused("client certificates", ssl_ca_certs=None, ssl_cert_reqs=0, enable_ssl_refresh=False, ssl_ciphers=None),
)

# Settings of the server that vLLM's `LLM` accepts too.
LLM_SETTINGS: tuple[VllmSetting, ...] = (
    *_inert("it is a setting of the server", served_model_name=None, reasoning_parser="", tool_call_parser=None,
            enable_auto_tool_choice=False),
    *_refused("replicas are for minivllm serve", data_parallel_size=1),
)
# Methods of vLLM's `LLM`, `LLMEngine` and `AsyncLLM` for features that are not built.
LLM_METHODS: Mapping[str, str] = {
    "classify": "classification models", "reward": "reward models",
    "sleep": "sleep mode", "wake_up": "sleep mode", "collective_rpc": "calls to several workers",
    "apply_model": "functions that run inside a worker",
    "pin_lora": "LoRA adapters that never leave the device",
    "pause_generation": "pausing", "resume_generation": "pausing", "add_request": "streams that are not read with generate",
    "set_tokenizer": "another tokenizer after the start; use the keyword tokenizer", "enqueue_chat": "chats that wait; use chat",
    "init_weight_transfer_engine": "weight updates", "update_weights": "weight updates",
}


@dataclass(frozen=True, slots=True)
class Alias:
    """vLLM's name of a setting of this project."""

    name: str
    here: str
    negated: bool = False  # a switch that turns the other one off
    key: str = ""  # the value is one entry of the setting `here`, which is a dict


ENGINE_ALIASES = (
    Alias("rope_scaling", "hf_overrides", key="rope_scaling"), Alias("rope_theta", "hf_overrides", key="rope_theta"),
    Alias("speculative_model", "speculative_config", key="model"),
    Alias("num_speculative_tokens", "speculative_config", key="num_speculative_tokens"),
    Alias("ngram_prompt_lookup_max", "speculative_config", key="prompt_lookup_max"),
    Alias("ngram_prompt_lookup_min", "speculative_config", key="prompt_lookup_min"),
    Alias("speculative_disable_by_batch_size", "speculative_config", key="disable_by_batch_size"),
    Alias("override_pooler_config", "pooler_config"))
SERVER_ALIASES = (Alias("uvicorn_log_level", "log_level"), Alias("disable_uvicorn_access_log", "access_log", negated=True))

# Other spellings of values of this project's settings.
VALUES: Mapping[str, Mapping[Any, Any]] = {
    "dtype": {"half": "float16", "float": "float32"},
    "kv_cache_dtype": {"fp8_e4m3": "fp8", "q8_0": "int8", "f16": "float16", "bf16": "bfloat16", "f32": "float32"},  # also llama.cpp's
    "max_model_len": {-1: None, "-1": None, "auto": None},
    "load_format": {"pt": "auto", "hf": "auto", "bitsandbytes": "auto"},
    "quantization": {
        "awq_marlin": "awq", "bitsandbytes-nf4": "bitsandbytes", "compressed_tensors": "compressed-tensors", "gptq_marlin": "gptq",
        "none": None, "None": None, "ptpc_fp8": "fp8",
    },
    "uvicorn_log_level": {"critical": "error", "trace": "debug"},
}
SHORT_FLAGS: Mapping[str, tuple[str, ...]] = {
    "tensor_parallel_size": ("-tp",), "pipeline_parallel_size": ("-pp",), "data_parallel_size": ("-dp",), "quantization": ("-q",),
    "optimization_level": ("-O",), "compilation_config": ("-cc",), "nnodes": ("-n",), "attention_config": ("-ac",),
    "api_server_count": ("-asc",), "enable_expert_parallel": ("-ep",), "speculative_config": ("-sc",), "node_rank": ("-r",),
    "data_parallel_size_local": ("-dpl",), "data_parallel_address": ("-dpa",), "data_parallel_rpc_port": ("-dpp",),
    "data_parallel_backend": ("-dpb",), "data_parallel_rank": ("-dpn",), "data_parallel_start_rank": ("-dpr",),
    "decode_context_parallel_size": ("-dcp",),
}
LIST_FLAGS = ("middleware", "cudagraph_capture_sizes", "cuda_graph_sizes", "logits_processors")  # take several values
_SETTINGS: Mapping[str, VllmSetting] = {setting.name: setting for setting in (*ENGINE_SETTINGS, *SERVER_SETTINGS, *LLM_SETTINGS)}
_ALIASES: Mapping[str, Alias] = {alias.name: alias for alias in (*ENGINE_ALIASES, *SERVER_ALIASES)}
VLLM_NAMES = frozenset(_SETTINGS) | frozenset(_ALIASES)


class UnbuiltMethods:
    """vLLM's methods for features that are not built: calling one raises `NotSupportedYet`."""

    def __getattr__(self, name: str) -> Any:
        if name not in LLM_METHODS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{nearest(name, vars(type(self)))}")

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise NotSupportedYet(f"{type(self).__name__}.{name} ({LLM_METHODS[name]}) is not supported yet", name)

        return refuse


def translate(values: Mapping[str, Any], known: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """`values` by this project's names, without vLLM's own settings, and a line for each of these that has no effect.

    Raises `NotSupportedYet` for a refused setting. A name that neither side knows is kept, so that the caller reports it.
    known: names of this project's settings, which have precedence.
    """
    kept: dict[str, Any] = {}
    lines = []
    for name, given in values.items():
        value = _spelled_here(name, given)
        alias, setting = (None, None) if name in known else (_ALIASES.get(name), _SETTINGS.get(name))
        if alias is not None and value is not None:
            _add_aliased(kept, alias, value, values)
        elif setting is not None and not setting.is_neutral(value):
            if not setting.built:
                raise setting.error(value)
            lines.append(setting.line(value))
        elif alias is None and setting is None and name not in kept:
            kept[name] = value
    return kept, lines


def _add_aliased(kept: dict[str, Any], alias: Alias, value: Any, values: Mapping[str, Any]) -> None:
    other = kept.get(alias.here, values.get(alias.here))
    if alias.key:
        kept[alias.here] = {alias.key: value, **(other or {})}
        return
    value = not value if alias.negated else value
    if other not in (None, value):
        raise InvalidInput(f"{alias.name}={value!r} contradicts {alias.here}={other!r}: give one of them", alias.name)
    kept[alias.here] = value


def _spelled_here(name: str, value: Any) -> Any:
    if name == "dtype" and type(value).__name__ == "dtype":  # torch.bfloat16; this module does not import torch
        value = str(value).removeprefix("torch.")
    try:
        return VALUES.get(name, {}).get(value, value)
    except TypeError:  # not hashable
        return value
