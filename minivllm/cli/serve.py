"""`minivllm serve [MODEL]`: the OpenAI-compatible server."""
from __future__ import annotations

import argparse
from typing import Any

from minivllm.cli.flags import CommandParser, add_config_file, add_grouped_flags, add_model_argument, build, given
from minivllm.config import TARGET_QUEUE, EngineConfig, ServerConfig
from minivllm.errors import InvalidInput

# Flags by what they are for; the first group is what an owner of one GPU needs. Fields that no group names are in the last one.
GROUPS = {
    "most used": ("host", "port", "api_key", "max_model_len", "gpu_memory_utilization", "served_model_name"),
    "model": ("model", "revision", "tokenizer", "trust_remote_code", "load_format", "dtype", "device", "generation_config", "seed"),
    "chat and tools": ("chat_template", "enable_auto_tool_choice", "tool_call_parser", "reasoning_parser", "trust_request_chat_template"),
    "memory": ("kv_cache_dtype", "kv_cache_memory_bytes", "kv_offloading_size", "cpu_offload_gb", "num_gpu_blocks_override", "block_size",
               "enable_prefix_caching"),
    "scheduling": ("max_num_seqs", "max_num_batched_tokens", "enable_chunked_prefill", "long_prefill_token_threshold", "scheduling_policy",
                   "max_queue", "async_scheduling", "enforce_eager", "cuda_graph_capture"),
    "LoRA adapters": ("enable_lora", "lora_modules", "lora_folders", "max_loras", "max_lora_rank", "max_cpu_loras"),
    "pages of other origins (CORS)": ("allowed_origins", "allowed_methods", "allowed_headers", "allow_credentials"),
}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("serve", help="serve a model over HTTP, OpenAI-compatible", usage="minivllm serve [MODEL] [FLAGS]",
                                 description="Serve a model over HTTP with OpenAI's API.", add_help=False)
    add_model_argument(parser)
    add_flags(parser)


def add_flags(parser: CommandParser) -> None:
    add_grouped_flags(parser, (ServerConfig, EngineConfig), GROUPS, "more")
    group = parser.add_argument_group("this command")
    add_config_file(group)
    if not parser.add_help:  # so that this flag is not the first
        group.add_argument("-h", "--help", action="help", help="show this text and exit")


def run(args: argparse.Namespace) -> int:
    values = given(args, ServerConfig, EngineConfig)
    server, engine = build(ServerConfig, values), build(EngineConfig, values)
    if (server.lora_modules or server.lora_folders) and not engine.enable_lora:  # before the model is loaded
        name = "lora_modules" if server.lora_modules else "lora_folders"
        raise InvalidInput(f"{name} has no effect without enable_lora: give --enable-lora too", name)
    if server.has_replicas and engine.trace is not None:
        raise InvalidInput("trace records one engine of this machine: leave it out, or the replicas", "trace")
    target = TARGET_QUEUE if server.target_queue is None else server.target_queue
    if server.max_replicas is not None and engine.max_queue is not None and target >= engine.max_queue:
        raise InvalidInput(f"no queue is longer than target_queue ({target:g}) with max_queue={engine.max_queue}, so no replica would be "
                           "started: give a smaller target_queue, or a larger max_queue", "target_queue")
    from minivllm.server.run import serve

    return serve(engine, server)
