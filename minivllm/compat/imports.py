"""vLLM's module paths, as data: `from minivllm.v1.engine.async_llm import AsyncLLM` works although there is no such file.

A finder at the end of `sys.meta_path` makes a module of these names only when one of them is imported. So no folder of one-line files
stands beside the code that is meant to be read.
"""
from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_ENGINE_ARGS = {"EngineArgs": "minivllm.compat.engine_args", "AsyncEngineArgs": "minivllm.compat.engine_args"}
_UTILS = {"FlexibleArgumentParser": "minivllm.compat.engine_args", "random_uuid": "minivllm.compat.functions",
          "get_open_port": "minivllm.compat.functions", "Counter": "minivllm.compat.functions"}
_ASYNC = {"AsyncLLM": "minivllm.engine.async_llm"}
_DISTRIBUTED = dict.fromkeys(
    ("cleanup_dist_env_and_memory", "destroy_distributed_environment", "destroy_model_parallel"), "minivllm.compat.functions")
_PROMPTS = dict.fromkeys(("PromptType", "TextPrompt", "TokensPrompt"), "minivllm.engine.prompts")

# Module -> its names, each with the module that defines it. A package has further modules below it.
MODULES: Mapping[str, Mapping[str, str]] = {
    "minivllm.inputs": _PROMPTS,
    "minivllm.inputs.data": _PROMPTS,
    "minivllm.beam_search": {"BeamSearchParams": "minivllm.sampling_params"},
    "minivllm.logger": {"init_logger": "minivllm.compat.functions"},
    "minivllm.logprobs": {"Logprob": "minivllm.outputs"},
    "minivllm.utils": _UTILS,
    "minivllm.utils.argparse_utils": _UTILS,
    "minivllm.utils.network_utils": _UTILS,
    "minivllm.entrypoints.llm": {"LLM": "minivllm.engine.llm"},
    "minivllm.engine.arg_utils": _ENGINE_ARGS,
    "minivllm.engine.async_llm_engine": {**_ASYNC, "AsyncLLMEngine": "minivllm.engine.async_llm", **_ENGINE_ARGS},
    "minivllm.pooling_params": {"PoolingParams": "minivllm.sampling_params"},
    "minivllm.lora.request": {"LoRARequest": "minivllm.engine_request"},
    "minivllm.distributed": _DISTRIBUTED,
    "minivllm.distributed.parallel_state": _DISTRIBUTED,
    "minivllm.sequence": {"Logprob": "minivllm.outputs", "RequestMetrics": "minivllm.outputs"},
    "minivllm.usage": {},
    "minivllm.usage.usage_lib": {"UsageContext": "minivllm.compat.functions"},
    "minivllm.version": {"__version__": "minivllm", "__version_tuple__": "minivllm.compat.functions"},
    "minivllm.v1": {},
    "minivllm.v1.engine": {},
    "minivllm.v1.engine.async_llm": _ASYNC,
    "minivllm.v1.engine.llm_engine": {"LLMEngine": "minivllm.engine.llm_engine"},
    "minivllm.v1.metrics": {},
    "minivllm.v1.metrics.reader": dict.fromkeys(("Counter", "Gauge", "Histogram", "Metric", "Vector"), "minivllm.engine.metrics_reader"),
    "minivllm.transformers_utils": {},
    "minivllm.transformers_utils.tokenizer": {"get_tokenizer": "minivllm.engine.hf_tokenizer"},
}

# Packages of vLLM for features that are not built. Importing one is an error that says so.
UNBUILT: Mapping[str, str] = {
    "minivllm.assets": "example images and sounds", "minivllm.multimodal": "images and audio", "minivllm.model_executor": "vLLM's models",
    "minivllm.platforms": "plug-ins for devices", "minivllm.plugins": "plug-ins",
    "minivllm.tokenizers": "other tokenizers", "minivllm.envs": "settings from the environment", "minivllm.executor": "vLLM's executors",
    "minivllm.v1.sample": "Python logits processors", "minivllm.v1.core": "vLLM's scheduler", "minivllm.v1.worker": "vLLM's workers",
    "minivllm.attention": "other attention backends", "minivllm.spec_decode": "vLLM's proposers",
    "minivllm.profiler": "vLLM's profiler",
    "minivllm.entrypoints.chat_utils": "vLLM's own server", "minivllm.entrypoints.api_server": "the older demonstration server",
    "minivllm.entrypoints.openai.protocol": "vLLM's own server", "minivllm.entrypoints.openai.cli_args": "vLLM's own server",
    "minivllm.prompt_adapter": "prompt adapters",
}


class AliasFinder(MetaPathFinder, Loader):
    """Makes the modules of `MODULES`. It comes last, so a real file of the same name has precedence."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name in UNBUILT:
            raise ModuleNotFoundError(f"{name} ({UNBUILT[name]}) is not supported yet: minivllm has no such module", name=name)
        if name not in MODULES:
            return None
        return ModuleSpec(name, self, is_package=any(other.startswith(f"{name}.") for other in MODULES))

    def exec_module(self, module: ModuleType) -> None:
        homes = MODULES[module.__name__]

        def find(name: str) -> object:
            if f"{module.__name__}.{name}" in MODULES:
                return importlib.import_module(f"{module.__name__}.{name}")
            if name not in homes:
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            return getattr(importlib.import_module(homes[name]), name)

        module.__doc__ = f"vLLM's path of {', '.join(homes) or 'the modules below it'}: see minivllm/compat/imports.py."
        module.__getattr__ = find  # type: ignore[method-assign]  # PEP 562: names are imported on first use
        module.__dir__ = lambda: sorted(homes)  # type: ignore[method-assign]


def install() -> None:
    """Make the modules importable. A second call changes nothing."""
    if not any(isinstance(finder, AliasFinder) for finder in sys.meta_path):
        sys.meta_path.append(AliasFinder())
