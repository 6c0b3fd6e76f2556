"""A GGUF file's metadata -> the config.json and generation_config.json of the model folder that it was made from.

llama.cpp names fewer architectures than Hugging Face has classes: what a file of `llama`, `olmo2` or `deepseek2` is follows from its keys.
The class OPT has no name there. GPT-J has one (`gptj`), but no converter and no model.
"""
from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from minivllm.errors import ModelError
from minivllm.models.gguf_metadata import Metadata, check_keys, sampling_defaults
from minivllm.models.gguf_tokenizer import SpecialIds

if TYPE_CHECKING:
    from gguf import ReaderTensor


@dataclass(frozen=True)
class Architecture:
    """What differs between the GGUF architectures that can run here."""

    model_type: str
    class_name: str
    interleaved_rope: bool = False  # llama.cpp rotates adjacent pairs (0,1)(2,3).. and stores q and k rows in that order
    further_keys: tuple[str, ...] = ()  # of `FURTHER_KEYS`: those that this architecture has
    partial_rope: bool = False  # rope.dimension_count may be less than the head width
    norm_offset: float = 0.0  # that the file's norm weights include and Hugging Face's do not
    grouped_qkv: bool = False  # Hugging Face stores q, k and v of a KV head together; llama.cpp stores all of q, then k, then v
    layer_norm: str = ""  # the key of config.json for the epsilon of a LayerNorm; empty: RMSNorm
    renormalized: bool = False  # the weights of a token's experts are divided by their sum
    transposed: bool = False  # Hugging Face stores the layers' matrices as [inputs, outputs]
    gating: int = 1  # llama.cpp's number of what makes weights of the router's scores, beside 0: not stated


_LAYER_NORM = "attention.layer_norm_epsilon"
_SIGMOID, _SOFTMAX_OF_CHOSEN = 2, 3  # values of expert_gating_func
ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", interleaved_rope=True),  # Mistral's files are named llama too
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "gemma": Architecture("gemma", "GemmaForCausalLM", norm_offset=1.0),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", norm_offset=1.0,
                           further_keys=("attn_logit_softcapping", "final_logit_softcapping")),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", norm_offset=1.0,
                           further_keys=("final_logit_softcapping", "rope.freq_base_swa")),
    "phi2": Architecture("phi", "PhiForCausalLM", further_keys=(_LAYER_NORM,), partial_rope=True, layer_norm="layer_norm_eps"),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", partial_rope=True),
    "olmo": Architecture("olmo", "OlmoForCausalLM", interleaved_rope=True, further_keys=(_LAYER_NORM,), layer_norm="layer_norm_eps"),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM", further_keys=("attention.sliding_window_pattern",)),
    "granite": Architecture("granite", "GraniteForCausalLM", interleaved_rope=True,
                            further_keys=("logit_scale", "embedding_scale", "residual_scale")),
    "command-r": Architecture("cohere", "CohereForCausalLM", further_keys=(_LAYER_NORM, "logit_scale"), layer_norm="layer_norm_eps"),
    "cohere2": Architecture("cohere2", "Cohere2ForCausalLM", further_keys=(_LAYER_NORM, "logit_scale"), layer_norm="layer_norm_eps"),
    "glm4": Architecture("glm4", "Glm4ForCausalLM", partial_rope=True),
    "exaone4": Architecture("exaone4", "Exaone4ForCausalLM", further_keys=("attention.sliding_window_pattern",)),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", interleaved_rope=True),
    "stablelm": Architecture("stablelm", "StableLmForCausalLM", further_keys=(_LAYER_NORM, "use_parallel_residual"), partial_rope=True,
                             layer_norm="layer_norm_eps"),
    "starcoder2": Architecture("starcoder2", "Starcoder2ForCausalLM", further_keys=(_LAYER_NORM,), layer_norm="norm_epsilon"),
    "gptneox": Architecture("gpt_neox", "GPTNeoXForCausalLM", further_keys=(_LAYER_NORM, "use_parallel_residual"), partial_rope=True,
                            grouped_qkv=True, layer_norm="layer_norm_eps"),
    "falcon": Architecture("falcon", "FalconForCausalLM", further_keys=(_LAYER_NORM,), grouped_qkv=True, layer_norm="layer_norm_epsilon"),
    "bloom": Architecture("bloom", "BloomForCausalLM", further_keys=(_LAYER_NORM,), grouped_qkv=True, layer_norm="layer_norm_epsilon"),
    "qwen2moe": Architecture("qwen2_moe", "Qwen2MoeForCausalLM"),
    "qwen3moe": Architecture("qwen3_moe", "Qwen3MoeForCausalLM", renormalized=True),
    "olmoe": Architecture("olmoe", "OlmoeForCausalLM"),
    "gpt2": Architecture("gpt2", "GPT2LMHeadModel", further_keys=(_LAYER_NORM,), layer_norm="layer_norm_epsilon", transposed=True),
    "gpt-oss": Architecture("gpt_oss", "GptOssForCausalLM", gating=_SOFTMAX_OF_CHOSEN),
    "deepseek2": Architecture("deepseek_v2", "DeepseekV2ForCausalLM", further_keys=(
        "attention.q_lora_rank", "attention.kv_lora_rank", "attention.key_length_mla", "attention.value_length_mla",
        "rope.scaling.yarn_log_multiplier", "expert_group_used_count", "leading_dense_block_count")),  # V3 too, see `_deepseek`
    "chatglm": Architecture("glm", "GlmForCausalLM", partial_rope=True),
    "mistral3": Architecture("mistral", "MistralForCausalLM", interleaved_rope=True),
}
MIXTRAL = Architecture("mixtral", "MixtralForCausalLM", interleaved_rope=True, renormalized=True)  # its files are named llama too
EXPERTS = re.compile(r"blk\.(\d+)\.ffn_gate(_up)?_exps\.weight")  # the gates alone, or each expert's gates and then its up rows

EMBEDDING = "token_embd.weight"
ROPE_FACTORS = "rope_freqs.weight"  # not a weight: the divisors of Llama 3's rotary frequencies, see `_llama3_rope`
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"  # of longrope (Phi-3)
ROPE_TENSORS = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)


def find_architecture(meta: Metadata) -> Architecture:
    """The architecture of a file. Raises `ModelError` for a file that cannot run here, and for metadata that cannot be honored."""
    if meta.architecture not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise ModelError(f"{meta.path}: architecture {meta.architecture!r} is not supported; supported: {supported}", "model")
    check_keys(meta, ARCHITECTURES[meta.architecture].further_keys)
    has_experts = meta.architecture == "llama" and meta.hparam("expert_count", 0) > 0
    return MIXTRAL if has_experts else ARCHITECTURES[meta.architecture]


def make_config(meta: Metadata, arch: Architecture, tensors: Mapping[str, ReaderTensor], ids: SpecialIds) -> dict[str, Any]:
    """The config.json: the keys that the decoder needs."""
    get = meta.hparam
    heads, hidden = get("attention.head_count"), get("embedding_length")
    head_dim, rotated = _head_dim(meta, arch, heads, hidden)
    window = get("attention.sliding_window", 0)
    has_bias = lambda part: f"blk.0.{part}.bias" in tensors  # noqa: E731
    config = {
        "architectures": [arch.class_name],
        "model_type": arch.model_type,
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        arch.layer_norm or "rms_norm_eps": get(_LAYER_NORM if arch.layer_norm else "attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": get("context_length"),
        "vocab_size": vocabulary_rows(meta, tensors),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_theta": get("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(meta, rotated, tensors),
        "torch_dtype": _dtype(tensors),
        "bos_token_id": ids.bos,
        "eos_token_id": _one_or_list(ids.ends),
        "pad_token_id": ids.pad,
    }
    if "_moe" in arch.model_type or arch.model_type in ("mixtral", "olmoe", "gpt_oss"):
        config |= _experts(meta, arch, tensors, config)
    if arch.model_type == "llama":
        config |= {"attention_bias": has_bias("attn_q"), "mlp_bias": has_bias("ffn_up")}
        if window:
            config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    if arch.model_type == "qwen3":
        config["attention_bias"] = has_bias("attn_q")
    if arch.partial_rope:
        config["partial_rotary_factor"] = rotated / head_dim
    if window:
        config |= {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0}
    if arch.model_type == "phi3" and config["rope_scaling"] is not None:
        config["original_max_position_embeddings"] = config["rope_scaling"]["original_max_position_embeddings"]
    config |= _of_architecture(meta, config, tensors)
    _check_sizes(meta, config, tensors)
    return config


def _experts(meta: Metadata, arch: Architecture, tensors: Mapping[str, ReaderTensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys about experts. Sizes are those of the tensors."""
    sparse = _sparse_layers(tensors)
    if not sparse:
        meta.fail(f"{meta.architecture}.expert_count", "but the file has no tensor of experts, ffn_gate_exps.weight: convert it again")
    for name, allowed in (("expert_weights_scale", (0.0, 1.0)), ("expert_gating_func", (0, arch.gating)), ("expert_group_count", (0, 1)),
                          ("expert_weights_norm", (arch.renormalized,))):
        _only(meta, name, *allowed)
    inner, count = next(iter(sparse.values()))
    found = {"num_experts_per_tok": meta.hparam("expert_used_count"), "norm_topk_prob": arch.renormalized, "num_local_experts": count,
             "num_experts": count}
    if arch.model_type in ("mixtral", "olmoe", "gpt_oss"):
        return {**found, "intermediate_size": inner}
    found |= {"moe_intermediate_size": inner, "mlp_only_layers": [i for i in range(config["num_hidden_layers"]) if i not in sparse]}
    if arch.model_type == "qwen2_moe":
        shared = tensors.get(f"blk.{min(sparse)}.ffn_gate_shexp.weight")
        found["shared_expert_intermediate_size"] = 0 if shared is None else int(shared.shape[1])
    return found


def _sparse_layers(tensors: Mapping[str, ReaderTensor]) -> dict[int, tuple[int, int]]:
    """Layers with experts -> the inner width of an expert, and the number of experts. Sizes that make no sense fail later."""
    return {int(match[1]): (int(tensor.shape[1]) // (2 if match[2] else 1), int(tensor.shape[-1]))
            for name, tensor in tensors.items() if (match := EXPERTS.fullmatch(name)) and len(tensor.shape) == 3}


def _only(meta: Metadata, name: str, *allowed: Any) -> None:
    """Refuse other values of a key. allowed: the default first, and last the one to name."""
    if meta.hparam(name, allowed[0]) not in allowed:
        meta.fail(f"{meta.architecture}.{name}", f"is not supported for this architecture, only {allowed[-1]} is")


def _deepseek(meta: Metadata, tensors: Mapping[str, ReaderTensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Latent attention and experts of DeepSeek-V2 and V3. Their files have one name; V3's router uses sigmoid.

    Newer files state the widths of latent attention in key_length and value_length, and those of the heads in the keys that end in _mla.
    """
    get, kind, layers = meta.hparam, meta.architecture, config["num_hidden_layers"]
    newer = "_mla" if f"{kind}.attention.key_length_mla" in meta else ""
    key_length, rotated = f"attention.key_length{newer}", get("rope.dimension_count")
    keys = get(key_length)
    if keys <= rotated:
        meta.fail(f"{kind}.{key_length}", f"must be above {kind}.rope.dimension_count {rotated}: a head's first dimensions are not "
                  "rotated")
    found: dict[str, Any] = {
        "q_lora_rank": get("attention.q_lora_rank", 0) or None, "kv_lora_rank": get("attention.kv_lora_rank"), "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": keys - rotated, "v_head_dim": get(f"attention.value_length{newer}"),
        "num_key_value_heads": config["num_attention_heads"],
        "first_k_dense_replace": (first := get("leading_dense_block_count", 0)),
    }
    sparse = _sparse_layers(tensors)
    if [*range(first, layers)] != sorted(sparse):
        meta.fail(f"{kind}.leading_dense_block_count", f"but of {layers} layers these have experts: {sorted(sparse)}: convert it again")
    v3 = get("expert_gating_func", 0) == _SIGMOID
    if v3:
        found |= {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    else:
        _only(meta, "expert_gating_func", 0, 1)
        _only(meta, "expert_weights_norm", False)
    if not sparse:
        return found
    inner, count = sparse[first]
    shared = tensors.get(f"blk.{first}.ffn_gate_shexp.weight")
    groups = get("expert_group_count", 0)
    if shared is not None and int(shared.shape[1]) % inner:
        meta.fail(f"{kind}.expert_shared_count", f"but tensor {shared.name!r} has {int(shared.shape[1])} rows, not a multiple of {inner}")
    return found | {
        "n_routed_experts": count, "num_experts_per_tok": get("expert_used_count"), "moe_intermediate_size": inner,
        "n_shared_experts": 0 if shared is None else int(shared.shape[1]) // inner, "norm_topk_prob": get("expert_weights_norm", False),
        "routed_scaling_factor": get("expert_weights_scale", 0.0) or 1.0, "n_group": max(1, groups),
        "topk_group": get("expert_group_used_count") if groups > 1 else 1,
        "topk_method": "noaux_tc" if v3 else "group_limited_greedy" if groups > 1 else "greedy",
        "scoring_func": "sigmoid" if v3 else "softmax",
    }


def make_generation_config(meta: Metadata, ids: SpecialIds) -> dict[str, Any]:
    """The generation_config.json: every token that ends an output, and the sampling parameters that the model's authors recommend."""
    special = {"bos_token_id": ids.bos, "eos_token_id": _one_or_list(ids.ends), "pad_token_id": ids.pad}
    return {key: value for key, value in special.items() if value is not None} | sampling_defaults(meta)


def vocabulary_rows(meta: Metadata, tensors: Mapping[str, ReaderTensor]) -> int:
    """Number of rows of the embedding table."""
    if EMBEDDING not in tensors:
        raise ModelError(f"{meta.path}: tensor {EMBEDDING!r} is missing", "model")
    return int(tensors[EMBEDDING].shape[-1])


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    return ids[0] if len(ids) == 1 else list(ids) or None


def _of_architecture(meta: Metadata, config: Mapping[str, Any], tensors: Mapping[str, ReaderTensor]) -> dict[str, Any]:
    """Further keys of config.json. Defaults, and what follows from the number of layers, are llama.cpp's rules."""
    get, kind, layers, head_dim = meta.hparam, meta.architecture, config["num_hidden_layers"], config["head_dim"]
    has = lambda name: f"blk.0.{name}" in tensors  # noqa: E731
    if kind in ("gemma", "gemma2", "gemma3"):
        # The largest models divide scores by another number: the hidden size per head.
        wide = (kind, layers) in (("gemma2", 46), ("gemma3", 62))
        common: dict[str, Any] = {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh"}
        if kind == "gemma":
            return common
        return common | {
            "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"] if wide else head_dim,
            "sliding_window": get("attention.sliding_window", 4096),
            "attn_logit_softcapping": get("attn_logit_softcapping", 50.0) if kind == "gemma2" else None,
            "final_logit_softcapping": get("final_logit_softcapping", 30.0 if kind == "gemma2" else None),
            **({"rope_local_base_freq": get("rope.freq_base_swa", 10000.0)} if kind == "gemma3" else {}),
        }
    if kind == "granite":
        return {"embedding_multiplier": get("embedding_scale", 1.0), "residual_multiplier": get("residual_scale", 1.0),
                "logits_scaling": get("logit_scale", 1.0), "attention_multiplier": get("attention.scale", 0.0) or head_dim**-0.5,
                "attention_bias": has("attn_q.bias"), "mlp_bias": has("ffn_up.bias")}
    if kind == "olmo":
        if not math.isclose(config["layer_norm_eps"], 1e-5, rel_tol=1e-6):
            meta.fail(f"{kind}.{_LAYER_NORM}", "is not supported for this architecture, only 1e-5 is")
        return {}
    if kind in ("olmo2", "exaone4"):
        pattern = get("attention.sliding_window_pattern", None)
        if config.get("sliding_window") is None:
            return {"sliding_window": None, "layer_types": ["full_attention"] * layers}
        other = {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3"} if kind == "olmo2" else {}
        windowed = [(i + 1) % 4 != 0 for i in range(layers)] if pattern is None else pattern
        return other | {"layer_types": ["sliding_attention" if each else "full_attention" for each in windowed]}
    if kind in ("command-r", "cohere2"):
        return {"logit_scale": get("logit_scale"), "use_qk_norm": has("attn_q_norm.weight"), "attention_bias": has("attn_q.bias")}
    if kind == "glm4":
        return {"attention_bias": has("attn_q.bias")}
    if kind == "stablelm":
        return {"use_qkv_bias": has("attn_q.bias"), "use_parallel_residual": not has("ffn_norm.weight")}
    if kind == "gptneox":
        return {"hidden_act": "gelu", "use_parallel_residual": get("use_parallel_residual", True), "attention_bias": has("attn_qkv.bias"),
                "rotary_pct": config.get("partial_rotary_factor", 1.0), "rotary_emb_base": config["rope_theta"]}
    if kind == "falcon":
        return {"activation": "gelu", "num_kv_heads": config["num_key_value_heads"], "multi_query": config["num_key_value_heads"] == 1,
                "new_decoder_architecture": has("attn_norm_2.weight"), "parallel_attn": True, "bias": has("attn_qkv.bias"),
                "ffn_hidden_size": config["intermediate_size"]}
    if kind == "bloom":
        return {"seq_length": config["max_position_embeddings"]}
    if kind == "gpt2":
        return {"n_inner": config["intermediate_size"], "activation_function": "gelu_new"}
    if kind == "gpt-oss":
        return {"sliding_window": get("attention.sliding_window") or None, "attention_bias": has("attn_q.bias") or has("attn_qkv.bias")}
    if kind == "deepseek2":
        return _deepseek(meta, tensors, config)
    if kind == "chatglm":
        return {"attention_bias": has("attn_q.bias") or has("attn_qkv.bias")}
    if kind == "mistral3":
        return {"sliding_window": config.get("sliding_window")}  # a missing key would mean 4096
    return {"hidden_act": {"phi2": "gelu_new", "starcoder2": "gelu_pytorch_tanh"}.get(kind, "silu"),
            **({"use_bias": has("attn_q.bias"), "tie_word_embeddings": config["tie_word_embeddings"]} if kind == "starcoder2" else {}),
            **({"use_sliding_window": False} if kind == "smollm3" else {})}


def _head_dim(meta: Metadata, arch: Architecture, heads: int, hidden: int) -> tuple[int, int]:
    """The width of a head, and how many of its dimensions are rotated."""
    rotated: int
    if meta.architecture == "deepseek2":  # the widths are in `_deepseek`; Transformers' head_dim is the rotated part
        rotated = meta.hparam("rope.dimension_count")
        return rotated, rotated
    keys = meta.hparam("attention.key_length", None)
    if keys is None and hidden % heads:
        meta.fail(f"{meta.architecture}.embedding_length", f"is not a multiple of the {heads} attention heads, and there is no "
                  f"{meta.architecture}.attention.key_length")
    head_dim: int = keys or hidden // heads
    rotated = meta.hparam("rope.dimension_count", head_dim)
    if rotated != head_dim and not (arch.partial_rope and rotated < head_dim):
        meta.fail(f"{meta.architecture}.rope.dimension_count", f"differs from the head width {head_dim}: partial rotary embedding is not "
                  "supported")
    if meta.hparam("attention.value_length", head_dim) != head_dim:
        meta.fail(f"{meta.architecture}.attention.value_length", f"differs from the head width {head_dim}: unequal key and value widths "
                  "are not supported")
    if meta.architecture == "granite":
        return head_dim, rotated
    scale = meta.hparam("attention.scale", 0.0)
    if scale and not math.isclose(scale, head_dim ** -0.5, rel_tol=1e-6):
        meta.fail(f"{meta.architecture}.attention.scale", f"is not supported, only 1 / sqrt(head width) = {head_dim ** -0.5:.6g} is")
    return head_dim, rotated


def _check_sizes(meta: Metadata, config: Mapping[str, Any], tensors: Mapping[str, ReaderTensor]) -> None:
    """Compare sizes that later code relies on with the tensors. (The loader compares the other ones.)"""
    prefix = meta.architecture
    layers = 1 + max((int(match[1]) for name in tensors if (match := re.match(r"blk\.(\d+)\.", name))), default=-1)
    if config["num_hidden_layers"] != layers:
        meta.fail(f"{prefix}.block_count", f"but the file has the tensors of {layers} layers: download it again")
    width = int(tensors[EMBEDDING].shape[0])
    if config["hidden_size"] != width:
        meta.fail(f"{prefix}.embedding_length", f"but tensor {EMBEDDING!r} has rows of {width}: download it again")
    if config["num_attention_heads"] % config["num_key_value_heads"]:
        meta.fail(f"{prefix}.attention.head_count", f"is not a multiple of the {config['num_key_value_heads']} key and value heads")
    if meta.hparam("vocab_size", 0) not in (0, config["vocab_size"]):
        meta.warn(f"metadata {prefix}.vocab_size = {meta.hparam('vocab_size')} is not used: the embedding has {config['vocab_size']} rows")


def _dtype(tensors: Mapping[str, ReaderTensor]) -> str:
    """The dtype of most weights. Quantized ones count as bfloat16, because nearly all were converted from bfloat16 checkpoints."""
    count: dict[str, int] = {}
    for tensor in tensors.values():
        count[tensor.tensor_type.name] = count.get(tensor.tensor_type.name, 0) + tensor.n_elements
    return {"F32": "float32", "F16": "float16"}.get(max(count, key=lambda kind: count[kind]), "bfloat16")


# ---- rotary embedding

def _rope_scaling(meta: Metadata, head_dim: int, tensors: Mapping[str, ReaderTensor]) -> dict[str, Any] | None:
    """llama.cpp's rules: a factor without a type is linear, and YaRN starts from the trained length unless told otherwise."""
    get, prefix = meta.hparam, meta.architecture
    kind = get("rope.scaling.type", "linear")
    if LONG_FACTORS in tensors and SHORT_FACTORS in tensors:
        return {"rope_type": "longrope", "original_max_position_embeddings": get("rope.scaling.original_context_length"),
                "attention_factor": get("rope.scaling.attn_factor", 1.0),
                **{key: tensors[name].data.tolist() for key, name in (("long_factor", LONG_FACTORS), ("short_factor", SHORT_FACTORS))}}
    factor = get("rope.scaling.factor", None)
    if factor is None:
        factor = get("rope.scale_linear", 0.0)  # the older name
    factor = 1.0 if kind == "none" or factor == 0 else float(factor)
    sharpened = get("rope.scaling.attn_factor", 1.0)
    if kind not in ("none", "linear", "yarn"):
        meta.fail(f"{prefix}.rope.scaling.type", "is not supported; none, linear and yarn are")
    if kind == "yarn" and factor == 1.0 and "rope.scaling.factor" not in _own_names(meta):
        raise ModelError(f"{meta.path}: metadata {prefix}.rope.scaling.factor is missing, which yarn needs", "model")
    if factor < 1.0:
        meta.fail(f"{prefix}.rope.scaling.factor", "must be at least 1 (a context is extended, not shortened)")
    if sharpened != 1.0 and kind != "yarn":
        meta.fail(f"{prefix}.rope.scaling.attn_factor", "is supported only with yarn")
    divisors = None if ROPE_FACTORS not in tensors else tensors[ROPE_FACTORS].data
    if divisors is not None and not (divisors == 1.0).all():
        if factor != 1.0:
            meta.fail(f"{prefix}.rope.scaling.factor", f"and tensor {ROPE_FACTORS!r} both scale: together they are not supported")
        return _llama3_rope(meta, head_dim, divisors)
    if kind == "yarn":
        return _yarn(meta, factor, sharpened)
    return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def _own_names(meta: Metadata) -> set[str]:
    return {key.removeprefix(f"{meta.architecture}.") for key in meta}


def _yarn(meta: Metadata, factor: float, sharpened: float) -> dict[str, Any]:
    scaling = {"rope_type": "yarn", "factor": factor,
               "original_max_position_embeddings": meta.hparam("rope.scaling.original_context_length", meta.hparam("context_length"))}
    for key in ("beta_fast", "beta_slow"):
        if (value := meta.hparam(f"rope.scaling.yarn_{key}", None)) is not None:
            scaling[key] = value
    if meta.architecture == "deepseek2":
        return scaling | _latent_yarn(meta, sharpened)
    if meta.architecture == "gpt-oss":
        scaling["truncate"] = False  # as these models were trained; no metadata says so
    if sharpened != 1.0:  # llama.cpp multiplies YaRN's own sharpening by it, Hugging Face's key replaces YaRN's
        scaling["attention_factor"] = sharpened * (0.1 * math.log(factor) + 1.0)
    return scaling


def _latent_yarn(meta: Metadata, sharpened: float) -> dict[str, Any]:
    """DeepSeek sharpens the scores by `mscale_all_dim` alone, of which files have a tenth. Cosines and sines keep their size."""
    if sharpened != 1.0:
        meta.fail(f"{meta.architecture}.rope.scaling.attn_factor", "is not supported for this architecture, only 1 is")
    mscale = round(10 * meta.hparam("rope.scaling.yarn_log_multiplier", 0.0), 6)  # the file holds float32
    return {"mscale": mscale, "mscale_all_dim": mscale} if mscale else {"attention_factor": 1.0}


def llama3_factors(theta: float, head_dim: int, factor: float, original: int, low: float = 1.0, high: float = 4.0) -> np.ndarray:
    """Llama 3.1's divisor of each rotary frequency: 1 for short wavelengths, `factor` for long ones, a ramp between. [head_dim / 2]"""
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - smooth) / factor + smooth)


def _llama3_rope(meta: Metadata, head_dim: int, factors: np.ndarray) -> dict[str, Any]:
    """The parameters from which the divisors were computed. No metadata holds them. All Llama 3.x models share low and high."""
    factor, theta = float(factors.max()), meta.hparam("rope.freq_base", 10000.0)
    for original in (8192, 4096, 16384, 32768) if factors.shape == (head_dim // 2,) else ():
        if np.allclose(factors, llama3_factors(theta, head_dim, factor, original), rtol=1e-4):
            return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": original}
    raise ModelError(f"{meta.path}: tensor {ROPE_FACTORS!r} holds rotary factors that are not Llama 3's, which is not supported", "model")
