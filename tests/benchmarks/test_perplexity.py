"""bench.perplexity computes what Transformers computes, and its GGUF files hold the weights."""
from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from bench import cloze
from bench.gguf_files import encode_q4_k
from bench.perplexity import main, measure, nf4_rounded, read_ids

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def test_perplexity_equals_that_of_transformers(tiny_llama: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_llama()
    row = measure(str(folder), tokens=200, window=96, device="cpu", dtype="float32", num_gpu_blocks_override=64)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    windows = torch.tensor(read_ids(folder, 200)[:192]).view(2, 96)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert row["tokens"] == 190 and row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_q4_k_blocks_have_the_weights_nearly(shift: float) -> None:
    weight = np.random.default_rng(0).standard_normal((4, 512)).astype(np.float32) + shift
    found = dequantize(encode_q4_k(weight), GGMLQuantizationType.Q4_K)
    step = np.ptp(np.concatenate([weight.reshape(-1, 32), np.zeros((64, 1), np.float32)], 1), axis=1).max() / 15
    assert np.abs(found - weight).max() < 1.2 * step


def test_nf4_rounding_is_to_the_nearest_of_16_numbers_and_keeps_the_largest() -> None:
    weight = torch.randn(8, 128)
    rounded = nf4_rounded(weight)
    blocks, want = weight.view(-1, 64), rounded.view(-1, 64)
    assert all(len(block.unique()) <= 16 for block in want)
    index = blocks.abs().argmax(1, keepdim=True)
    assert torch.allclose(blocks.gather(1, index).abs(), want.gather(1, index).abs())
    assert (blocks - want).abs().max() <= 0.16 * blocks.abs().max() and torch.equal(nf4_rounded(rounded), rounded)


def test_every_question_has_different_answers_and_each_is_right_once_as_often_as_it_is_asked() -> None:
    asked = cloze.questions()
    assert len({prompt for prompt, _ in asked}) == len(asked) == 122
    assert all(len(set(answers)) == len(answers) == cloze.CHOICES for _, answers in asked)
    first = [answers[0] for _, answers in asked]
    everything = [answer for _, answers in asked for answer in answers]
    assert all(everything.count(answer) == cloze.CHOICES * first.count(answer) for answer in first)


def test_likelihoods_of_answers_equal_those_of_transformers(tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    from minivllm import LLM

    asked = cloze.questions()[::12]
    monkeypatch.setattr(cloze, "questions", lambda: asked)
    with LLM(model=str(folder := tiny_llama()), device="cpu", dtype="float32", num_gpu_blocks_override=64) as llm:
        found, right, encode = cloze.likelihoods(llm), cloze.score(llm), llm.get_tokenizer().encode
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def likelihood(prompt: str, answer: str) -> float:
        ids = torch.tensor([encode(f"{prompt} {answer}")])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        return logprobs.gather(1, ids[0, 1:, None])[len(encode(prompt)) - 1:].sum().item()

    want = [[likelihood(prompt, answer) for answer in answers] for prompt, answers in asked]
    assert torch.allclose(torch.tensor(found), torch.tensor(want), atol=1e-4)
    assert right == [row.index(max(row)) == 0 for row in want]


def test_the_standard_error_is_that_of_a_mean() -> None:
    assert cloze.standard_error(61, 122) == pytest.approx(np.std([0.0, 1.0] * 61) / 122 ** 0.5)


def test_the_task_refuses_settings_of_the_perplexity() -> None:
    with pytest.raises(SystemExit):
        main(["--task", "--tokens", "10"])
