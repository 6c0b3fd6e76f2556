"""`minivllm train-draft` on a tiny model: the loss falls, and the head that it writes drafts what the training measured."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minivllm.errors import InvalidInput
from minivllm.models.decoder import Decoder
from minivllm.models.hub import ModelFiles
from minivllm.speculative.load import load_head
from minivllm.speculative.training.generations import Generation, generate
from minivllm.speculative.training.prompts import default_prompts, held_out_prompts
from minivllm.speculative.training.run import train_head, write_head
from minivllm.speculative.training.settings import TrainDraftConfig
from minivllm.speculative.training.start import start_network, target_tables
from minivllm.speculative.training.trainer import HeadTrainer, examples
from tests.models.tiny import hf_logits, load, make_hf, read_spec
from tests.speculative.heads import PagedDraft

PROMPTS = [[(5 * i + 3 * s) % 97 for i in range(4 + s % 3)] for s in range(24)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("target")
    make_hf("Llama", num_key_value_heads=2).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def target(folder: Path) -> Decoder:
    return load(folder)


@pytest.fixture(scope="module")
def answers(target: Decoder) -> list[Generation]:
    return list(generate(target, PROMPTS, max_tokens=24, temperature=[0.0] * 24, stop=[3], batch_size=10))


def test_generations_are_the_models_own(target: Decoder, folder: Path, answers: list[Generation]) -> None:
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(folder).eval()
    norm = oracle.model.norm
    for g, prompt in zip(answers[:12], PROMPTS, strict=False):
        tokens = g.tokens.tolist()
        assert tokens[: g.prompt_len] == prompt
        best = hf_logits(oracle, tokens).argmax(-1)
        assert g.targets.tolist() == best.tolist()
        assert tokens[g.prompt_len :] == best[g.prompt_len - 1 : -1].tolist()
        assert len(tokens) == g.prompt_len + 23 or int(best[-1]) == 3, "an answer ends at its limit or before the stop token"
        states = oracle.model(torch.tensor([tokens])).last_hidden_state[0]
        torch.testing.assert_close(norm(g.hidden.float()), states, atol=1e-4, rtol=1e-4)


def test_training_raises_acceptance_and_the_written_head_drafts_as_measured(target: Decoder, folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    config = TrainDraftConfig(num_prompts=24, max_tokens=24, draft_vocab_size=60, epochs=30, learning_rate=1e-2, batch_tokens=256, steps=2)
    network, tables, acceptance = train_head(target, PROMPTS, PROMPTS[:8], [3], config, said.append)
    assert acceptance[0] > 0.25, said  # chance is 1 in 97
    assert acceptance == sorted(acceptance, reverse=True)
    write_head(tmp_path, network, tables, target, ModelFiles("tiny", folder, {"rope_theta": 10000.0}, {}, None))
    head = load_head(tmp_path, read_spec(tmp_path), target.build, target, num_drafts=2, group=0)
    right, count = 0, 0
    for g in generate(target, PROMPTS[:8], max_tokens=24, temperature=[0.0] * 8, stop=[3]):
        tokens = g.tokens.tolist()
        paged = PagedDraft(target, read_spec(tmp_path), capacity=64)
        drafts = paged.propose(head, (0, tokens[: g.prompt_len]), newest=[int(g.targets[g.prompt_len - 1])])
        for at in range(g.prompt_len, len(tokens)):
            right, count = right + (drafts[0][0] == int(g.targets[at])), count + 1
            drafts = paged.propose(head, (0, [tokens[at]]), newest=[int(g.targets[at])])
    assert right / count == pytest.approx(acceptance[0], abs=0.1)


def test_the_loss_falls_from_the_fitted_start(target: Decoder, answers: list[Generation]) -> None:
    tables = target_tables(target, torch.arange(97))
    batches = examples(answers, tables, 300, torch.device("cpu"))
    trainer = HeadTrainer(start_network(target, tables, batches), tables, steps=3, learning_rate=3e-3)
    before = trainer.acceptance(batches, 3)
    assert before[0] > 0.1, "least squares alone finds something; chance is 1 in 97"
    losses = [loss for _, loss in trainer.run(batches, epochs=8)]
    alone = int(0.6 * len(losses))  # steps of the draft alone
    assert sum(losses[alone - 3 : alone]) < sum(losses[:3])
    assert sum(losses[-3:]) < sum(losses[alone + 1 : alone + 4])
    assert trainer.acceptance(batches, 3)[0] > before[0]


def test_prompts_for_measuring_are_never_trained_on() -> None:
    train, held_out = default_prompts(3000), held_out_prompts(1000)
    assert len(set(train[:2000])) == 2000
    assert len(set(train)) < 3000, "they come again"
    assert not set(train) & set(held_out)


@pytest.mark.parametrize(("settings", "says"), [
    ({"epochs": 0}, "epochs must be in 1 .. 10000, got 0"),
    ({"max_tokens": 8, "steps": 8}, "max_tokens 8 is too short for 8 drafts in a row"),
])
def test_wrong_settings_are_named(settings: dict[str, int], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        TrainDraftConfig(**settings)  # type: ignore[arg-type]
