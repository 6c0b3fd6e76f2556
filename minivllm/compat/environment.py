"""Environment variables that vLLM reads. A program moved to this engine may still set them.

`VLLM_API_KEY` and `VLLM_LOGGING_LEVEL` mean the same here (`ServerConfig`). The others in `INERT` cannot change the output and are
accepted without a line. Any further VLLM_ variable might be meant to change something, so one warning names it.
"""
from __future__ import annotations

from collections.abc import Mapping

HONORED = {"VLLM_API_KEY": "the API key, after MINIVLLM_API_KEY", "VLLM_LOGGING_LEVEL": "the default of log_level",
           "VLLM_TORCH_PROFILER_DIR": "folder of the traces of LLM.start_profile"}
INERT = frozenset({
    "VLLM_USE_V1", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_WORKER_MULTIPROC_METHOD", "VLLM_NO_USAGE_STATS", "VLLM_DO_NOT_TRACK",
    "VLLM_USAGE_SOURCE", "VLLM_USAGE_STATS_SERVER", "VLLM_CONFIGURE_LOGGING", "VLLM_LOGGING_PREFIX", "VLLM_LOG_STATS_INTERVAL",
    "VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "VLLM_ASSETS_CACHE", "VLLM_ATTENTION_BACKEND", "VLLM_FLASH_ATTN_VERSION",
    "VLLM_USE_FLASHINFER_SAMPLER", "VLLM_USE_DEEP_GEMM", "VLLM_USE_TRITON_FLASH_ATTN", "VLLM_USE_AOT_COMPILE", "VLLM_DISABLE_COMPILE_CACHE",
    "VLLM_ENGINE_ITERATION_TIMEOUT_S", "VLLM_RPC_TIMEOUT", "VLLM_HOST_IP",
    "VLLM_PORT", "VLLM_TARGET_DEVICE", "VLLM_IMAGE_FETCH_TIMEOUT", "VLLM_ENGINE_READY_TIMEOUT_S", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE",
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH", "VLLM_SERVER_DEV_MODE", "VLLM_SKIP_P2P_CHECK", "VLLM_TEST_USE_PRECOMPILED_NIGHTLY_WHEEL",
})
LEVELS = {"DEBUG": "debug", "INFO": "info", "WARNING": "warning", "ERROR": "error", "CRITICAL": "error"}


def log_level(environment: Mapping[str, str]) -> str | None:
    """The level that `VLLM_LOGGING_LEVEL` names; None if it is not set, or names no level."""
    return LEVELS.get(environment.get("VLLM_LOGGING_LEVEL", "").upper())


def unknown_variables(environment: Mapping[str, str]) -> str | None:
    """The warning about VLLM_ variables that have no meaning here; None if there is none."""
    names = sorted(name for name in environment if name.startswith("VLLM_") and name not in HONORED and name not in INERT)
    if not names:
        return None
    return f"{', '.join(names)}: not read by minivllm, so what {'they' if len(names) > 1 else 'it'} would change stays unchanged"
