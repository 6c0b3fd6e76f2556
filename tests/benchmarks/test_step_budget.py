"""The budget of a step: overlapping kernels count once, the lower bound is bytes and products, and the plot needs no GPU."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import models
from bench.gpu_timing import Ceiling
from bench.step_budget import COLUMNS, OTHER, busy, floor_ms, kind_of, plot, table
from minivllm.families import parse_config

LIMITS = Ceiling(copy=4e12, matmul=8e14)
ROWS = [
    {"row": "bs1", "keys": 200, "engine": 0.7, "step": 0.6, "classes": dict(zip(COLUMNS, (0.1, 0.35, 0.03, 0.02), strict=True)),
     "gap": 0.1, "floor": 0.3},
    {"row": "bs256", "refused": "the KV cache has no room"},
]


def test_overlapping_time_counts_once_for_the_kernel_that_started_first() -> None:
    kernels = [("_few_rows", 0, 10), ("_decode_attention", 6, 14), ("_sample_chunks", 7, 9), ("index_select", 20, 21),
               ("nvjet_tst", 21, 23)]
    for order in (kernels, kernels[::-1]):
        assert busy(order) == {"matmul": 10 + 2, "attention": 4, "sampling": 0, OTHER: 1}
    assert sum(busy(kernels).values()) == 14 + 3  # the time in which any kernel ran; the rest of the step is the gap


@pytest.mark.parametrize("name, kind", [
    ("_matvec", "matmul"), ("void gemmSN_TN_kernel", "matmul"), ("_prompt_attention", "attention"), ("_position_and_store", "attention"),
    ("_hopper_attention", "attention"), ("_hopper_decode", "attention"), ("_gather_keys", "attention"), ("_hopper_rows", "matmul"),
    ("_scatter_gather_elementwise_kernel", OTHER),
    ("_combine_chunks", "sampling"), ("_thresholds", "sampling"), ("_rms_norm", OTHER), ("_act_and_mul", OTHER),
    ("Memset (Device)", OTHER)])
def test_kernels_are_classified_by_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_every_triton_kernel_has_an_explicit_class() -> None:
    ours = {line.split("def ")[1].split("(")[0] for path in Path("minivllm/kernels/triton").glob("*.py")
            for before, line in zip(["", *path.read_text().splitlines()], path.read_text().splitlines(), strict=False)
            if before.startswith(("@triton.jit", "@gluon.jit")) and line.startswith("def _")}
    named = {name: kind_of(name) for name in ours}
    assert {name for name, kind in named.items() if kind == "matmul"} >= {"_matvec", "_few_rows", "_hopper_rows"}
    assert {name for name, kind in named.items() if kind == "attention"} >= {"_decode_attention", "_hopper_decode", "_hopper_attention"}
    assert {name for name, kind in named.items() if kind == "sampling"} >= {"_sample_chunks", "_combine_chunks", "_thresholds"}
    assert {name for name, kind in named.items() if kind == OTHER} >= {"_rms_norm", "_act_and_mul", "_rope_angles"}


def test_the_lower_bound_is_weights_and_keys_for_a_decode_and_products_for_a_prompt() -> None:
    spec = parse_config(models.config_of("qwen3-0.6b"))
    weights, key = 1.19e9, 2 * 2 * 28 * 8 * 128  # bytes
    assert key == 112 * 1024
    assert floor_ms(spec, LIMITS, [1], [200]) == pytest.approx(1e3 * (weights + 200 * key) / 4e12, rel=0.01)
    assert floor_ms(spec, LIMITS, [1] * 256, [600] * 256) == pytest.approx(1e3 * (256 * 600 * key / 4e12 + 256 * weights / 8e14), rel=0.01)
    shared = floor_ms(spec, LIMITS, [1] * 4, [500] * 4, 400)
    assert shared == pytest.approx(1e3 * (weights + (400 + 4 * 100) * key) / 4e12, rel=0.01)
    layer, qkv = 440e6 / 28, 4096 * 1024  # weights; the last layer computes only keys and values for all tokens
    products = 2 * 8000 * (27 * layer + qkv) + 4 * 27 * 16 * 128 * 8000 * 8001 / 2
    assert floor_ms(spec, LIMITS, [8000], [8000]) == pytest.approx(1e3 * (products / 8e14 + 8000 * key / 4e12), rel=0.01)


def test_the_table_has_a_line_for_each_row_and_the_reason_for_missing_figures() -> None:
    lines = table(ROWS)
    assert len(lines) == 3 and "0.350" in lines[1] and lines[1].endswith("50%") and "no figure: the KV cache has no room" in lines[2]


def test_a_saved_record_can_be_plotted_without_a_gpu(tmp_path: Path) -> None:
    record = {"shape": "tiny", "machine": {"gpu": "some GPU"}, "rows": ROWS}
    (tmp_path / "r.json").write_text(json.dumps(record))
    command = [sys.executable, "-m", "bench.step_budget", "--plot-from", str(tmp_path / "r.json"), "--plot", str(tmp_path / "a.png")]
    subprocess.run(command, check=True)
    plot(record, str(tmp_path / "b.png"))
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
