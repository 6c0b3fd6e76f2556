"""Each rank computes with its part of the weights, and together the ranks have the logits of the whole model."""
from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm.config import EngineConfig
from minivllm.engine.plan_model import plan_model
from minivllm.errors import InvalidInput
from minivllm.families import parse_config
from minivllm.kernels import REFERENCE
from minivllm.layers.build import BuildContext
from minivllm.models.loader import DummyWeights, load_model, open_checkpoint, own_parameters, pieces
from minivllm.parallel.group import ParallelGroup
from minivllm.parallel.shard import shard_spec
from minivllm.planning.gpus import find_gpu
from minivllm.quantization.methods import METHODS, method_of, parameters
from tests.models.paged import Paged, make_build
from tests.models.tiny import make_hf, read_spec
from tests.parallel.ranks import on_ranks

TOKENS = [(7 * i) % 97 for i in range(12)]
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped heads": ("Llama", {"num_key_value_heads": 2}),
    "one KV head, biases": ("Llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "vocab_size": 98}),
    "norms of heads, tied": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
    "fused checkpoint": ("Phi3", {"num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}),
    "projected embeddings, norms after": ("OPT", {"word_embed_proj_dim": 20, "do_layer_norm_before": False}),
    "norms of all queries, outputs normed": ("Olmo2", {"num_key_value_heads": 2}),
    "norms per head, parallel": (
        "StableLm", {"hidden_size": 64, "num_key_value_heads": 2, "use_parallel_residual": True, "qk_layernorm": True}),
    "rows of each head together": ("GPTNeoX", {"hidden_size": 64}),
    "pairs rotated, head with a bias": (
        "GPTJ", {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_inner": 80, "rotary_dim": 4, "n_positions": 64}),
    "a slope per head": ("Bloom", {"hidden_size": 64}),
    "one KV head in the matrix of all": ("Falcon", {"hidden_size": 64, "bos_token_id": 0, "eos_token_id": 1}),
    "transposed matrices": ("GPT2", {"n_embd": 64, "bos_token_id": 0, "eos_token_id": 1}),
    "experts": ("Qwen2Moe", {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                             "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1}),
    "two KV heads among the queries' rows": (
        "Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 80, **IDS}),
    "sinks, experts with biases": ("GptOss", {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 5, "num_experts_per_tok": 3,
                                              "sliding_window": 7, **IDS}),
    "sandwich norms": ("Gemma2", {"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 7}),
}


def logits(build: BuildContext, folder: Path, load_format: str = "auto") -> Tensor:
    """[12, vocab] of TOKENS: a prompt in two chunks, then single tokens."""
    paged = Paged(load_model(read_spec(folder), folder, load_format, build), len(TOKENS))
    return torch.cat([paged.run((0, TOKENS[:5])), paged.run((0, TOKENS[5:10])), *(paged.run((0, [t])) for t in TOKENS[10:])])


@pytest.mark.parametrize("name", MODELS)
def test_ranks_have_the_logits_of_one(name: str, tmp_path: Path) -> None:
    family, config = MODELS[name]
    make_hf(family, **config).save_pretrained(tmp_path)
    want = logits(make_build(ops=REFERENCE), tmp_path)
    for size in (2, 4):
        found = on_ranks(size, lambda group: logits(dataclasses.replace(make_build(ops=REFERENCE), group=group), tmp_path))
        assert all(torch.equal(found[0], other) for other in found[1:]), "ranks would sample different tokens"
        torch.testing.assert_close(found[0], want, atol=1e-4, rtol=0.0)


def test_ranks_of_dummy_weights_share_one_model(tmp_path: Path) -> None:
    make_hf("Llama", num_key_value_heads=2, tie_word_embeddings=True).save_pretrained(tmp_path)
    want = logits(make_build(ops=REFERENCE), tmp_path, "dummy")
    for found in on_ranks(2, lambda group: logits(dataclasses.replace(make_build(ops=REFERENCE), group=group), tmp_path, "dummy")):
        torch.testing.assert_close(found, want, atol=1e-4, rtol=0.0)


# ---- every method

CONFIG = {"architectures": ["LlamaForCausalLM"], "vocab_size": 97, "hidden_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4,
          "num_key_value_heads": 2, "intermediate_size": 1024, "max_position_embeddings": 64, "torch_dtype": "float32"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}
QUANTIZATIONS: dict[str, Mapping[str, Any] | None] = {
    "dense": None,
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 64},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    "gptq, one group, 8 bits": {"quant_method": "gptq", "bits": 8, "group_size": -1, "desc_act": False},
    "fp8": {"quant_method": "fp8"},
    "fp8, static, blocks": {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [64, 128]},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {
        "all": {"targets": ["Linear"], "weights": INT4 | {"symmetric": False}}}, "ignore": ["lm_head"]},
    "gguf": {"quant_method": "gguf", "types": {f"layers.0.{name}": kind for name, kind in {
        "self_attn.q_proj": "Q4_K", "self_attn.k_proj": "Q4_K", "self_attn.v_proj": "Q6_K", "self_attn.o_proj": "Q8_0",
        "mlp.gate_proj": "Q5_0", "mlp.up_proj": "Q5_0", "mlp.down_proj": "Q6_K"}.items()}},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_shards_together_are_the_whole_parameter(name: str, size: int) -> None:
    """Of each checkpoint tensor, every number belongs to a rank, and ranks that share one have the same."""
    config = CONFIG | ({"quantization_config": quantization} if (quantization := QUANTIZATIONS[name]) else {})
    spec, method = parse_config(config, methods=METHODS), method_of(config)
    whole, ranks = parameters(spec, method), [parameters(spec, method, rank, size) for rank in range(size)]
    assert all(rank.keys() == whole.keys() for rank in ranks)
    sharded = 0
    for key, param in whole.items():
        for i, source in enumerate(param.sources):
            numbers = torch.arange(max(1, torch.Size(source.shape).numel())).view(source.shape)
            held = [torch.cat([piece.flatten() for piece in pieces(numbers, rank[key].sources[i], rank[key])]) for rank in ranks]
            assert torch.cat(held).unique().numel() == numbers.numel(), f"a rank lacks a part of {source.name}"
            sharded += len(held[0]) < numbers.numel()
        for rank in ranks:
            found = rank[key]
            joined = sum(length for s in found.sources for _, length in s.cuts or ()) + found.padding
            assert found.sources[0].cuts is None or found.shard_dim != found.concat_dim or joined == found.shape[found.concat_dim]
    assert sharded >= 6


def test_the_ranks_of_a_quantized_model_have_the_logits_of_one(tmp_path: Path) -> None:
    """Random bits as weights: `dummy` weights of several ranks are the parts of one model's."""
    for name, quantization in QUANTIZATIONS.items():
        if quantization is None or name == "bitsandbytes":
            continue
        config = CONFIG | {"quantization_config": quantization}
        (tmp_path / "config.json").write_text(json.dumps(config))
        spec, method = parse_config(config, methods=METHODS), method_of(config)

        def of_rank(group: ParallelGroup, spec: Any = spec, method: Any = method) -> Tensor:
            build = BuildContext(torch.device("cpu"), torch.float32, REFERENCE, method, group=group)
            paged = Paged(load_model(spec, tmp_path, "dummy", build), 4)
            return paged.run((0, TOKENS[:4]))

        want, (found, other) = of_rank(ParallelGroup()), on_ranks(2, of_rank)
        assert torch.equal(found, other), name
        assert float(want.abs().max()) > 0.01, name
        torch.testing.assert_close(found, want, atol=2e-3 * float(want.abs().max()), rtol=0.0, msg=lambda text: f"{name}: {text}")  # noqa: B023


# ---- what does not fit

@pytest.mark.parametrize(("size", "message"), [
    (3, "tensor_parallel_size 3 does not fit this model: it has 4 attention heads, which 3 does not divide; use one of 1, 2, 4$"),
    (8, "it has 4 attention heads"), (128, "vocab_size is 97"),
])
def test_a_size_that_does_not_divide_is_refused(size: int, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as error:
        shard_spec(parse_config(CONFIG), size)
    assert error.value.param == "tensor_parallel_size"


@pytest.mark.parametrize(("quantization", "inner", "message"), [
    ({"quant_method": "awq", "bits": 4, "group_size": 128}, 192, "layers.0.down: of its 192 inputs a rank would have 96, and the 2"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True}, 1024, "layers.0.o: its groups are not neighboring inputs"),
    ({"quant_method": "gguf", "types": {"layers.0.mlp.down_proj": "Q6_K"}}, 768, "layers.0.down: of its 768 inputs a rank would have 384"),
])
def test_a_quantized_weight_that_cannot_be_divided_is_refused(quantization: dict[str, Any], inner: int, message: str) -> None:
    config = CONFIG | {"intermediate_size": inner, "quantization_config": quantization}
    with pytest.raises(InvalidInput, match=message) as error:
        parameters(parse_config(config, methods=METHODS), method_of(config), 0, 2)
    assert error.value.param == "tensor_parallel_size"


def test_a_rank_keeps_its_part_only(tmp_path: Path) -> None:
    """The bytes that are planned for a rank are those that it takes from the checkpoint."""
    make_hf("Llama", num_key_value_heads=2).save_pretrained(tmp_path)
    spec = read_spec(tmp_path)
    with open_checkpoint(tmp_path) as found:
        assert len(found) > 20
    sizes = []
    for rank in range(4):
        build = dataclasses.replace(make_build(), group=ParallelGroup(rank, 4))
        needed = own_parameters(spec, build)
        sizes.append(sum(param.size for param in needed.values()))
        assert all(DummyWeights(needed, build, 0)(name).shape == param.shape for name, param in needed.items())
    whole = sum(param.size for param in parameters(spec).values())
    assert len(set(sizes)) == 1
    assert sizes[0] < 0.3 * whole


def test_a_plan_is_for_one_gpu_of_several() -> None:
    """The planned weights are those that a rank loads: half of the model, but for the norms."""
    one, two = (plan_model(EngineConfig(tensor_parallel_size=size), CONFIG, find_gpu("h200")) for size in (1, 2))
    build = BuildContext(torch.device("cpu"), torch.bfloat16, REFERENCE, group=ParallelGroup(1, 2))
    assert two.memory.weight_bytes == sum(param.size for param in own_parameters(parse_config(CONFIG), build).values()) * 2
    assert 0.5 < two.memory.weight_bytes / one.memory.weight_bytes < 0.51
    assert two.memory.token_bytes * 2 == one.memory.token_bytes
    assert two.memory.device == "each of 2 x NVIDIA H200"
    assert one.roofline is not None and two.roofline is not None
    assert two.roofline.tpot(1).floor < 0.51 * one.roofline.tpot(1).floor
