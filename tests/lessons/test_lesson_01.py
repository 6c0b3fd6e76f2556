"""Lesson 1: its claims and answers are correct, and its transformer computes the same function as minivllm's."""
from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from minivllm.families import kv_groups, parse_config
from minivllm.kernels import select
from minivllm.kernels.layout import InputBatch, KVLayer
from minivllm.layers.build import BuildContext
from minivllm.models.decoder import Decoder
from minivllm.models.loader import load_model
from tests.lessons.loading import Mistake, lesson_folder

FOLDER = lesson_folder("01")
DECODE = "        tokens = torch.tensor(out[-1:])"
MISTAKES = [
    Mistake(1, "return 2 * layers", "return layers", "a key AND a value"),
    Mistake(1, "* bytes_per_number * tokens", "* bytes_per_number", "the cache of one token"),
    Mistake(2, "<= torch.arange(total - new, total)[:, None]", "< total + torch.zeros(new, 1)", "EARLIER tokens"),
    Mistake(2, "<= torch.arange(total - new, total)[:, None]", "< torch.arange(total - new, total)[:, None]", "at least itself"),
    Mistake(2, "<= torch.arange(total - new, total)[:, None]", "<= torch.arange(new)[:, None]", "has position total - new, not 0"),
    Mistake(3, DECODE, "        tokens = torch.cat([prompt, torch.tensor(out)])", "computes the whole text again"),
    Mistake(3, DECODE, "        tokens = torch.tensor(out[:1])", "the input of the next step"),
    Mistake(3, "out.append(int(logits[-1]", "out.append(int(logits[0]", "the LAST row of the logits"),
    Mistake(4, "torch.cat([self.v[layer], v])", "v", "the keys and values of all tokens"),
]
NAMES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj",
         "up": "mlp.up_proj", "down": "mlp.down_proj", "norm1": "input_layernorm", "norm2": "post_attention_layernorm"}


@pytest.fixture
def weights(lesson: ModuleType) -> dict[str, torch.Tensor]:
    return lesson.random_weights(lesson.Shape(), seed=1)


def tokens(lesson: ModuleType, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(lesson.Shape().vocab, (n,), generator=torch.Generator().manual_seed(seed))


def decoder(lesson: ModuleType, weights: dict[str, torch.Tensor], folder: Path) -> Decoder:
    """The lesson's weights, written as a Llama checkpoint and loaded from there."""
    shape = lesson.Shape()
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.width, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "intermediate_size": shape.inner, "vocab_size": shape.vocab, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": True, "hidden_act": "silu",
    }))
    renamed = {"model.embed_tokens.weight": weights["embed"], "model.norm.weight": weights["final_norm"]}
    for name, tensor in weights.items():
        layer, _, part = name.partition(".")
        if part:
            renamed[f"model.layers.{layer}.{NAMES[part]}.weight"] = tensor
    save_file(renamed, folder / "model.safetensors")
    build = BuildContext(torch.device("cpu"), torch.float32, select(torch.device("cpu")))
    return load_model(parse_config(json.loads((folder / "config.json").read_text())), folder, "safetensors", build)


def paged_logits(model: Decoder, ids: torch.Tensor, chunks: list[int], block_size: int = 4) -> torch.Tensor:
    """Logits of every position, computed in chunks, with keys and values in scattered blocks."""
    (group,) = kv_groups(model.spec)
    needed = -(-len(ids) // block_size)
    table = torch.randperm(needed, generator=torch.Generator().manual_seed(3)) + 1  # block 0 is the null block
    shape = (needed + 1, block_size, group.kv_heads, group.head_dim)
    kv = [KVLayer(torch.full(shape, float("nan")), torch.full(shape, float("nan"))) for _ in group.layers]
    for layer in kv:  # the null block may be read
        layer.k[0] = layer.v[0] = 0.0
    out, start = [], 0
    for n in chunks:
        positions = torch.arange(start, start + n)
        slots = table[positions // block_size] * block_size + positions % block_size
        batch = InputBatch(
            tokens=ids[start:start + n].int(), positions=positions, query_start=torch.tensor([0, n], dtype=torch.int32),
            seq_lens=torch.tensor([start + n], dtype=torch.int32), slots=(slots,),
            block_tables=(table[None].int(),), logit_rows=torch.arange(n), num_decodes=int(n == 1), query_lens_host=(n,),
            seq_lens_host=(start + n,),
        )
        out.append(model.logits(model.forward(batch, kv, block_size)))
        start += n
    return torch.cat(out)


def test_both_ways_generate_the_same_letters(lesson: ModuleType, weights: dict[str, torch.Tensor]) -> None:
    prompt = tokens(lesson, 7)
    slow, _ = lesson.generate_without_cache(weights, lesson.Shape(), prompt, 40)
    fast, _, cache = lesson.generate_with_cache(weights, lesson.Shape(), prompt, 40)
    assert slow == fast
    assert len(cache) == 7 + 40 - 1, "the last token's key and value are never needed"


def test_rows_per_step_are_as_the_lesson_states(lesson: ModuleType, weights: dict[str, torch.Tensor]) -> None:
    prompt, n = tokens(lesson, 10), 5
    _, slow = lesson.generate_without_cache(weights, lesson.Shape(), prompt, n)
    _, fast, _ = lesson.generate_with_cache(weights, lesson.Shape(), prompt, n)
    assert [work.rows for work in slow] == [10, 11, 12, 13, 14]
    assert [work.rows for work in fast] == [10, 1, 1, 1, 1]


def test_flops_are_two_per_weight_and_four_per_key_and_query_number(
    lesson: ModuleType, weights: dict[str, torch.Tensor],
) -> None:
    shape, cache, work = lesson.Shape(), lesson.Cache(lesson.Shape()), lesson.Work()
    lesson.forward(weights, shape, tokens(lesson, 20), lesson.Work(), cache)
    lesson.forward(weights, shape, tokens(lesson, 1), work, cache)
    matrices = sum(w.numel() for w in weights.values() if w.dim() == 2)
    assert work.flops == 2 * matrices + 4 * shape.layers * shape.heads * shape.head_dim * 21


def test_the_answers_of_the_questions_are_correct(lesson: ModuleType) -> None:
    assert 50 * 100 + 50 * 49 // 2 == 6225  # question 1
    assert lesson.kv_bytes(30, 3, 64) == 23_040 and lesson.kv_bytes(30, 3, 64, 4096) == 90 * 2**20  # task 1
    assert 4 * 2**30 // (90 * 2**20) == 45
    assert len(lesson.LETTERS) == 19 and round(2 * 19 * 64 * (5328 - 96) / 1e6, 1) == 12.7  # question 3
    assert round(2 * 128_256 * 4096 * 5232 / 1e12, 1) == 5.5


def test_a_start_at_zero_breaks_only_the_way_with_the_cache(lesson: ModuleType, weights: dict[str, torch.Tensor]) -> None:
    """Question 2."""
    source = (FOLDER / "lesson.py").read_text(encoding="utf-8")
    old = "start = len(cache) if cache is not None else 0"
    assert source.count(old) == 1
    broken = ModuleType("broken_lesson")
    sys.modules[broken.__name__] = broken
    try:
        exec(compile(source.replace(old, "start = 0"), "lesson.py", "exec"), broken.__dict__)
        prompt = tokens(lesson, 9)
        right = lesson.generate_without_cache(weights, lesson.Shape(), prompt, 20)[0]
        assert broken.generate_without_cache(weights, lesson.Shape(), prompt, 20)[0] == right
        wrong = broken.generate_with_cache(weights, lesson.Shape(), prompt, 20)[0]
        assert wrong[0] == right[0] and wrong != right
    finally:
        del sys.modules[broken.__name__]


@pytest.mark.parametrize("chunks", [[41], [40, 1], [1] * 41, [13, 1, 27], [4, 8, 16, 13]])
def test_lesson_and_decoder_give_the_same_logits(
    lesson: ModuleType, weights: dict[str, torch.Tensor], tmp_path: Path, chunks: list[int],
) -> None:
    ids = tokens(lesson, 41)
    theirs = lesson.forward(weights, lesson.Shape(), ids, lesson.Work())
    ours = paged_logits(decoder(lesson, weights, tmp_path), ids, chunks)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_lesson_and_decoder_count_the_same_bytes_of_cache(lesson: ModuleType, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    spec = decoder(lesson, weights, tmp_path).spec
    per_token = sum(2 * len(g.layers) * g.kv_heads * g.head_dim * 4 for g in kv_groups(spec))
    shape = lesson.Shape()
    assert per_token == lesson.kv_bytes(shape.layers, shape.kv_heads, shape.head_dim, bytes_per_number=4)
