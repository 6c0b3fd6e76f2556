"""Spellings that users of other programs expect: flags and commands of llama.cpp, Ollama, SGLang, TGI and Transformers, as data.

vLLM's own flags are in `minivllm/compat/settings.py`. A name that this project has itself is never replaced.
"""
from __future__ import annotations

from collections.abc import Mapping

# Another program's flag, with the same meaning and the same value -> the flag here. It counts only for a command that has this flag.
FLAGS: Mapping[str, str] = {
    **dict.fromkeys(("-m", "--model-path", "--model-id", "--model-name", "-hf", "--hf-repo"), "--model"),
    **dict.fromkeys(("-c", "--ctx-size", "--num-ctx", "--n-ctx", "--context-length", "--context-size", "--max-total-tokens",
                     "--max-seq-len"), "--max-model-len"),
    **dict.fromkeys(("-n", "--n-predict", "--num-predict", "--predict", "--max-new-tokens", "--max-output-tokens"), "--max-tokens"),
    **dict.fromkeys(("-np", "--parallel", "--max-running-requests", "--max-batch-size"), "--max-num-seqs"),
    **dict.fromkeys(("-b", "--chunked-prefill-size", "--max-batch-prefill-tokens"), "--max-num-batched-tokens"),
    **dict.fromkeys(("--mem-fraction-static", "--cuda-memory-fraction", "--gpu-memory-fraction", "--gpu-mem-utilization"),
                    "--gpu-memory-utilization"),
    **dict.fromkeys(("--tp", "--tp-size", "--tensor-parallel", "--num-shard", "--num-gpus"), "--tensor-parallel-size"),
    **dict.fromkeys(("--torch-dtype", "--precision"), "--dtype"),
    **dict.fromkeys(("-a", "--alias"), "--served-model-name"),
    **dict.fromkeys(("--cache-dir", "--hf-cache", "--models-dir"), "--download-dir"),
    **dict.fromkeys(("-sys", "--system-prompt", "--system-message"), "--system"),
    **dict.fromkeys(("--base-url", "--api-base", "--server"), "--url"),
    "--quantize": "--quantization", "--chat-template-file": "--chat-template", "--temp": "--temperature", "--token": "--hf-token",
    "--repeat-penalty": "--repetition-penalty", "--listen": "--host", "--hostname": "--host", "--verbosity": "--log-level",
    "--loglevel": "--log-level", "--key": "--api-key", "--kv-cache-type": "--kv-cache-dtype",
}
# Two flags of another program whose values must be equal, because one flag here has both meanings: (names of each) -> the flag here.
PAIRS: Mapping[tuple[tuple[str, ...], tuple[str, ...]], str] = {
    (("-ctk", "--cache-type-k"), ("-ctv", "--cache-type-v")): "--kv-cache-dtype",
}
# Another program's flag without a counterpart -> what to do instead.
FLAG_HINTS: Mapping[str, str] = {
    **dict.fromkeys(("-ngl", "--n-gpu-layers", "--gpu-layers", "--num-gpu"),
                    "a model is as a whole on the GPU, or on the CPU with --device cpu"),
    **dict.fromkeys(("-t", "--threads", "--num-threads", "--num-thread"), "set OMP_NUM_THREADS in the environment"),
    **dict.fromkeys(("-fa", "--flash-attn", "--flash-attention"), "attention is always computed in tiles, so there is no switch"),
    **dict.fromkeys(("--mlock", "--mmap", "--no-mmap"), "weights are copied into memory once, at the start"),
    **dict.fromkeys(("--cpu", "--cpu-only"), "use --device cpu"),
    **dict.fromkeys(("--half", "--fp16"), "use --dtype float16"),
    **dict.fromkeys(("-v", "--verbose", "--debug"), "use --log-level debug"),
    **dict.fromkeys(("-i", "--interactive", "-cnv", "--conversation"), "`minivllm chat` is a conversation"),
    **dict.fromkeys(("-f", "--file", "--prompt-file"), "use `minivllm complete - < FILE`"),
    **dict.fromkeys(("-d", "--detach", "--daemon"), "run it with nohup or under a service manager"),
    **dict.fromkeys(("-md", "--model-draft", "--draft-model"), "use --speculative-config with the entry model"),
    **dict.fromkeys(("--lora", "--lora-adapters", "--adapter"), "use --enable-lora --lora-modules NAME=FOLDER"),
    **dict.fromkeys(("--embedding", "--embeddings"), "every server answers /v1/embeddings; --pooler-config has its settings"),
    "--rerank": "reranking is not supported yet; every server answers /score",
    **dict.fromkeys(("-p", "--prompt"), "give the prompt as the argument, as in `minivllm complete PROMPT`; a port is --port"),
    "--bf16": "use --dtype bfloat16", "--jinja": "chat templates are always Jinja templates", "--device-map": "use --device",
    "--keepalive": "the model stays loaded until the server stops", "--keep-alive": "the model stays loaded until the server stops",
    "--stream": "answers are always streamed", "--reload": "restart the server to load changed code",
    "--stop": "stop strings are for requests to a server",
    "--workers": "one engine serves all requests; see --max-num-seqs",
}
# Another program's command -> the command here.
COMMANDS: Mapping[str, str] = {
    "run": "chat", "ls": "list", "remove": "rm", "delete": "rm", "download": "pull", "get": "pull", "generate": "complete",
    "start": "serve", "env": "collect-env", "run_batch": "run-batch", "collect_env": "collect-env",
}
COMMAND_HINTS: Mapping[str, str] = {
    "ps": "a server lists its models itself: curl http://127.0.0.1:8000/v1/models",
    "show": "config.json in the folder that `minivllm pull MODEL` prints describes a model",
    "stop": "press Ctrl-C where the server runs, or send it SIGTERM", "kill": "press Ctrl-C where the server runs, or send it SIGTERM",
    "help": "minivllm --help, or minivllm COMMAND --help", "version": "minivllm --version",
    "create": "give a folder or a .gguf file as MODEL; --chat-template FILE replaces its template",
    "push": "use `hf upload`", "login": "use `hf auth login`", "search": "search at https://huggingface.co/models",
    "embed": "every server answers /v1/embeddings",
}
