"""A draft model proposes what it would generate alone, whatever the cache of the target went through."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm.models.decoder import Decoder
from minivllm.speculative.draft_model import DraftModel
from tests.models.tiny import load, make_hf
from tests.speculative.heads import PagedDraft


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    out = tmp_path_factory.mktemp("target")
    make_hf("Llama", num_key_value_heads=2).save_pretrained(out)
    return load(out)


def greedy(model: Any, tokens: list[int], count: int) -> list[int]:
    """By Transformers, without a cache."""
    tokens = list(tokens)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[-count:]


@pytest.mark.parametrize(("family", "sizes"), [
    ("Llama", {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}),
    ("Mistral", {"num_hidden_layers": 2, "sliding_window": 5, "num_key_value_heads": 2}),  # windows in the blocks of full attention
])
@pytest.mark.parametrize("stores", [False, True])
def test_drafts_equal_the_drafts_own_generation(target: Decoder, tmp_path: Path, family: str, sizes: dict[str, Any], stores: bool) -> None:
    """stores: without drafts after one of the steps."""
    oracle = make_hf(family, **sizes)
    oracle.save_pretrained(tmp_path)
    model = load(tmp_path)
    proposer = DraftModel(model, num_target_layers=3, num_drafts=3, group=0)
    paged = PagedDraft(target, model.spec, capacity=40, num_seqs=2)
    prompts = [[(7 * i + 11 * s) % 97 for i in range(9 + 4 * s)] for s in range(2)]
    paged.propose(proposer, (0, prompts[0][:5]), newest=[prompts[0][5]])
    assert paged.propose(proposer, (0, prompts[0][5:]), newest=[21]) == [greedy(oracle, [*prompts[0], 21], 3)]
    drafts = paged.propose(proposer, (0, [21]), (1, prompts[1]), newest=[33, 44], stores=stores)
    first, second = [*prompts[0], 21, 33], [*prompts[1], 44]
    assert stores or drafts == [greedy(oracle, first, 3), greedy(oracle, second, 3)]
    # all three drafts of the first sequence are kept, and one of the second's
    drafts = paged.propose(proposer, (0, [33, 5, 6, 70]), (1, [44, 8, 9, 10]), newest=[51, 52], kept=[4, 2])
    assert drafts == [greedy(oracle, [*first, 5, 6, 70, 51], 3), greedy(oracle, [*second, 8, 52], 3)]
