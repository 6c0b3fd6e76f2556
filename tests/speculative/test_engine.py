"""A draft model and a learned head in the whole engine change no token, and their drafts are accepted where they are right."""
from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm.kernels.tuning import SPECULATION, SpeculationCost
from minivllm.worker.drafts import DraftRunner, Proposals
from tests.engine.test_drafts import REQUESTS, Tokens, build, generate
from tests.engine.test_speculation import FORMATS
from tests.models.tiny import make_hf
from tests.speculative.heads import write_head
from tests.speculative.skipping import skipping

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
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def speculative(kind: str, target: Path, out: Path, k: int) -> dict[str, Any]:
    method = "eagle" if kind == "head" else "draft_model"
    return {"method": method, "model": str(draft_folder(kind, target, out)), "num_speculative_tokens": k}


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
    ("itself", "plain", 1), ("itself", "small chunks", 4), ("itself", "preempted", 3), ("other", "ahead", 2), ("head", "small chunks", 4),
    ("head", "swapped", 5)])
def test_drafts_change_no_token(folder: Path, plain: Tokens, tmp_path: Path, kind: str, way: str, k: int) -> None:
    engine = build(folder, speculative_config=speculative(kind, folder, tmp_path, k), **WAYS[way])
    some = {name: REQUESTS[name] for name in ("greedy", "other", "short")}
    assert generate(engine, some)[0] == {name: tokens for name, tokens in plain.items() if name.partition("#")[0] in some}
    counts = engine.stats().drafts
    assert counts is not None and counts.num_drafts > 10
    if kind == "itself":  # its keys and values are those of the target, also after preemption and in chunks
        assert counts.num_accepted >= 0.9 * counts.num_drafts
    assert generate(engine, REQUESTS)[0] == plain  # partly with cached prefixes
    engine.close()


@pytest.mark.parametrize(("kind", "way"), [
    ("itself", "plain"), ("itself", "ahead"), ("itself", "preempted"), ("itself", "swapped"), ("head", "plain"), ("head", "ahead"),
    ("head", "preempted")])
def test_steps_without_proposals_change_no_token_and_lose_no_keys(
    folder: Path, plain: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, way: str,
) -> None:
    """Drafts stop and start again. Those of the model itself are right after a pause too, so its keys and values have no gap."""
    def recorded(self: DraftRunner, packed: Any, hidden: Any, kept: Any, proposes: bool) -> Proposals:
        steps.append(proposes)
        keys, slots = self._kv.layers[-1].k.flatten(0, 1), packed.batch.slots[0]  # of the draft
        keys[slots] = torch.nan
        found = propose(self, packed, hidden, kept, proposes)
        assert not keys[slots].isnan().any()
        return found

    propose, steps = DraftRunner.propose, list[bool]()
    monkeypatch.setattr(DraftRunner, "propose", recorded)
    skipping(monkeypatch, 25)
    engine = build(folder, speculative_config=speculative(kind, folder, tmp_path, 3), **WAYS[way])
    assert generate(engine, REQUESTS)[0] == plain
    assert sum(not before and after for before, after in pairwise(steps)) >= 2 and steps.count(False) >= 6, steps
    some = {name: REQUESTS[name] for name in ("greedy", "other", "short")}
    before = engine.stats().drafts
    assert generate(engine, some)[0] == {name: tokens for name, tokens in plain.items() if name.partition("#")[0] in some}
    after = engine.stats().drafts
    assert before is not None and after is not None and after.num_drafts > before.num_drafts
    if kind == "itself":
        assert after.num_accepted - before.num_accepted >= 0.9 * (after.num_drafts - before.num_drafts)
    engine.close()


EVERY_K = [("itself", k) for k in (2, 5, 6, 7, 8)] + [("head", k) for k in (1, 2, 3, 6, 7, 8)]  # with those above: 1 to 8
FEW = ("other", "seeded", "grammar")


@pytest.fixture(scope="module")
def plain_in(folder: Path) -> Callable[[str], Tokens]:
    """The tokens of a few requests without drafts, in a format of weights or cache."""
    @lru_cache
    def found(form: str) -> Tokens:
        return few(folder, form)

    return found


def few(folder: Path, form: str, **config: Any) -> Tokens:
    engine = build(folder, **FORMATS.get(form, {}), **config)
    found = generate(engine, {name: REQUESTS[name] for name in FEW})[0]
    counts = engine.stats().drafts
    assert counts is None or counts.num_drafts > 10
    engine.close()
    return found


@pytest.mark.parametrize(("kind", "k"), EVERY_K)
def test_every_number_of_drafts_changes_no_token(
    folder: Path, plain_in: Callable[[str], Tokens], tmp_path: Path, kind: str, k: int,
) -> None:
    form = {6: "fp8 cache", 7: "int8 weights"}.get(k, "")
    config = {"speculative_config": speculative(kind, folder, tmp_path, k), "async_scheduling": k % 2 == 0, "block_size": 8}
    assert few(folder, form, **config) == plain_in(form)


@pytest.mark.parametrize("kind", ["other", "head"])
def test_sampled_drafts_change_no_greedy_token(folder: Path, plain: Tokens, tmp_path: Path, kind: str) -> None:
    config = {**speculative(kind, folder, tmp_path, 3), "draft_sample_method": "probabilistic"}
    engine = build(folder, speculative_config=config, async_scheduling=True)
    found = generate(engine, {name: REQUESTS[name] for name in ("greedy", "seeded", "other")})[0]
    assert {name: found[name] for name in ("greedy#0", "other#0")} == {name: plain[name] for name in ("greedy#0", "other#0")}
    assert len(found["seeded#0"]) == 20
    engine.close()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["itself", "head"])
@pytest.mark.parametrize("eager", [True, False])
def test_drafts_change_no_token_on_a_gpu(folder: Path, tmp_path: Path, kind: str, eager: bool) -> None:
    some = {name: REQUESTS[name] for name in ("greedy", "other", "seeded", "short", "children")}
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        plain = build(folder, device="cuda", enforce_eager=eager)
        wanted = generate(plain, some)[0]
        plain.close()
        engine = build(folder, device="cuda", enforce_eager=eager, speculative_config=speculative(kind, folder, tmp_path, 3))
        greedy = {name: REQUESTS[name] for name in ("greedy", "other", "short")}
        assert generate(engine, greedy)[0] == {name: tokens for name, tokens in wanted.items() if name.partition("#")[0] in greedy}
        counts = engine.stats().drafts
        assert generate(engine, some)[0] == wanted  # sampled tokens are seldom those of a greedy draft
        engine.close()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    assert counts is not None and counts.num_drafts > 0
    assert kind == "head" or counts.accepted_per_position[0] >= 0.9 * counts.num_steps
