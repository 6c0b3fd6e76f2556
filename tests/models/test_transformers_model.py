"""Decoders that run in Transformers' code: parity with Transformers' own attention, and refusals by name."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minivllm import LLM, SamplingParams
from minivllm.cli.main import main
from minivllm.config import EngineConfig
from minivllm.errors import InvalidInput
from minivllm.families import FAMILIES
from minivllm.models import transformers_load
from minivllm.models.transformers_load import check_logits, load_transformers
from minivllm.models.transformers_model import TransformersModel
from minivllm.models.transformers_spec import ForeignSpec, read_spec
from minivllm.quantization.methods import METHODS
from tests.models.paged import Paged, make_build
from tests.models.tiny import hf_logits, randomized

BASE = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WINDOWS = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
WIDE = {"head_dim": 12}
GROUPED = {**EXPERTS, "n_group": 1, "topk_group": 1}
LATENT = {"num_key_value_heads": 4, "head_dim": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
          "v_head_dim": 8}

# Architectures that have no row in the table, and a few that have one.
MODELS: dict[str, dict[str, Any]] = {
    "Afmoe": EXPERTS, "Apertus": {}, "Arcee": {}, "Beam": WINDOWS, "BioGpt": {}, "BitNet": {}, "Cohere2Moe": EXPERTS,
    "Cwm": {**WINDOWS, **WIDE}, "DeepseekV2": {**LATENT, **GROUPED}, "DeepseekV3": {**LATENT, **GROUPED},
    "Dots1": {**GROUPED, "n_shared_experts": 1},
    "Ernie4_5": {}, "Ernie4_5_Moe": {**EXPERTS, "moe_num_experts": 4}, "ExaoneMoe": EXPERTS, "FlexOlmo": EXPERTS,
    "Flint": {}, "GptOss": {**EXPERTS, **WINDOWS, **WIDE}, "GraniteSWA": {},
    "GPTBigCode": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}, "Glm4Moe": {**GROUPED, **WIDE},
    "Glm4MoeLite": {**LATENT, **GROUPED}, "GraniteMoe": EXPERTS, "GraniteMoeShared": EXPERTS, "HYV3": EXPERTS, "Helium": WIDE,
    "HunYuanDenseV1": WIDE, "HunYuanMoEV1": {**EXPERTS, **WIDE}, "HyperCLOVAX": {}, "Jais2": WIDE, "Laguna": EXPERTS, "Mellum": EXPERTS,
    "MiniCPM3": LATENT, "MiniMaxM2": {**EXPERTS, **WIDE}, "Ministral": {**WINDOWS, **WIDE}, "Ministral3": WIDE, "NanoChat": {},
    "Nemotron": {}, "Persimmon": {}, "Phimoe": EXPERTS, "SeedOss": WIDE, "SolarOpen": GROUPED,
    "VaultGemma": {**WINDOWS, **WIDE}, "Youtu": LATENT,
    "Llama": {}, "Qwen3": WIDE,
}


def make_config(family: str, **settings: Any) -> dict[str, Any]:
    config = getattr(transformers, f"{family}Config")(**{**BASE, **settings})
    return {**json.loads(config.to_json_string()), "architectures": [f"{family}ForCausalLM"]}


def make(family: str, settings: dict[str, Any], folder: Path) -> transformers.PreTrainedModel:
    """A random model, saved in the folder and loaded from it."""
    torch.manual_seed(0)
    config, cls = (getattr(transformers, family + kind) for kind in ("Config", "ForCausalLM"))
    randomized(cls._from_config(config(**{**BASE, **settings}))).save_pretrained(folder)
    return cls.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module", params=MODELS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
) -> tuple[transformers.PreTrainedModel, TransformersModel]:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = make(request.param, MODELS[request.param], folder)
    spec = read_spec(EngineConfig(model_impl="transformers"), json.loads((folder / "config.json").read_text()), METHODS)
    assert isinstance(spec, ForeignSpec)
    return theirs, load_transformers(spec, folder, "auto", make_build())


def test_parity(pair: tuple[transformers.PreTrainedModel, TransformersModel]) -> None:
    theirs, ours = pair
    a, b = torch.randint(3, 97, (2, 20)).tolist()
    paged = Paged(ours, 24, num_seqs=2)
    steps = [((0, a[:9]),), ((0, a[9:10]), (1, b[:11])), ((0, a[10:15]), (1, b[11:17])), ((0, a[15:16]), (1, b[17:18])), ((0, a[16:]),)]
    rows: list[list[torch.Tensor]] = [[], []]
    for work in steps:
        for (s, tokens), part in zip(work, paged.run(*work).split([len(t) for _, t in work]), strict=True):
            assert len(part) == len(tokens)
            rows[s].append(part)
    torch.testing.assert_close(torch.cat(rows[0]), hf_logits(theirs, a), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat(rows[1]), hf_logits(theirs, b[:18]), atol=1e-4, rtol=1e-4)


REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is not supported: it has state-space"),
    ({"model_type": "jamba", "architectures": ["JambaForCausalLM"]}, "JambaForCausalLM is not supported: it has state-space"),
    ({"model_type": "bamba", "architectures": ["BambaForCausalLM"]}, "BambaForCausalLM is not supported: it has state-space"),
    ({"model_type": "falcon_h1", "architectures": ["FalconH1ForCausalLM"]}, "FalconH1ForCausalLM is not supported: it has state-space"),
    ({"model_type": "recurrent_gemma", "architectures": ["RecurrentGemmaForCausalLM"]}, "is not supported: it has state-space"),
    ({"model_type": "zamba", "architectures": ["ZambaForCausalLM"]}, "is not supported: it has state-space"),
    ({"model_type": "lfm2", "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "architectures": ["Lfm2ForCausalLM"]},
     "Lfm2ForCausalLM is not supported: it has state-space, linear-attention or convolution layers"),
    ({"model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"]}, "is not supported: it has state-space"),
    ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "is not supported: it is an encoder-decoder"),
    ({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}, "is not supported: it is multimodal"),
    ({"model_type": "bert", "architectures": ["BertLMHeadModel"]}, "BertLMHeadModel is not supported: its attention is not causal"),
    ({"model_type": "codegen", "architectures": ["CodeGenForCausalLM"]}, "computes with the attention mask"),
    ({"model_type": "mpt", "architectures": ["MptForCausalLM"]}, "computes with the attention mask"),
    ({"model_type": "openai-gpt", "architectures": ["OpenAIGPTLMHeadModel"]}, "does not go through Transformers' AttentionInterface"),
    ({"model_type": "deepseek_v32", "architectures": ["DeepseekV32ForCausalLM"]}, "its attention is sparse"),
    ({"model_type": "diffllama", "architectures": ["DiffLlamaForCausalLM"]}, "needs one call per layer"),
    ({"model_type": "arcee", "architectures": ["NoSuchForCausalLM"]}, "NoSuchForCausalLM is not supported; supported: Llama"),
    ({"model_type": "x", "auto_map": {"AutoModelForCausalLM": "modeling_x.X"}, "architectures": ["X"]},
     "the architecture X exists only as Python code in the model's folder (auto_map), which is not run: "),
    ({"model_type": "no_such", "architectures": ["ArceeForCausalLM"]}, "model_type 'no_such' of ArceeForCausalLM is not one of"),
    ({"model_type": "arcee", "hidden_size": "x", "architectures": ["ArceeForCausalLM"]}, "config.json is not one of ArceeForCausalLM"),
)


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[case[0]["architectures"][0] for case in REFUSED])
def test_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput) as error:
        read_spec(EngineConfig(), config, METHODS)
    assert message in str(error.value)


@pytest.mark.parametrize(("settings", "message"), [
    ({"model_impl": "minivllm"}, "the architecture ArceeForCausalLM is not supported; supported:"),
    ({"enable_lora": True}, "enable_lora True does not work with ArceeForCausalLM"),
    ({"quantization": "int8"}, "quantization 'int8' does not work with ArceeForCausalLM"),
    ({"tensor_parallel_size": 2}, "tensor_parallel_size 2 does not work with ArceeForCausalLM"),
    ({"cpu_offload_gb": 1.0}, "cpu_offload_gb 1.0 does not work with ArceeForCausalLM"),
    ({"speculative_config": {"method": "draft_model", "model": "x", "num_speculative_tokens": 2}}, "method ngram only"),
])
def test_settings_that_do_not_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput) as error:
        read_spec(EngineConfig(**settings), make_config("Arcee"), METHODS)
    assert message in str(error.value)


def test_frequencies_that_depend_on_the_batch_are_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    config = make_config("Arcee", rope_parameters=rope)
    with pytest.raises(InvalidInput, match="set max_model_len to at most 32"):
        read_spec(EngineConfig(), config, METHODS)
    assert isinstance(read_spec(EngineConfig(max_model_len=32), config, METHODS), ForeignSpec)


def test_code_that_counts_positions_itself_is_refused() -> None:
    """RoBERTa's embeddings count positions along the row, so in a row of two sequences those of the second are wrong."""
    spec = read_spec(EngineConfig(), make_config("Roberta", is_decoder=True), METHODS)
    assert isinstance(spec, ForeignSpec)
    with pytest.raises(InvalidInput, match="its code computes other logits"):
        check_logits(spec)


def test_a_check_that_is_left_out_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spec = read_spec(EngineConfig(), make_config("Roberta", is_decoder=True), METHODS)
    assert isinstance(spec, ForeignSpec)
    monkeypatch.setattr(transformers_load, "CHECK_PARAMETERS", 1000)
    check_logits(spec)
    assert "no small model of RobertaForCausalLM was compared with Transformers' own attention: a small one still has" in (
        capsys.readouterr().err)


def test_kv_pages_of_different_sizes_are_refused() -> None:
    config = make_config("MiMoV2Flash", **WINDOWS, **EXPERTS, num_key_value_heads=2, swa_num_key_value_heads=4)
    with pytest.raises(InvalidInput, match="MiMoV2FlashForCausalLM is not supported: its layers have KV pages of different sizes"):
        read_spec(EngineConfig(), config, METHODS)


def test_at_least_20_architectures_have_no_row() -> None:
    assert sum(f"{family}ForCausalLM" not in FAMILIES for family in MODELS) >= 20


def test_engine(tmp_path: Path) -> None:
    """Greedy tokens of a whole engine: prompts in chunks, a mixed batch, prefix-cache hits."""
    theirs = make("Nemotron", {}, tmp_path)
    prefix = torch.randint(3, 97, (18,)).tolist()
    prompts = [[*prefix, 5, 6], [*prefix, 7], prefix[:9], [*prefix, 5, 6]]
    expected = [theirs.generate(torch.tensor([p]), max_new_tokens=8, do_sample=False, eos_token_id=-1)[0, len(p) :].tolist()
                for p in prompts]
    with LLM(str(tmp_path), dtype="float32", device="cpu", skip_tokenizer_init=True, block_size=4, max_num_batched_tokens=7,
             num_gpu_blocks_override=64) as llm:
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
        for _ in range(2):
            outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params)
            assert [list(o.outputs[0].token_ids) for o in outputs] == expected
        assert all(o.num_cached_tokens for o in outputs)


def test_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = make("Ministral", MODELS["Ministral"], tmp_path)
    for gpu in ("cpu", "l4"):
        assert main(["plan", str(tmp_path), "--gpu", gpu, "--dtype", "float32", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["weight_bytes"] == 4 * sum(p.numel() for p in theirs.parameters())
        assert found["fits"] and "MinistralForCausalLM runs in Transformers' code" in found["notes"][0] and "tpot_ms" not in found
    assert main(["plan", str(tmp_path), "--gpu", "l4"]) == 0
    assert main(["plan", str(tmp_path), "--gpu", "l4", "--quantization", "awq"]) != 0
    assert "MinistralForCausalLM runs in Transformers' code, unquantized only" in capsys.readouterr().err


def test_dummy_weights_and_missing_weights(tmp_path: Path) -> None:
    make("Arcee", {}, tmp_path)
    spec = read_spec(EngineConfig(), json.loads((tmp_path / "config.json").read_text()), METHODS)
    assert isinstance(spec, ForeignSpec)
    paged = [Paged(load_transformers(spec, tmp_path, "dummy", make_build(), seed), 8) for seed in (1, 1, 2)]
    a, b, c = (x.run((0, [3, 4, 5])) for x in paged)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.extra.weight"] = weights.pop("model.layers.0.self_attn.q_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidInput, match=r"missing: .*q_proj.weight; unexpected: .*extra.weight"):
        load_transformers(spec, tmp_path, "auto", make_build())
