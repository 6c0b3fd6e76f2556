"""A head in captured steps: the kernels of a GPU, interpreted, and graphs whose replay repeats the step."""
from __future__ import annotations

from pathlib import Path

import pytest

from minivllm.kernels.tuning import SPECULATION, SpeculationCost
from minivllm.speculative.load import load_head
from tests.engine.test_drafts import Tokens
from tests.kernels import test_captured_drafts as captured
from tests.kernels.test_captured_drafts import emulated as emulated
from tests.kernels.test_captured_drafts import expected as expected
from tests.kernels.test_captured_drafts import plain as plain
from tests.kernels.test_captured_drafts import pytestmark as pytestmark
from tests.kernels.test_captured_steps import Repeated, Tiny
from tests.models.tiny import read_spec
from tests.speculative.heads import write_head
from tests.speculative.skipping import skipping


def test_the_drafts_of_a_head_change_no_token(plain: Tiny, expected: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if some steps make no drafts."""
    skipping(monkeypatch, 2)
    monkeypatch.setitem(SPECULATION, "cpu", SpeculationCost(1e9, 0.0, 1000))
    model = plain.with_triton
    spec, layer = model.spec, model.spec.layers[0]
    write_head(tmp_path, vocab_size=spec.vocab_size, hidden_size=spec.hidden_size, num_attention_heads=layer.attention.num_heads,
               num_key_value_heads=layer.attention.num_kv_heads, intermediate_size=layer.mlp.intermediate_size)
    draft = read_spec(tmp_path)
    head = load_head(tmp_path, draft, model.build, model, num_drafts=3, group=0)
    Repeated.replayed.clear()
    Repeated.num_stores.clear()
    found, core = captured.generate(plain, head, (1, 4), draft=draft)
    assert found == expected
    counts = core.stats().drafts
    assert counts is not None and counts.num_drafts > 0
    assert any(shape.query_width == 4 for shape in Repeated.replayed)
    assert Repeated.num_stores
