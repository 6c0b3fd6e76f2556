"""Lesson 18: its text, its events and its figures are those of minivllm's server and load generator."""
from __future__ import annotations

import random
from array import array
from pathlib import Path
from types import ModuleType

import pytest

from minivllm.benchmarks.outcome import RequestOutcome
from minivllm.benchmarks.report import summarize
from minivllm.benchmarks.statistics import percentile
from minivllm.core.stopping import StopRule
from minivllm.engine.detokenizer import SequenceText
from minivllm.engine.tokenizer import Tokenizer
from minivllm.sampling_params import SamplingParams
from minivllm.server import formatters
from tests.conftest import write_tiny_tokenizer
from tests.lessons.loading import Mistake

KEEP = "keep = next(n for n in range(len(self.stop) - 1, -1, -1) if text.endswith(self.stop[:n]))"
GOOD = "good = sum(bool(o.times) and o.ttft() <= ttft_ms and o.tpot() <= tpot_ms for o in outcomes)"
MISTAKES = [
    Mistake(1, "self.held + self.decoder.decode(token)", 'self.held + token.decode(errors="replace")', "first half of a character"),
    Mistake(1, KEEP, "keep = 0", "hold it back"),
    Mistake(1, "            return before\n", "            return text.replace(self.stop, '')\n", "what follows the stop string"),
    Mistake(1, KEEP, "keep = min(len(self.stop) - 1, len(text))", "send it at once"),
    Mistake(2, "        self.data += piece\n", "        self.data = piece\n", "keep the bytes of an incomplete event"),
    Mistake(2, "json.loads(text) for text in texts if", "json.loads(text) for text in texts[:1] if", "all three are complete"),
    Mistake(3, GOOD, GOOD.replace("o.ttft() <= ttft_ms and ", ""), "BOTH objectives"),
    Mistake(3, "return good / seconds", "return good * len(outcomes[0].times) / seconds", "count those"),
    Mistake(4, "    return 64, None\n", "    return 256, None\n", "64 rows at most"),
]


def test_lesson_and_server_send_the_same_pieces_of_text(lesson: ModuleType, tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    tokenizer, dice, stopped = Tokenizer(tmp_path), random.Random(0), 0
    for stop in ("then", "é🐙", "hehe!"):
        params = SamplingParams(stop=[stop], max_tokens=100)
        for _ in range(40):
            text = "".join(dice.choice(["the ", "th", "é", "🐙", "he", "!", "then", "é🐙"]) for _ in range(12))
            ours, theirs = lesson.TextStream(stop), SequenceText(tokenizer.stream(), params, StopRule.of(params, (), 100))
            for token in tokenizer.encode(text):
                found = ours.push(tokenizer.token_bytes(token))
                stop_found = theirs.push([token])
                assert found == theirs.take(stop_found is not None)
                assert ours.ended == (stop_found is not None)
                if ours.ended:
                    break
            stopped += ours.ended
            assert ours.ended or ours.finish() == theirs.take(True)
    assert 20 < stopped < 110


def test_lesson_reads_the_events_of_the_server(lesson: ModuleType) -> None:
    bodies = [{"choices": [{"text": text}]} for text in ("a", "\n\n", "🐙", "data: ")]
    data = b"".join(map(formatters.event, bodies)) + formatters.DONE
    assert data.endswith(lesson.event(lesson.DONE))
    for size in (1, 7, 1000):
        reader = lesson.EventReader()
        assert [one for i in range(0, len(data), size) for one in reader.push(data[i:i + size])] == bodies


@pytest.mark.parametrize("rate", [5, 20])
def test_lesson_and_load_generator_compute_the_same_figures(lesson: ModuleType, rate: int) -> None:
    found = lesson.simulate(rate, count=200)
    outcomes = [RequestOutcome(start=o.start / 1e3, end=o.times[-1] / 1e3, times=array("d", [t / 1e3 for t in o.times])) for o in found]
    result = summarize(outcomes[0].start, outcomes, metrics=["ttft", "tpot"], percentiles=[99.0], objectives={"ttft": 500.0, "tpot": 40.0},
                       prompt_tokens=[200] * len(found))
    assert lesson.goodput(found, 500.0, 40.0) == pytest.approx(result["request_goodput"])
    ttft = [o.ttft() for o in found]
    assert lesson.percentile(ttft, 99) == pytest.approx(percentile(ttft, 99)) == pytest.approx(result["p99_ttft_ms"])
    assert lesson.percentile(ttft, 50) == pytest.approx(result["median_ttft_ms"])
