"""The benchmark of speculative decoding: its scripted proposer is right exactly as often as it says, also in bfloat16."""
from __future__ import annotations

from pathlib import Path

import pytest

from bench import models, speculation
from minivllm.speculative.adaptive import Acceptance

pytestmark = pytest.mark.usefixtures("one_torch_thread")

LAYERS = 8


@pytest.mark.parametrize("tied", [True, False])
def test_a_scripted_proposer_has_the_acceptance_that_was_requested(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(models.SHAPES, "deep", {**models.SHAPES["tiny"], "num_hidden_layers": LAYERS, "tie_word_embeddings": tied})
    monkeypatch.setattr(Acceptance, "length", lambda self, num_seqs, most, cost: most)
    monkeypatch.setattr("sys.argv", ["speculation", "scripted", "--dtype", "bfloat16", "--tokens", "81", "--repeats", "1"])
    args = speculation.parse()
    models.write_config("deep", tmp_path)
    for rate in (0.0 if tied else 0.5, 1.0):
        engine = speculation.engine_of(str(tmp_path), args, 3, rate)
        _, counts = speculation.measure(engine, [[5, 6, 7, 8], [9, 6, 7]], args)
        engine.close()
        accepted = [n / counts.num_steps for n in counts.accepted_per_position]
        assert accepted == pytest.approx([rate, rate**2, rate**3], abs=0 if rate in (0, 1) else 0.15), rate
