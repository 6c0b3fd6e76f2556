"""The capstone about scheduling policies: its load is the one that the package's load generator sends, and its patch works as printed."""
from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

from minivllm import scheduling_policy
from minivllm.benchmarks.serving import trace_requests
from minivllm.core.simulate import nearest_rank
from minivllm.course.grading import load as load_module
from tests.lessons.loading import LESSONS, Mistake

FOLDER = LESSONS / "capstone_policy"
WORK = "tokens * (cost.base + rows * cost.per_token)"
AGING = "return request.arrival_time + min(self.weight * work, self.patience)"
MISTAKES = [
    Mistake(1, f" + {WORK}", "", "outputs are most of the work"),
    Mistake(1, WORK, "tokens * (cost.base + cost.per_token)", "does not compute this request only"),
    Mistake(1, "longest if request.params.max_tokens is None else request.params.max_tokens", "request.params.max_tokens", "gave no limit"),
    Mistake(1, "return seconds_of_work(request, self.cost", "return -seconds_of_work(request, self.cost", "a LOW rank"),
    Mistake(2, "(later - earlier)", "(first - earlier - 1)", "how long the request waited"),
    Mistake(2, "return max(pairs", "return min(pairs", "the largest difference counts"),
    Mistake(2, "second < first", "second <= first", "same step are no overtaking"),
    Mistake(3, AGING, "return min(self.weight * work, self.patience)", "does not depend on the arrival"),
    Mistake(3, AGING, "return request.arrival_time + self.weight * work", "`patience` is 8 s"),
    Mistake(3, AGING, "return request.arrival_time - min(self.weight * work, self.patience)", "the request with less work goes first"),
    Mistake(4, "return Aging(cost, rows, patience=5.0)", "return ShortestFirst(cost, rows)", "long requests pay for"),
    Mistake(4, "return Aging(cost, rows, patience=5.0)", "return lambda request: random.random()", "depend on the request only"),
]


def test_the_load_is_the_one_that_bench_serve_sends(lesson: ModuleType) -> None:
    sent, served = trace_requests(str(FOLDER / "load.jsonl"), None, seed=0), lesson.recorded_load().requests
    assert [(len(s.prompt), s.output_len, s.due) for s in sent] == [
        (len(r.new.prompt_token_ids), len(r.outputs[0]), r.new.arrival_time) for r in served]


def test_the_printed_patch_adds_a_policy_to_the_package(lesson: ModuleType, tmp_path: Path) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    before = Path(scheduling_policy.__file__).read_text(encoding="utf-8")
    (row,) = re.findall(r"^POLICIES: .*\n", before, re.MULTILINE)
    (tmp_path / "patched.py").write_text(before.replace(row, block), encoding="utf-8")
    policies = load_module(tmp_path / "patched.py", "patched").POLICIES
    assert list(policies) == [*scheduling_policy.POLICIES, "fewest_tokens"]
    load = lesson.recorded_load()
    first, fewest = (nearest_rank(lesson.run(load, policies[name]).times_to_first_token(), 50) for name in ("fcfs", "fewest_tokens"))
    assert fewest < first


def test_fcfs_of_the_package_is_the_default(lesson: ModuleType) -> None:
    load = lesson.made_up_load(1, count=20)
    assert lesson.run(load).token_times == lesson.run(load, scheduling_policy.fcfs).token_times
