"""The benchmark of speculative decoding: its scripted proposer is right exactly as often as it says, also in bfloat16."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import models, speculation
from minivllm.kernels.tuning import SPECULATION, SpeculationCost
from minivllm.speculative.adaptive import Acceptance, expected_gain

pytestmark = pytest.mark.usefixtures("one_torch_thread")

LAYERS = 8


@pytest.mark.parametrize("tied", [True, False])
def test_a_scripted_proposer_has_the_acceptance_that_was_requested(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The number of steps with i right drafts or more differs from the exact share by less than 2 for each of the 2 streams."""
    monkeypatch.setitem(models.SHAPES, "deep", {**models.SHAPES["tiny"], "num_hidden_layers": LAYERS, "tie_word_embeddings": tied})
    monkeypatch.setattr(Acceptance, "length", lambda self, num_seqs, most, cost: most)
    monkeypatch.setattr("sys.argv", ["speculation", "scripted", "--dtype", "bfloat16", "--tokens", "81", "--repeats", "1", "--drafts", "3"])
    args = speculation.parse()
    models.write_config("deep", tmp_path)
    for rate in (0.0, 0.8) if tied else (0.5, 1.0):
        engine = speculation.engine_of(str(tmp_path), args, rate)
        counts = speculation.measure(engine, [[5, 6, 7, 8], [9, 6, 7]], args, 2).drafts
        engine.close()
        expected = [counts.num_steps * rate**i for i in (1, 2, 3)]
        assert counts.accepted_per_position == pytest.approx(expected, abs=0 if rate in (0, 1) else 4), rate
        assert speculation.acceptance_of(counts) == pytest.approx(rate, abs=0 if rate == 0 else 0.03)


def test_drafts_that_are_never_right_end_soon(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command, with the engine's rule: it lets few steps verify wrong drafts, and all steps verify right ones."""
    monkeypatch.setitem(SPECULATION, "cpu", SpeculationCost(200.0, 0.3, 16))
    monkeypatch.setattr("sys.argv", ["speculation", "scripted", "--shape", "tiny", "--dtype", "bfloat16", "--tokens", "81",
                                     "--repeats", "1", "--threads", "1", "--acceptance", "0,1", "--adaptive"])
    speculation.main()
    never, always = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert 1 <= never["steps"] <= 10 and never["acceptance"] == 0 and "arithmetic" not in never
    assert always["acceptance"] == 1 and always["steps"] * 5 >= 75


def test_the_share_of_copied_tokens_counts_whole_sequences() -> None:
    prompt = [1, 2, 3, 4, 5, 6]
    assert speculation.share_copied(prompt, [9, 2, 3, 4, 5, 6, 9, 1, 2, 3]) == 0.5
    assert speculation.share_copied(prompt, []) == 0.0


def test_the_break_even_table_has_the_models_gain_and_the_rules_length(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    cost = SpeculationCost(100.0, 0.25, 16)
    monkeypatch.setitem(SPECULATION, "cuda", cost)
    monkeypatch.setattr("sys.argv", ["speculation", "breakeven", "--device", "cuda", "--drafts", "2", "--acceptance", "0.1,0.9",
                                     "--streams", "1,16,17"])
    speculation.main()
    *_, low, high, pays = (line.split() for line in capsys.readouterr().out.splitlines())
    assert expected_gain(0.9, 1, 2, cost) == pytest.approx((1 + 0.9 + 0.81) * 1.01 / (1.25 + 0.03))
    assert low == ["0.10", "-", "-", "-"]
    assert high == ["0.90", f"{expected_gain(0.9, 1, 2, cost):.2f}", "(k=2)", f"{expected_gain(0.9, 16, 2, cost):.2f}", "(k=2)", "-"]
    assert 0.2 < float(pays[2]) < float(pays[3]) < 0.9 and pays[4] == "-"
