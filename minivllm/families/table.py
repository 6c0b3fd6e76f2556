"""The supported architectures, and from config.json to `ModelSpec`."""
from __future__ import annotations

from collections.abc import Mapping

from minivllm.errors import NotSupportedYet, shown
from minivllm.families.config_json import Config, Key, read
from minivllm.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from minivllm.families.family import Family
from minivllm.families.gemma import GEMMA, GEMMA2, GEMMA3, GEMMA3_WITH_IMAGES
from minivllm.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from minivllm.families.moe import GPT_OSS, MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from minivllm.families.opt import OPT
from minivllm.families.others import EXAONE4, GLM, GLM4, GRANITE, OLMO, OLMO2, OLMO3, PHI3, SMOLLM3, STARCODER2
from minivllm.families.parallel import BLOOM, COHERE, COHERE2, FALCON, GPT2, GPT_J, GPT_NEOX, PHI, STABLELM
from minivllm.families.spec import ModelSpec, model_error

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "OPTForCausalLM": OPT,
    "SmolLM3ForCausalLM": SMOLLM3,
    "Phi3ForCausalLM": PHI3,
    "OlmoForCausalLM": OLMO,
    "Starcoder2ForCausalLM": STARCODER2,
    "GemmaForCausalLM": GEMMA,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": GEMMA3_WITH_IMAGES,
    "PhiForCausalLM": PHI,
    "Olmo2ForCausalLM": OLMO2,
    "Olmo3ForCausalLM": OLMO3,
    "GraniteForCausalLM": GRANITE,
    "GlmForCausalLM": GLM,
    "Glm4ForCausalLM": GLM4,
    "Exaone4ForCausalLM": EXAONE4,
    "CohereForCausalLM": COHERE,
    "Cohere2ForCausalLM": COHERE2,
    "StableLmForCausalLM": STABLELM,
    "GPTNeoXForCausalLM": GPT_NEOX,
    "GPTJForCausalLM": GPT_J,
    "MixtralForCausalLM": MIXTRAL,
    "Qwen2MoeForCausalLM": QWEN2_MOE,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "OlmoeForCausalLM": OLMOE,
    "GPT2LMHeadModel": GPT2,
    "FalconForCausalLM": FALCON,
    "BloomForCausalLM": BLOOM,
    "GptOssForCausalLM": GPT_OSS,
    "DeepseekV2ForCausalLM": DEEPSEEK_V2,
    "DeepseekV3ForCausalLM": DEEPSEEK_V3,
}
# The class of a config.json that names only its model_type, as older exporters and many hand-written files do.
MODEL_TYPES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "opt": "OPTForCausalLM", "smollm3": "SmolLM3ForCausalLM", "phi3": "Phi3ForCausalLM", "olmo": "OlmoForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM", "gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "phi": "PhiForCausalLM", "olmo2": "Olmo2ForCausalLM", "olmo3": "Olmo3ForCausalLM", "granite": "GraniteForCausalLM",
    "glm": "GlmForCausalLM", "glm4": "Glm4ForCausalLM", "exaone4": "Exaone4ForCausalLM", "cohere": "CohereForCausalLM",
    "cohere2": "Cohere2ForCausalLM", "stablelm": "StableLmForCausalLM", "gpt_neox": "GPTNeoXForCausalLM", "gptj": "GPTJForCausalLM",
    "mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt2": "GPT2LMHeadModel", "falcon": "FalconForCausalLM", "bloom": "BloomForCausalLM",
    "olmoe": "OlmoeForCausalLM", "gpt_oss": "GptOssForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM",
}


def parse_config(config: Config, families: Mapping[str, Family] = FAMILIES, methods: Mapping[str, object] = {}) -> ModelSpec:
    """The model that a parsed config.json describes. methods: names of the quantization methods that can load its weights.

    Raises `ModelError` for an unknown architecture or key, `NotSupportedYet` for quantized weights in another method.
    """
    if quantization := read(config, Key("quantization_config", dict, {})):
        method = quantization.get("quant_method")
        if not isinstance(method, str) or method not in methods:
            known = f"; supported: {', '.join(methods)}" if methods else ""
            raise NotSupportedYet(f"quantized weights (quant_method {shown(method)}) are not supported yet: use the model's unquantized "
                                  f"checkpoint{known}", "model")
    architecture = _architecture(config, families)
    return families[architecture].parse(architecture, config)


def _architecture(config: Config, families: Mapping[str, Family]) -> str:
    """The first supported class under `architectures`. Without any, the class of `model_type`."""
    named, supported = read(config, Key("architectures", list, [])), _some(families)
    for name in named:
        if isinstance(name, str) and name in families:
            return name
    if named:
        first = named[0] if isinstance(named[0], str) and len(named[0]) < 99 else shown(named[0])
        raise model_error(f"the architecture {first} is not supported; supported: {supported}")
    kind = read(config, Key("model_type", str, ""))
    if not kind:
        raise model_error(f"config.json names no model class under 'architectures' and no model_type; supported: {supported}")
    if MODEL_TYPES.get(kind) not in families:
        raise model_error(f"the model_type {shown(kind)} is not supported; supported: {_some(MODEL_TYPES)}")
    return MODEL_TYPES[kind]


def _some(names: Mapping[str, object]) -> str:
    shown_names = list(names)[:8]
    return ", ".join(shown_names) + (f" and {len(names) - 8} more (docs/models.md)" if len(names) > 8 else "")
