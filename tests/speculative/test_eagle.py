"""A head in EAGLE's layout proposes what EAGLE's own forward pass proposes, whatever the cache went through."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minivllm.errors import ModelError
from minivllm.models.decoder import Decoder
from minivllm.speculative.load import load_head
from tests.models.tiny import load, make_hf, read_spec
from tests.speculative.heads import PagedDraft, eagle_drafts, write_head

VOCABULARY = [*range(3, 80, 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("target")
    make_hf("Llama", num_key_value_heads=2).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def target(folder: Path) -> Decoder:
    return load(folder)


class Oracle:
    """The target by Transformers, and EAGLE's forward pass on its hidden states."""

    def __init__(self, folder: Path, weights: dict[str, Tensor], vocabulary: list[int] | None) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.weights, self.vocabulary = weights, vocabulary

    @torch.no_grad()
    def __call__(self, tokens: list[int], count: int) -> list[int]:
        """tokens: all known ones, the newest included."""
        hidden = self.model.model(torch.tensor([tokens[:-1]])).last_hidden_state[0]
        return eagle_drafts(self.weights, self.model.model.embed_tokens.weight, self.model.lm_head.weight, hidden, tokens, count,
                            self.vocabulary)


@pytest.mark.parametrize(("vocabulary", "stores"), [(None, False), (VOCABULARY, False), (None, True)])
def test_drafts_equal_eagle_through_chunks_decodes_and_rejections(
    target: Decoder, folder: Path, tmp_path: Path, vocabulary: list[int] | None, stores: bool,
) -> None:
    """stores: without drafts after two of the steps."""
    oracle = Oracle(folder, write_head(tmp_path, vocabulary), vocabulary)
    head = load_head(tmp_path, read_spec(tmp_path), target.build, target, num_drafts=4, group=0)
    paged = PagedDraft(target, read_spec(tmp_path), capacity=40, num_seqs=3)
    prompts = [[(7 * i + 11 * s) % 97 for i in range(9 + 4 * s)] for s in range(2)]
    # the first sequence alone in two chunks; the second one's prompt beside a decode of the first
    paged.propose(head, (0, prompts[0][:5]), newest=[prompts[0][5]])
    drafts = paged.propose(head, (0, prompts[0][5:]), newest=[21])
    assert drafts == [oracle([*prompts[0], 21], 4)]
    drafts = paged.propose(head, (0, [21]), (1, prompts[1]), newest=[33, 44], stores=stores)
    first, second = [*prompts[0], 21, 33], [*prompts[1], 44]
    assert stores or drafts == [oracle(first, 4), oracle(second, 4)]
    # a verification: of 3 drafts, the first sequence keeps 2 and the second one none
    drafts = paged.propose(head, (0, [33, 5, 6, 70]), (1, [44, 8, 9, 10]), newest=[51, 52], kept=[3, 1], stores=stores)
    assert stores or drafts == [oracle([*first, 5, 6, 51], 4), oracle([*second, 52], 4)]
    drafts = paged.propose(head, (0, [51]), (1, [52]), newest=[1, 2])
    assert drafts == [oracle([*first, 5, 6, 51, 1], 4), oracle([*second, 52, 2], 4)]
    if vocabulary is not None:
        assert set(drafts[0] + drafts[1]) <= set(vocabulary)


def test_published_files_load_with_their_extras(target: Decoder, folder: Path, tmp_path: Path) -> None:
    """A pytorch_model.bin with a copy of the embedding table and a bias of fc, as in the first published heads."""
    weights = write_head(tmp_path)
    bias = torch.linspace(-1, 1, 48)
    torch.save({**weights, "fc.bias": bias, "embed_tokens.weight": torch.zeros(97, 48)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    head = load_head(tmp_path, read_spec(tmp_path), target.build, target, num_drafts=1, group=0)
    x = torch.randn(3, 96)
    torch.testing.assert_close(head._fc(x), F.linear(x, weights["fc.weight"], bias))


def test_a_missing_or_unknown_tensor_is_named(target: Decoder, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = write_head(tmp_path)
    del weights["layers.0.mlp.up_proj.weight"]
    save_file({**weights, "layers.1.mlp.up_proj.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"missing: layers.0.mlp.up_proj.weight.*unexpected: layers.1.mlp.up_proj.weight"):
        load_head(tmp_path, read_spec(tmp_path), target.build, target, num_drafts=1, group=0)


def test_a_reduced_vocabulary_outside_the_targets_is_refused(target: Decoder, tmp_path: Path) -> None:
    write_head(tmp_path, [5, 97])
    with pytest.raises(ModelError, match="d2t names tokens outside the vocabulary of 97"):
        load_head(tmp_path, read_spec(tmp_path), target.build, target, num_drafts=1, group=0)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 97
