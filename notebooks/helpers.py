"""What all notebooks share: one style, a few drawing functions, the default model, recorded steps and saved measurements.

    helpers.style()                                     colors, sizes and fonts of every picture
    fig, ax = helpers.figure(height=3)                  always the same width, so pictures and their axes compare
    helpers.swatches(ax, {"used": BLUE, "free": GREY})  a legend below the axes that names every color
    llm = helpers.load(trace=path)                      the default model with a small KV cache
    with helpers.serving() as url: ...                  a real server with it
    begin = helpers.clock()                             measures what this thread computes; other programs do not disturb it
    helpers.play(draw, block_size=(16, [1, 4, 16]))     sliders, or a picture of the first values where there are none
"""
from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch, Rectangle

from minivllm import LLM
from minivllm.core.trace import read
from minivllm.core.trace_summary import KindCounter, StepRecord, summarize

# Okabe and Ito's colors, which differ for every kind of color vision (https://jfly.uni-koeln.de/color). Grey is for what is empty.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#E4E4E4")
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW, BLACK)
MARKERS = "osD^vPX*"
# What a request does in a step. Every notebook draws these kinds in these colors.
KINDS = {"waits": GREY, "prompt": BLUE, "output": SKY, "recomputed": ORANGE}
WIDTH = 9.0  # inches
warnings.filterwarnings("ignore", message="IProgress not found")  # of tqdm, where ipywidgets is missing
RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"


def style() -> None:
    """Set matplotlib's defaults. The text is large, so that a picture can be read at half its size."""
    plt.rcParams.update({
        "font.size": 14, "axes.titlesize": 15, "axes.titlelocation": "left", "legend.frameon": False, "legend.fontsize": 13,
        "axes.spines.top": False, "axes.spines.right": False, "axes.prop_cycle": plt.cycler(color=CYCLE), "lines.linewidth": 2.5,
        "lines.markersize": 8, "figure.dpi": 80, "figure.constrained_layout.use": True, "savefig.bbox": "tight"})


def figure(rows: int = 1, columns: int = 1, height: float = 4.0, **options: Any) -> tuple[Any, Any]:
    """`plt.subplots` with the notebooks' width; `height` is the height of the whole figure in inches."""
    return plt.subplots(rows, columns, figsize=(WIDTH, height), **options)


def swatches(ax: Any, colors: Mapping[str, Any], *, columns: int | None = None, below: float = 0.16) -> None:
    """A legend outside and below the axes or the figure: one swatch per entry, name -> color."""
    handles = [Patch(facecolor=color, edgecolor="black", linewidth=0.6, label=name) for name, color in colors.items()]
    place = {"loc": "outside lower center"} if hasattr(ax, "add_subplot") else {"loc": "upper center", "bbox_to_anchor": (0.5, -below)}
    ax.legend(handles=handles, ncols=columns or len(handles), handlelength=1.2, columnspacing=1.2, **place)


def ink(color: Any) -> str:
    """Black or white, whichever can be read on `color` (relative luminance of WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"


def box(ax: Any, x: float, y: float, width: float, height: float, color: Any, text: str = "", *, edge: str = "none",
        size: int = 12) -> None:
    """A rectangle in data coordinates, with `text` in its middle in a color that can be read."""
    ax.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=edge, linewidth=0 if edge == "none" else 1.2))
    if text:
        ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=ink(color), clip_on=True)


class Span(NamedTuple):
    """A request does one kind of thing from `start` to `end` (seconds, or steps)."""

    start: float
    end: float
    kind: str  # a key of KINDS


def load(**settings: Any) -> LLM:
    """The default model with a small KV cache. `settings` are keywords of `LLM`; it plans each step after the one before it.

    What an engine prints at its start is left out, because notebooks start many.
    """
    small = {"num_gpu_blocks_override": 128, "max_model_len": 1024, "max_num_seqs": 8, "async_scheduling": False}
    with contextlib.redirect_stderr(io.StringIO()):
        return LLM(**{**small, **settings})


@contextmanager
def serving(*flags: str) -> Iterator[str]:
    """`minivllm serve` with the default model in another process: its address, such as http://127.0.0.1:34567. It ends with the block."""
    small = ("--port", "0", "--num-gpu-blocks-override", "128", "--max-model-len", "1024")
    process = subprocess.Popen([sys.executable, "-m", "minivllm", "serve", *small, *flags], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines: list[str] = []
    try:
        while not (ready := re.search(r"ready after .* at (\S+)", lines[-1] if lines else "")):
            if not (line := process.stderr.readline()):
                raise RuntimeError(f"the server did not start:\n{''.join(lines)}")
            lines.append(line)
        threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop the server
        yield ready[1]
    finally:
        process.terminate()
        process.wait()


def recorded(trace: str | Path) -> list[StepRecord]:
    """The steps in a trace file, which `load(trace=...)` writes."""
    return list(summarize(read(trace)).steps)


def spans(steps: Iterable[StepRecord], *, in_steps: bool = False) -> dict[str, list[Span]]:
    """Request id -> what it does in each step, with gaps where it waits. Times are seconds since the first step, or step numbers."""
    steps, counter, found = list(steps), KindCounter(), {}
    for number, step in enumerate(steps):
        begin = steps[0].planned_at
        times = (number, number + 1) if in_steps else (step.planned_at - begin, step.updated_at - begin)
        for name, kinds in zip(step.plan.request_ids, counter.each(step.plan), strict=True):
            kind = max(kinds._fields, key=lambda k, kinds=kinds: getattr(kinds, k))
            found.setdefault(name, []).append(Span(*times, kind))
    return found


def gantt(ax: Any, rows: Mapping[str, Sequence[Span]], *, arrivals: Mapping[str, float] | None = None) -> None:
    """One row per request: a grey bar from its arrival (0 if not given) to its end, and its spans in the colors of KINDS."""
    end = max(span.end for row in rows.values() for span in row)
    for y, (name, row) in enumerate(rows.items()):
        start = (arrivals or {}).get(name, 0.0)
        bars = [Span(start, max(span.end for span in row), "waits")]
        for span in row:  # one bar for successive steps of a kind; the engine's time between two steps is too short to be seen
            joined = span.kind == bars[-1].kind and span.start - bars[-1].end < end / 300
            bars[-1:] = [bars[-1]._replace(end=span.end)] if joined else [bars[-1], span]
        ax.broken_barh([(bar.start, bar.end - bar.start) for bar in bars], (y + 0.12, 0.76), facecolors=[KINDS[bar.kind] for bar in bars])
    ax.set(ylim=(len(rows), 0), yticks=[y + 0.5 for y in range(len(rows))], yticklabels=list(rows), ylabel="request", xlim=(0, end))


def result(name: str) -> dict[str, Any]:
    """One saved measurement, by the name of its file in `bench/results`. The text beside a picture is about this one, not a later one."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def results(pattern: str) -> dict[str, dict[str, Any]]:
    """All saved measurements whose file names match, by name: `results("*-cpu-*.json")`. More of them may be saved at any time."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(pattern))}


def perplexities() -> tuple[str, dict[str, tuple[float, float]]]:
    """The newest saved table of `bench.perplexity`: its name, and format -> (perplexity, MB of the weights with 16-bit embeddings).

    A CPU computes in float32, so its table counts 4 bytes for each number that is not packed. The row nf4 stores plain numbers.
    """
    numbers, embedding = 134.5e6, 49_152 * 576  # of the default model
    path = sorted(RESULTS.glob("*perplexity*.txt"))[-1]
    found = {}
    row = re.compile(r"^(\S.*?) +perplexity +([\d.]+) .*?([\d.]+) MB of weights +(\w+)", re.MULTILINE)
    for name, perplexity, size, dtype in row.findall(path.read_text(encoding="utf-8")):
        megabytes = float(size)
        if name == "nf4":
            megabytes = (embedding * 2 + (numbers - embedding) * 4.5 / 8) / 1e6
        elif dtype == "float32" and not name.startswith("Q"):
            megabytes = megabytes / 2 if name == "bf16" or name.endswith("KV") else megabytes - embedding * 2 / 1e6
        found[name] = float(perplexity), megabytes
    return path.stem, found


def tasks() -> tuple[str, dict[str, tuple[float, float, int, int]]]:
    """The newest saved table of `bench.perplexity --table --task`: its name, and format -> what it says.

    That is the share of right answers, its standard error, and how many answers became right and wrong compared with bf16.
    """
    path = sorted(RESULTS.glob("*-task.txt"))[-1]
    row = re.compile(r"^(\S.*?) +task +([\d.]+)% \+- ([\d.]+)% .*\(\+(\d+) -(\d+)\)", re.MULTILINE)
    found = row.findall(path.read_text(encoding="utf-8"))
    return path.stem, {name: (float(right) / 100, float(error) / 100, int(won), int(lost)) for name, right, error, won, lost in found}


def clock() -> float:
    """Seconds, to measure work of this thread: its CPU time, which other programs do not disturb, or the wall clock if a GPU computes."""
    import torch

    return time.perf_counter() if torch.cuda.is_available() else time.thread_time()


def machine() -> str:
    """Where a measurement was made, and how busy other programs kept the machine: printed beside every measured time."""
    import torch

    busy = f", load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores" if hasattr(os, "getloadavg") else ""
    return f"{platform.machine()}, {torch.get_num_threads()} thread(s), PyTorch {torch.__version__.partition('+')[0]}{busy}"


def play(draw: Callable[..., None], **choices: tuple[Any, Sequence[Any]]) -> None:
    """Draw with a slider for each parameter: name -> (first value, all values).

    `draw` calls `plt.show()`. Without ipywidgets, and while the notebooks are executed and saved, it draws once with the first values.
    """
    first = {name: value for name, (value, _) in choices.items()}
    try:
        import ipywidgets
    except ImportError:
        ipywidgets = None
    if ipywidgets is None or os.environ.get("NOTEBOOKS_STATIC"):
        draw(**first)
        shown = ", ".join(f"{name}={value!r}" for name, value in first.items())
        print(f"{draw.__name__}({shown}): call it with other values, or install ipywidgets for sliders.")
        return
    ipywidgets.interact(draw, **{
        name: ipywidgets.SelectionSlider(options=list(values), value=value, description=name.replace("_", " "), continuous_update=False,
                                         style={"description_width": "initial"})
        for name, (value, values) in choices.items()})
