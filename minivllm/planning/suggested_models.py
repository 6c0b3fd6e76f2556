"""Models that run here and are better than the small default model, as data, and which of them fit a GPU's memory.

Sizes are computed from each model's configuration, so they hold for whatever the decoder really allocates.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from minivllm.families import ModelSpec, embedding_spec, expert_specs, linear_specs, parse_config, tensor_specs

GIB = 1 << 30
RESERVE = 2 * GIB  # bytes for the peak of a step, CUDA graphs and the driver; about what a start prints for these models
CONTEXT = 8192  # tokens of KV cache that must fit
UTILIZATION = 0.9  # the default of gpu_memory_utilization
SIZE_OF_VALUE = 2  # bytes, in bfloat16


class SuggestedModel(NamedTuple):
    """A model on the hub that can be downloaded without an account."""

    repository: str
    config: dict[str, Any]  # the keys of config.json that determine its size

    @property
    def spec(self) -> ModelSpec:
        return parse_config(self.config)


def _model(repository: str, kind: str, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int, *,
           tied: bool, head_dim: int | None = None) -> SuggestedModel:
    return SuggestedModel(repository, {
        "model_type": kind, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab, "max_position_embeddings": context,
        "tie_word_embeddings": tied, "torch_dtype": "bfloat16", "sliding_window": None})


# Best first.
MODELS: tuple[SuggestedModel, ...] = (
    _model("Qwen/Qwen3-32B", "qwen3", 5120, 25600, 64, 64, 8, 151936, 40960, tied=False, head_dim=128),
    _model("Qwen/Qwen3-14B", "qwen3", 5120, 17408, 40, 40, 8, 151936, 40960, tied=False, head_dim=128),
    _model("Qwen/Qwen3-8B", "qwen3", 4096, 12288, 36, 32, 8, 151936, 40960, tied=False, head_dim=128),
    _model("Qwen/Qwen2.5-7B-Instruct", "qwen2", 3584, 18944, 28, 28, 4, 152064, 32768, tied=False),
    _model("Qwen/Qwen3-4B-Instruct-2507", "qwen3", 2560, 9728, 36, 32, 8, 151936, 262144, tied=True, head_dim=128),
    _model("Qwen/Qwen3-1.7B", "qwen3", 2048, 6144, 28, 16, 8, 151936, 40960, tied=True, head_dim=128),
    _model("HuggingFaceTB/SmolLM2-1.7B-Instruct", "llama", 2048, 8192, 24, 32, 32, 49152, 8192, tied=True),
    _model("Qwen/Qwen2.5-1.5B-Instruct", "qwen2", 1536, 8960, 28, 12, 2, 151936, 32768, tied=True),
    _model("Qwen/Qwen3-0.6B", "qwen3", 1024, 3072, 28, 16, 8, 151936, 40960, tied=True, head_dim=128),
    _model("HuggingFaceTB/SmolLM2-360M-Instruct", "llama", 960, 2560, 32, 15, 5, 49152, 8192, tied=True),
)

# Other models that docs/8gb.md compares.
COMPARED: tuple[SuggestedModel, ...] = (
    _model("mistralai/Mistral-7B-Instruct-v0.3", "mistral", 4096, 14336, 32, 32, 8, 32768, 32768, tied=False),
    _model("meta-llama/Llama-3.1-8B-Instruct", "llama", 4096, 14336, 32, 32, 8, 128256, 131072, tied=False),
    _model("meta-llama/Llama-2-13b-chat-hf", "llama", 5120, 13824, 40, 40, 40, 32000, 4096, tied=False),
    _model("Qwen/Qwen2.5-14B-Instruct", "qwen2", 5120, 13824, 48, 40, 8, 152064, 32768, tied=False),
    _model("meta-llama/Llama-3.1-70B-Instruct", "llama", 8192, 28672, 80, 64, 8, 128256, 131072, tied=False),
)


def model_named(repository: str) -> SuggestedModel:
    """The row of this model in either table."""
    return next(model for model in (*MODELS, *COMPARED) if model.repository == repository)


def num_parameters(spec: ModelSpec) -> int:
    """Elements of all weights."""
    linears = sum(sum(linear.rows) * (linear.cols + linear.bias) for linear in (embedding_spec(spec), *linear_specs(spec).values()))
    linears += sum(experts.size for experts in expert_specs(spec).values())
    return linears + sum(tensor.shape[0] * (tensor.shape[1] if len(tensor.shape) > 1 else 1) for tensor in tensor_specs(spec).values())


def bytes_needed(spec: ModelSpec) -> int:
    """GPU memory for the weights, a KV cache of CONTEXT tokens and the rest."""
    kv = sum(2 * layer.attention.kv_size for layer in spec.layers) * min(CONTEXT, spec.max_model_len)
    return (num_parameters(spec) + kv) * SIZE_OF_VALUE + RESERVE


def models_that_fit(memory: int, count: int = 3) -> list[SuggestedModel]:
    """The best models for a GPU with this many bytes of memory."""
    return [model for model in MODELS if bytes_needed(model.spec) <= UTILIZATION * memory][:count]


def described(models: Sequence[SuggestedModel]) -> str:
    """Their names and sizes in one line."""
    return ", ".join(f"{m.repository} ({(n := num_parameters(m.spec)) / 1e9:.1f}B parameters, {n * SIZE_OF_VALUE / GIB:.1f} GiB)"
                     for m in models)
