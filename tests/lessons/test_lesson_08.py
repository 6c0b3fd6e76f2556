"""Lesson 8: its lower bounds are those of `minivllm plan`."""
from __future__ import annotations

from types import ModuleType

import pytest

from minivllm.families import parse_config
from minivllm.planning.gpus import GPUS
from minivllm.planning.roofline import Roofline
from tests.lessons.loading import Mistake

MISTAKES = [
    Mistake(1, "return model.weights() * model.bytes_per_number + sequences * context * model.kv_bytes()",
            "return sequences * (model.weights() * model.bytes_per_number + context * model.kv_bytes())", "once per sequence"),
    Mistake(1, "sequences * context * model.kv_bytes()", "context * model.kv_bytes()", "keys of one sequence"),
    Mistake(1, "attention = 2 * 2 * context * model.layers * model.heads", "attention = 2 * 2 * context * model.layers * model.kv_heads",
            "GQA saves bytes"),
    Mistake(2, "return max(num_bytes / (machine.bandwidth * 1e6), flops / (machine.tflops * 1e9))",
            "return num_bytes / (machine.bandwidth * 1e6) + flops / (machine.tflops * 1e9)", "at the same time"),
    Mistake(2, "return min(machine.tflops, flops_per_byte * machine.bandwidth / 1000)", "return flops_per_byte * machine.bandwidth / 1000",
            "no intensity makes"),
    Mistake(3, "return weights_ms / (flops_ms - keys_ms) if flops_ms > keys_ms else math.inf",
            "return weights_ms / (flops_ms - keys_ms)", "return math.inf"),
    Mistake(3, "return weights_ms / (flops_ms - keys_ms) if flops_ms > keys_ms else math.inf", "return weights_ms / flops_ms", "not equal"),
    Mistake(4, "return x @ weight.T", "return x[:, ::2] @ weight[:, ::2].T * 2", "At most 2%"),
]
CONFIGS = {  # as in the models' config.json
    "QWEN": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28,
             "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936,
             "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True, "hidden_act": "silu"},
    "MISTRAL": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
                "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336, "vocab_size": 32000,
                "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "tie_word_embeddings": True,
                "hidden_act": "silu"},
}


def test_the_cards_are_those_of_plan(lesson: ModuleType) -> None:
    for card, name in zip(lesson.CARDS, ("rtx4060", "a100", "h200"), strict=True):
        assert (card.bandwidth, card.tflops) == (GPUS[name].bandwidth, GPUS[name].tflops)


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize(("sequences", "context"), [(1, 0), (1, 1000), (64, 1000), (256, 100)])
def test_lesson_and_plan_predict_the_same_bound(lesson: ModuleType, name: str, sequences: int, context: int) -> None:
    model, card, spec = getattr(lesson, name), lesson.CARDS[0], parse_config(CONFIGS[name])
    roofline = Roofline(spec, GPUS["rtx4060"], model.weights() * 2, model.kv_bytes() // model.layers, chunk=2048)
    ours = lesson.step_ms(card, lesson.decode_bytes(model, sequences, context), lesson.decode_flops(model, sequences, context))
    assert ours == pytest.approx(roofline.tpot(sequences, context).floor)
