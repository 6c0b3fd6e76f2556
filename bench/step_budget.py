"""Where a step's time goes, by classes of kernels, and the time that its bytes and products would take alone.

    python -m bench.step_budget --shape qwen3-0.6b [--rows bs1,bs8,bs32,bs128,bs256,prefix64,prefill8000] [--save FILE]
    python -m bench.step_budget --plot-from FILE --plot FILE.png            a picture of it; needs matplotlib, but no GPU

    row      bsB: B sequences decode, with 200 keys each (256: 600). prefixB: the same with 2,200 keys, the first 2,048 shared by all.
             prefillT: one prompt of T tokens
    engine   ms of a step of the whole engine, with the work of the host (scheduling, packing, detokenizing) that does not overlap
    step     ms of the GPU's part: the captured graph replayed, or the eager step launched from Python
    classes  ms from torch.profiler. Kernels overlap (on Hopper a kernel starts before the one ahead of it ends), so durations cannot be
             added. Each moment counts for the running kernel that started first, so that the sum of all classes is the time in which any
             kernel runs
    gap      step - all classes: launches and waits between kernels. It may be below zero, since the profiler slows kernels a little
    floor    reading the weights once, or the products if they take longer; plus reading keys and values. Prompts: plus the products of
             attention. Bandwidth is that of a large copy, arithmetic that of one large product, both measured. Shared keys are read once,
             and the last layer of a prompt computes its last token only
"""
from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import gpu_timing, machine, models
from bench.gpu_timing import Ceiling, replay_seconds
from minivllm.benchmarks.statistics import median
from minivllm.families import ModelSpec, parse_config
from minivllm.quantization.methods import parameters

CLASSES = {  # class -> parts of kernel names; all other kernels are "norm, other"
    "attention": ("_hopper_decode", "_gather_keys", "_position_and_store", "attention", "flash", "fmha"),
    "sampling": ("_sample_chunks", "_combine_chunks", "_thresholds", "argmax"),
    "matmul": ("_matvec", "_few_rows", "_hopper_rows", "gemm", "gemv", "nvjet", "cutlass", "cublas", "splitk", "matmul", "xmma"),
}
OTHER = "norm, other"
COLUMNS = ("attention", "matmul", OTHER, "sampling")
REPLAYS, STEPS, BEFORE = 5, 32, 8  # replays that are profiled, steps that are timed in the engine, steps before these
KINDS = re.compile(r"(bs|prefix|prefill)([1-9]\d*)")
Interval = tuple[str, float, float]  # a kernel's name, begin and end in microseconds


def kind_of(kernel: str) -> str:
    low = kernel.lower()
    return next((kind for kind, parts in CLASSES.items() if any(part in low for part in parts)), OTHER)


def busy(kernels: Iterable[Interval]) -> dict[str, float]:
    """Microseconds of each class. Each moment counts once, for the running kernel that started first."""
    times, covered = dict.fromkeys(COLUMNS, 0.0), float("-inf")
    for name, begin, end in sorted(kernels, key=lambda kernel: kernel[1]):
        times[kind_of(name)] += max(0.0, end - max(begin, covered))
        covered = max(covered, end)
    return times


def profiled(run: Callable[[], Any], count: int) -> dict[str, float]:
    """Milliseconds of each class per run, as the mean of `count` runs."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(count):
            run()
        torch.cuda.synchronize()
    kernels = [(e.name, e.time_range.start, e.time_range.end) for e in prof.events() if e.device_type == DeviceType.CUDA]
    return {kind: us / 1e3 / count for kind, us in busy(kernels).items()}


def floor_ms(spec: ModelSpec, limits: Ceiling, query_lens: list[int], seq_lens: list[int], shared: int = 0) -> float:
    """The floor of a step in bfloat16: see the module's docstring. shared: keys that all sequences share."""
    sizes = {name: torch.Size(p.shape).numel() for name, p in parameters(spec).items()}
    head = spec.vocab_size * spec.hidden_size
    layers = sum(size for name, size in sizes.items() if name.startswith("layers."))
    after = sum(size for name, size in sizes.items() if name.startswith(f"layers.{spec.num_layers - 1}.") and ".qkv." not in name)
    rows, count = sum(query_lens), len(query_lens)
    products = 2 * (layers * rows - after * (rows - count) + head * count)
    heads = spec.layers[0].attention
    keys = 2 * 2 * (sum(seq_lens) - shared * (count - 1)) * spec.num_layers * heads.kv_size  # bytes, values included
    prompts = [(q, n) for q, n in zip(query_lens, seq_lens, strict=True) if q > 1]
    pairs = sum(q * (n - q) + q * (q + 1) // 2 for q, n in prompts)
    attention = 4 * pairs * (spec.num_layers - 1) * heads.q_size
    return 1e3 * (max(2 * (layers + head) / limits.copy, products / limits.matmul) + keys / limits.copy + attention / limits.matmul)


class Bench:
    """One engine with random weights of a shape, and the measurements of its rows."""

    def __init__(self, shape: str, limits: Ceiling) -> None:
        from minivllm import LLM
        from minivllm.worker.worker import Worker

        self.spec, self.limits = parse_config(models.config_of(shape)), limits
        with tempfile.TemporaryDirectory() as folder:
            models.write_config(shape, Path(folder))
            self.llm = LLM(model=folder, load_format="dummy", dtype="bfloat16", device="cuda", skip_tokenizer_init=True)
        self.engine = self.llm.llm_engine.core
        self.pipeline = self.engine._pipeline
        executor = self.engine.executor
        assert isinstance(executor, Worker)
        self.executor, self.runner = executor, executor.runner
        self.added = 0

    def row(self, name: str) -> dict[str, Any]:
        kind, number = KINDS.fullmatch(name).groups()  # type: ignore[union-attr]
        count = int(number)
        if kind == "prefill":
            figures = self._prefill(count)
        elif kind == "prefix":
            figures = self._decode(count, 2200, 2048)
        else:
            figures = self._decode(count, 600 if count >= 256 else 200)
        row: dict[str, Any] = {"row": name, **figures}
        if "refused" not in row:
            row["gap"] = row["step"] - sum(row["classes"].values())
        return row

    def _add(self, prompt_len: int, output_len: int, shared: int = 0) -> str:
        from minivllm import SamplingParams

        rng, name = random.Random(self.added), f"{self.added}"
        self.added += 1
        prompt = {"prompt_token_ids": [*range(100, 100 + shared), *(rng.randint(100, 10_000) for _ in range(prompt_len - shared))]}
        self.engine.add_request(name, prompt, SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False))
        return name

    def _drain(self) -> None:
        """Apply the results of all launched steps, and launch no new step."""
        with mock.patch.object(self.pipeline, "fill"):
            while self.pipeline:
                self.engine.step()
        torch.cuda.synchronize()

    def _end(self, names: list[str]) -> None:
        for name in names:
            self.engine.abort_request(name)
        self._run_out()

    def _run_out(self) -> None:
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def _decode(self, count: int, context: int, shared: int = 0) -> dict[str, Any]:
        """`context`: number of keys in the middle of the timed steps. The graph is replayed with the inputs of the last step."""
        if shared:
            self._add(shared + 1, 1, shared)
            self._run_out()
        names = [self._add(context - BEFORE - STEPS // 2, 100 + BEFORE + STEPS, shared) for _ in range(count)]
        for _ in range(100):  # until all prompts are computed
            self.engine.step()
            if self.pipeline and self.pipeline._in_flight[-1][0].num_tokens == (1,) * count:
                break
        else:
            self._end(names)
            return {"refused": f"{count} sequences of {context} keys do not run at once: the KV cache has no room for them"}
        for _ in range(BEFORE):
            self.engine.step()
        begin = time.perf_counter()
        for _ in range(STEPS):
            self.engine.step()
        whole = 1e3 * (time.perf_counter() - begin) / STEPS
        plan = self.pipeline._in_flight[-1][0]
        lens = [start + 1 for start in plan.starts]
        self._drain()
        assert self.runner._graphs is not None
        graphs = self.runner._graphs._sharing if shared else self.runner._graphs._decodes
        graph = next(g for g in graphs if g.shape.seqs >= count and g.shape.longest >= max(lens))._graph
        step = 1e3 * replay_seconds(graph.replay, 20)
        classes = profiled(graph.replay, REPLAYS)
        self._end(names)
        return {"keys": round(sum(lens) / count), "engine": whole, "step": step, "classes": classes,
                "floor": floor_ms(self.spec, self.limits, [1] * count, lens, shared)}

    def _prefill(self, length: int) -> dict[str, Any]:
        """The whole prompt in one step. Its plan admits the row, so it can be launched several times."""
        length = min(length, self.executor.max_model_len - 2, self.executor.max_num_batched_tokens)
        times = []
        for _ in range(4):
            self._add(length, 1)
            begin = time.perf_counter()
            while self.engine.has_unfinished_requests():
                self.engine.step()
            times.append(1e3 * (time.perf_counter() - begin))
        name = self._add(length, 1)
        plan = self.engine.scheduler.schedule(time.monotonic())
        assert plan is not None and plan.num_tokens == (length,), "the prompt is computed in one step"

        def run() -> Any:
            return self.executor.sample(self.executor.launch(plan))

        step = 1e3 * replay_seconds(lambda: run().wait(), 5)
        classes = profiled(lambda: run().wait(), 2)
        self.pipeline.next_step_id = plan.step_id + 1
        self.pipeline._in_flight.append((plan, run()))
        self._drain()
        self._end([name])
        return {"keys": length, "engine": median(times[1:]), "step": step, "classes": classes,
                "floor": floor_ms(self.spec, self.limits, [length], [length])}


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"{'row':<14}{'keys':>6}{'engine':>9}{'step':>9} |" + "".join(f"{name:>12}" for name in (*COLUMNS, "gap")) + f" |{'floor':>9}"
             f"{'floor/step':>12}"]
    for row in rows:
        if "refused" in row:
            lines.append(f"{row['row']:<14} no figure: {row['refused']}")
            continue
        parts = "".join(f"{value:>12.3f}" for value in (*(row["classes"][name] for name in COLUMNS), row["gap"]))
        lines.append(f"{row['row']:<14}{row['keys']:>6}{row['engine']:>9.3f}{row['step']:>9.3f} |{parts} |{row['floor']:>9.3f}"
                     f"{row['floor'] / row['step']:>12.0%}")
    return lines


def plot(record: dict[str, Any], path: str) -> None:
    """Stacked bars, one panel with its own scale for each row: the step's classes and gap, the rest of the engine's step, the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in record["rows"] if "refused" not in row]
    figure, panels = pyplot.subplots(1, len(rows), figsize=(1.9 * len(rows) + 1.5, 4.2), squeeze=False, layout="constrained")
    colors = dict(zip((*COLUMNS, "gap", "host"), ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#d3d3d3", "#eeeeee"), strict=True))
    for panel, row in zip(panels[0], rows, strict=True):
        parts = {**row["classes"], "gap": max(0.0, row["gap"]), "host": max(0.0, row["engine"] - row["step"])}
        bottom = 0.0
        for name, height in parts.items():
            panel.bar([0], [height], bottom=bottom, color=colors[name], edgecolor="white", label=name, width=0.6)
            bottom += height
        panel.axhline(row["floor"], color="black", linestyle="--", linewidth=1, label="floor")
        panel.set(title=f"{row['row']}\n{row['keys']} keys", xticks=[], xlim=(-0.6, 0.6))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("ms")
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(f"{record['shape']} on {record['machine']['gpu']}: where a step's time goes")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.step_budget", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=models.SHAPES, default="qwen3-0.6b")
    parser.add_argument("--rows", default="bs1,bs8,bs32,bs128,bs256,prefix64,prefill8000")
    parser.add_argument("--save", help="file for the JSON record")
    parser.add_argument("--plot", metavar="PNG", help="file for the picture of the record in --plot-from")
    parser.add_argument("--plot-from", metavar="FILE", help="a record that --save has written")
    args = parser.parse_args()
    if bool(args.plot) != bool(args.plot_from):
        parser.error("--plot and --plot-from go together: measure with --save on the GPU, draw anywhere")
    for row in args.rows.split(","):
        if not KINDS.fullmatch(row):
            parser.error(f"unknown row {row!r}: bsB, prefixB or prefillT")
    return args


def main() -> None:
    args = parse()
    if args.plot_from:
        plot(json.loads(Path(args.plot_from).read_text()), args.plot)
        return
    if not torch.cuda.is_available():
        sys.exit("bench.step_budget measures on an NVIDIA GPU, and PyTorch sees none (--plot-from draws without one)")
    where = machine.describe("cuda", 1)
    print(machine.one_line(where))
    limits = gpu_timing.ceiling(torch.device("cuda", torch.cuda.current_device()))
    torch.cuda.empty_cache()
    print(f"{limits}; shape {args.shape}, bfloat16, random weights; ms", flush=True)
    bench = Bench(args.shape, limits)
    rows = [bench.row(name) for name in args.rows.split(",")]
    bench.llm.close()
    print("\n".join(table(rows)))
    rounded = json.loads(json.dumps(rows), parse_float=lambda text: round(float(text), 4))
    gpu_timing.save(args.save, {"bench": "step_budget", "shape": args.shape, "machine": where, "copy_GB/s": round(limits.copy / 1e9, 1),
                                "matmul_TFLOP/s": round(limits.matmul / 1e12, 1), "rows": rounded})


if __name__ == "__main__":
    main()
