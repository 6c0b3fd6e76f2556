"""Times without drafts in an engine, to test that they begin and end well."""
from __future__ import annotations

from itertools import count

import pytest

from minivllm.core import step_planner
from minivllm.engine.speculation import SequenceDrafts
from minivllm.speculative.adaptive import Acceptance


def skipping(monkeypatch: pytest.MonkeyPatch, period: int) -> None:
    """For `period` results drafts pay, for the next two periods they do not, and so on. While they do not, the fifth step is a probe."""
    calls = count()
    monkeypatch.setattr(step_planner, "PROBE_STEPS", 5)
    monkeypatch.setattr(SequenceDrafts, "observe", lambda self, tokens: None)  # right drafts do not end the pause
    monkeypatch.setattr(Acceptance, "length", lambda self, seqs, most, cost: 0 if next(calls) // period % 3 else most)
