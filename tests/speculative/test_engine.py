"""A draft model and a learned head in the whole engine change no token, and their drafts are accepted where they are right."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minivllm.kernels.tuning import SPECULATION, SpeculationCost
from tests.engine.test_drafts import REQUESTS, Tokens, build, generate
from tests.models.tiny import make_hf
from tests.speculative.heads import write_head

pytestmark = [pytest.mark.usefixtures("one_torch_thread"), pytest.mark.usefixtures("free_drafts")]

WAYS: dict[str, dict[str, Any]] = {
    "plain": {}, "ahead": {"async_scheduling": True}, "small chunks": {"max_num_batched_tokens": 11, "max_num_seqs": 8, "block_size": 4},
    "preempted": {"num_gpu_blocks_override": 20, "block_size": 8, "async_scheduling": True},
    "swapped": {"num_gpu_blocks_override": 20, "block_size": 8, "kv_offloading_size": 2**-8},
}


@pytest.fixture
def free_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts cost nothing, so as many as possible are verified."""
    monkeypatch.setitem(SPECULATION, "cpu", SpeculationCost(1e9, 0.0))


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


@pytest.fixture(scope="module")
def plain(folder: Path) -> Tokens:
    engine = build(folder)
    found = generate(engine, REQUESTS)[0]
    engine.close()
    return found


def config_of(folder: Path) -> dict[str, Any]:
    import json

    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def draft_folder(kind: str, target: Path, out: Path) -> Path:
    """A draft for the tiny model: the model itself, whose drafts are all right, another random model, or a random head."""
    config = config_of(target)
    if kind == "itself":
        return target
    if kind == "head":
        sizes = {name: config[name] for name in ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads",
                                                 "intermediate_size", "max_position_embeddings")}
        write_head(out, list(range(2, 300, 3)), **sizes)
    else:
        make_hf("Llama", vocab_size=config["vocab_size"], num_hidden_layers=1,
                max_position_embeddings=config["max_position_embeddings"]).save_pretrained(out)
    return out


@pytest.mark.parametrize(("kind", "way", "k"), [
    ("itself", "plain", 1), ("itself", "ahead", 4), ("itself", "small chunks", 8), ("itself", "preempted", 3), ("itself", "swapped", 5),
    ("other", "ahead", 2), ("other", "small chunks", 6), ("head", "plain", 8), ("head", "ahead", 3), ("head", "small chunks", 4),
    ("head", "preempted", 7), ("head", "swapped", 1)])
def test_drafts_change_no_token(folder: Path, plain: Tokens, tmp_path: Path, kind: str, way: str, k: int) -> None:
    draft = {"method": "eagle" if kind == "head" else "draft_model", "model": str(draft_folder(kind, folder, tmp_path)),
             "num_speculative_tokens": k}
    engine = build(folder, speculative_config=draft, **WAYS[way])
    for _ in range(2):  # the second time with cached prefixes
        assert generate(engine, REQUESTS)[0] == plain
    counts = engine.stats().drafts
    assert counts is not None and counts.num_drafts > 50
    if kind == "itself":  # also through preemption, swapping and cached prefixes: the draft's keys and values are those of the target's
        greedy = build(folder, speculative_config=draft, **WAYS[way])
        generate(greedy, {name: REQUESTS[name] for name in ("greedy", "other", "one token")})
        exact = greedy.stats().drafts
        assert exact is not None and exact.num_accepted >= 0.9 * exact.num_drafts
        greedy.close()
    engine.close()
