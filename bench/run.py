"""The same work for every engine, one engine after another, each in its own process. Prints a table, then one JSON line.

    python -m bench.run --engines minivllm,hf-bf16,hf-fp32 --rows c1,c8,c32,mixed32,ttft1024,memory,start --threads 2
    python -m bench.run --model smollm2-135m --device cuda --engines minivllm-bf16,hf-bf16 --rows bs1,bs32,ttft1024
    python -m bench.run --model mistral-7b --device cuda --load-format dummy --engines minivllm-bf16 --rows bs1,start,coldstart
    python -m bench.run --model qwen3-0.6b --device cuda --engines minivllm-bf16 --rows long1x32000,long8x32000,long32x8000,longtpot1x32000
    python -m bench.run --model mistral-7b --stored awq --device cuda --load-format dummy --engines minivllm-bf16 --rows bs1,bs8,ttft8000

An engine is a name (minivllm, hf, vllm) and a dtype (bf16, fp32, fp16). Without a dtype minivllm chooses its own; others use bf16. The
model is the default one, a folder, or a shape of bench/models.py with random weights, which all engines read from one file. With
--load-format dummy each engine makes its own random weights. An engine is checked before it is timed: in fp32 its greedy tokens equal
those of Transformers, in every dtype the number of tokens is exact, and on a GPU minivllm's kernels give the logits of the reference
kernels (bench/kernel_check.py). The rows nano8gb, start and coldstart each start a new engine: start with all kernels compiled already,
coldstart with empty kernel caches.
"""
from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import machine, models
from bench.worker import SMALL_CACHE, SMALL_CACHE_ROW

DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
COMPILED = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT", "CUDA_CACHE_PATH")  # where engines store compiled kernels
NO_OPTIONS: Mapping[str, Any] = {}
TIE = 1e-4  # greedy tokens may differ where the best two logits are closer than this (fp32)
Results = dict[str, dict[str, Any]]  # engine -> row -> the worker's result


def main() -> None:
    args = parse()
    scratch = tempfile.TemporaryDirectory(prefix="bench-")
    with scratch:
        shown, model = find_model(args.model, Path(scratch.name), args.load_format, args.stored)
        max_len = json.loads((Path(model) / "config.json").read_text())["max_position_embeddings"]
        names = args.engines.split(",")
        rows = args.rows.split(",")
        where = machine.describe(args.device, args.threads)
        print(f"{machine.one_line(where)}\nmodel {shown}, device {args.device}, {args.repeats} repetitions, median", flush=True)
        expected = None
        if args.device == "cpu" or args.check:  # the oracle: Transformers in fp32, even if it is not among the engines
            expected = start_worker("hf-fp32", model, args, [], max_len)["check"]
        results: Results = {}
        for name in names:
            print(f"  {name} ...", end="", flush=True)
            begin = time.time()
            results[name] = measure(name, model, args, rows, max_len)
            print(f" {time.time() - begin:.0f} s", flush=True)
            judge(results[name], expected)
    report(results, rows)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = {"date": now, "command": "python -m bench.run " + " ".join(sys.argv[1:]), "model": shown,
              "device": args.device, "machine": where, "results": {n: strip(r) for n, r in results.items()}}
    print(json.dumps(record))
    if args.save:
        Path(args.save).write_text(json.dumps(record, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default="minivllm,hf-bf16,hf-fp32")
    parser.add_argument("--rows", default="c1,c8,c32,mixed32,ttft1024,memory,start")
    parser.add_argument("--model", help="folder, or a shape with random weights: " + ", ".join(models.SHAPES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="compare greedy tokens on a GPU too")
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto", help="dummy: each engine makes its own random weights")
    parser.add_argument("--stored", metavar="NAME", help="with --load-format dummy: storage of the weights, such as awq or Q4_K_M "
                        "(fp8 and int8 are options: {\"quantization\": \"fp8\"})")
    parser.add_argument("--options", type=json.loads, default={}, help='more keywords for minivllm\'s LLM, as JSON: {"block_size": 32}')
    parser.add_argument("--save", help="file for the JSON record, such as bench/results/NAME.json")
    args = parser.parse_args()
    for name in args.engines.split(","):
        if not re.fullmatch(r"(minivllm|hf|vllm)(-(bf16|fp32|fp16))?", name):
            parser.error(f"unknown engine {name!r}: must be minivllm, hf or vllm, optionally with -bf16, -fp32 or -fp16")
        if args.load_format == "dummy" and name.startswith("hf"):
            parser.error("hf reads its weights from a file: leave --load-format dummy out")
    if args.load_format == "dummy" and (args.device == "cpu" or args.check or args.model not in models.SHAPES):
        parser.error("--load-format dummy is for a shape of bench/models.py on --device cuda, without --check")
    if args.stored and args.load_format != "dummy":
        parser.error("--stored is for random weights: add --load-format dummy")
    rows = args.rows.split(",")
    if repeated := sorted({row for row in rows if rows.count(row) > 1}):
        parser.error(f"a row is named twice: {', '.join(repeated)}. The second one would find its prompts in the prefix cache: name it "
                     "once (--repeats measures it several times)")
    for row in rows:
        if not re.fullmatch(r"(c|mixed|ttft|bs)[1-9]\d*|long(tpot)?[1-9]\d*x[1-9]\d*|nano|nano8gb|prefix|memory|start|coldstart", row):
            parser.error(f"unknown row {row!r}: cN, mixedN, ttftN, bsN, longBxL, longtpotBxL, nano, nano8gb, prefix, "
                         "memory, start, coldstart")
    return args


def find_model(name: str | None, scratch: Path, load_format: str, stored: str | None = None) -> tuple[str, str]:
    """-> (the name to print, the folder)."""
    if name in models.SHAPES and load_format == "dummy":
        models.write_config(name, scratch)
        if stored is not None:
            store_as(stored, scratch / "config.json")
            name = f"{name} ({stored})"
        return f"{name} shape with each engine's own random weights", str(scratch)
    if name in models.SHAPES:
        code = f"from pathlib import Path; from bench.models import write_random_model as w; w({name!r}, Path({str(scratch)!r}))"
        subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
        return f"{name} shape with random weights", str(scratch)
    if name:
        return Path(name).name, name
    from minivllm.models.gguf import convert
    from minivllm.models.hub import DEFAULT_NAME, default_gguf

    convert(default_gguf(), scratch)  # dequantized, so that all engines compute with the same weights
    return DEFAULT_NAME, str(scratch)


def store_as(stored: str, file: Path) -> None:
    """Let a config.json announce weights in this storage."""
    from minivllm.families import parse_config
    from minivllm.planning.what_if import quantization_config
    from minivllm.quantization.methods import METHODS

    config = json.loads(file.read_text())
    config["quantization_config"] = dict(quantization_config(stored, parse_config(config), METHODS))
    file.write_text(json.dumps(config))


def measure(name: str, model: str, args: argparse.Namespace, rows: list[str], max_len: int) -> dict[str, Any]:
    """All rows of one engine: most of them in one process, those that start a new engine one after another."""
    results = start_worker(name, model, args, [r for r in rows if r not in (SMALL_CACHE_ROW, "coldstart")], max_len)
    if SMALL_CACHE_ROW in rows:
        if name.startswith("hf"):
            results[SMALL_CACHE_ROW] = {"refused": "generate has no cache of a fixed size"}
        else:
            own = start_worker(name, model, args, [SMALL_CACHE_ROW], max_len, SMALL_CACHE)
            results[SMALL_CACHE_ROW] = own.get(SMALL_CACHE_ROW) or own.get("failed", {"refused": "no result"})
    if "start" in rows and "ready" in results:  # again: the first start may have compiled kernels and read from a cold disk
        own = start_worker(name, model, args, [], max_len, check=False)
        results["start"] = own.get("start") or own.get("failed", {"refused": "no result"})
    if "coldstart" in rows:
        with tempfile.TemporaryDirectory(prefix="bench-cold-") as empty:
            own = start_worker(name, model, args, [], max_len, environment=dict.fromkeys(COMPILED, empty), check=False)
        results["coldstart"] = own.get("start") or own.get("failed", {"refused": "no result"})
    return results


def start_worker(name: str, model: str, args: argparse.Namespace, rows: list[str], max_len: int, options: Mapping[str, Any] = NO_OPTIONS,
                 environment: Mapping[str, str] = NO_OPTIONS, check: bool = True) -> dict[str, Any]:
    """Run one engine's process -> row -> its result. An engine that dies has the row "failed" with the last line of its errors."""
    engine, _, short = name.partition("-")
    dtype = DTYPES[short] if short else "auto" if engine == "minivllm" else "bfloat16"
    job = {"engine": engine, "model": model, "dtype": dtype, "device": args.device, "threads": args.threads, "repeats": args.repeats,
           "rows": [r for r in rows if r != "start"], "check": check, "max_len": max_len,
           "load_format": args.load_format, "started": time.time(),
           "options": {**(args.options if engine == "minivllm" else {}), **options}}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(args.threads))
    command = [sys.executable, "-m", "bench.worker", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False,
                          env={**os.environ, **environment, **threads, "PYTHONUNBUFFERED": "1"})
    lines = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("BENCH ")]
    results = {row.pop("row"): row for row in lines}
    if "ready" in results:
        results["start"] = {"value": results["ready"]["seconds"], "unit": "s", "parts": results["ready"]["parts"]}
    if done.returncode != 0:
        results["failed"] = {"refused": (done.stderr.strip().splitlines() or ["no output"])[-1]}
        print(done.stderr, file=sys.stderr)
    return results


def judge(results: dict[str, Any], expected: dict[str, Any] | None) -> None:
    """Compare the check row with the oracle's. A wrong fp32 engine gets no figures."""
    if expected is None or "check" not in results:
        return
    equal = total = ties = 0
    for got, want, gaps in zip(results["check"]["tokens"], expected["tokens"], expected["gaps"], strict=True):
        differing = [i for i in range(len(want)) if got[i] != want[i]]
        first = differing[0] if differing else len(want)
        equal, total = equal + first, total + len(want)
        ties += first < len(want) and gaps[first] < TIE
        if results["ready"]["dtype"] == "float32" and first < len(want) and gaps[first] >= TIE:
            for row in results.values():
                row.pop("value", None)
                row["refused"] = f"greedy tokens differ from Transformers' from token {first} on (gap {gaps[first]:.2g})"
    results["check"] = {"equal_before_parting": equal, "of": total, "ties": ties}


def report(results: Results, rows: list[str]) -> None:
    """Print one line per engine and one column per row, then the ratios to vllm-bf16 or hf-bf16 (or else the first vllm or hf engine)."""
    print(f"\n{'engine':<16}{'dtype':<10}" + "".join(f"{row:>12}" for row in rows) + f"{'same tokens':>14}")
    for name, by_row in results.items():
        cells = [cell(by_row.get(row)) for row in rows]
        check = by_row.get("check", {})
        same = f"{check['equal_before_parting']}/{check['of']}" if "of" in check else "-"
        print(f"{name:<16}{by_row.get('ready', {}).get('dtype', '-'):<10}" + "".join(f"{c:>12}" for c in cells) + f"{same:>14}")
    units = {row: r[row].get("unit") for r in results.values() for row in rows if row in r}
    print(f"{'':<26}" + "".join(f"{units.get(row) or '':>12}" for row in rows))
    peer = next((n for n in ("vllm-bf16", "hf-bf16", "hf", *results) if n in results and n.startswith(("hf", "vllm"))), None)
    for name in results if peer else ():
        if name != peer:
            print(f"{name} / {peer:<{23 - len(name)}}" + "".join(f"{ratio(results[name].get(r), results[peer].get(r)):>12}" for r in rows))
    for name, by_row in results.items():
        if "logits_apart" in (kernels := by_row.get("kernels", {})):
            print(f"{name}: logits {kernels['logits_apart']} of their standard deviation from the reference kernels' (at most "
                  f"{kernels['tolerance']}), greedy tokens {kernels['tokens_short_of_best']} below the best ({kernels['token_tolerance']})")
    for name, by_row in results.items():
        for row, result in by_row.items():
            if "refused" in result:
                print(f"no figure for {name} {row}: {result['refused']}")
    if "minivllm-bf16" in results and "minivllm-fp32" in results:
        print("bf16 / fp32 in minivllm, the reason for its choice on a CPU: " + ", ".join(
            f"{r} {ratio(results['minivllm-bf16'].get(r), results['minivllm-fp32'].get(r))}" for r in rows))
    print()


def cell(result: dict[str, Any] | None) -> str:
    if not result or "value" not in result:
        return "-"
    return f"{result['value']:.4g}" if result["value"] < 1000 else f"{result['value']:,.0f}"


def ratio(ours: dict[str, Any] | None, theirs: dict[str, Any] | None) -> str:
    """How many times as good: the quotient of throughputs, or the inverse quotient of times."""
    if not ours or not theirs or "value" not in ours or "value" not in theirs:
        return "-"
    q = ours["value"] / theirs["value"]
    return f"{q:.2f}x" if ours["unit"] == "tok/s" else f"{1 / q:.2f}x"


def strip(by_row: dict[str, Any]) -> dict[str, Any]:
    return {row: result for row, result in by_row.items() if row != "ready"} | {"dtype": by_row.get("ready", {}).get("dtype")}


if __name__ == "__main__":
    main()
