"""A picture of a serving run: time to first token, gaps between tokens, throughput and concurrency."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minivllm.benchmarks.outcome import RequestOutcome
from minivllm.benchmarks.report import Latencies
from minivllm.benchmarks.statistics import percentile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_BINS = 120  # of the two panels over time
BLUE, ORANGE, GRAY = "#2563a8", "#c2571a", "#8a8f98"


def draw(file: str, begin: float, outcomes: Sequence[RequestOutcome], title: str, objectives: Mapping[str, float]) -> None:
    """Write the picture. The file's suffix sets the format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    successful = [o for o in outcomes if o.error is None]
    latencies = [Latencies.of(o) for o in successful]
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    axes: Any = figure.subplots(2, 2)
    _distribution(axes[0, 0], [v.ttft for v in latencies if v.ttft is not None], "time to first token, ms", objectives.get("ttft"))
    _distribution(axes[0, 1], [gap for v in latencies for gap in v.itl], "gap between two tokens, ms", objectives.get("itl"))
    bins = _num_bins(begin, successful, latencies)
    _over_time(axes[1, 0], *tokens_per_second(begin, successful, bins), "output tokens/s", BLUE)
    _over_time(axes[1, 1], *running(begin, successful, MAX_BINS), "running requests", ORANGE)
    figure.savefig(file, dpi=120)


def _distribution(axes: Axes, values: Sequence[float], label: str, limit: float | None) -> None:
    """The cumulative distribution of values, with the median and two percentiles marked."""
    axes.set_xlabel(label)
    axes.set_ylabel("share of all values, %")
    axes.set_ylim(0, 102)
    axes.grid(alpha=0.25)
    if not values:
        axes.text(0.5, 0.5, "not measured (not streamed)", ha="center", va="center", color=GRAY, transform=axes.transAxes)
        return
    ordered = sorted(values)
    steps = [ordered[i * (len(ordered) - 1) // 999] for i in range(1000)] if len(ordered) > 1000 else ordered
    axes.plot(steps, [100 * i / max(1, len(steps) - 1) for i in range(len(steps))], color=BLUE, linewidth=1.8)
    marks = [(q, percentile(ordered, q)) for q in (50, 90, 99)]
    axes.plot([x for _, x in marks], [q for q, _ in marks], "o", color=BLUE, markersize=5)
    note = "\n".join(f"p{q}  {x:,.1f} ms" for q, x in marks)
    if limit is not None:
        axes.axvline(limit, color=ORANGE, linewidth=1.2, linestyle="--")
        note += f"\nobjective  {limit:,g} ms"
    axes.set_xlim(0, 1.15 * max(marks[2][1], limit or 0.0) or 1.0)  # without outliers, which would compress the rest
    axes.text(0.97, 0.06, note, ha="right", va="bottom", fontsize=9, transform=axes.transAxes,
              bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85})


def _over_time(axes: Axes, seconds: Sequence[float], values: Sequence[float], label: str, color: str) -> None:
    axes.fill_between(seconds, values, color=color, alpha=0.18, linewidth=0)
    axes.plot(seconds, values, color=color, linewidth=1.5)
    axes.set_xlabel("seconds")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)


def _num_bins(begin: float, outcomes: Sequence[RequestOutcome], latencies: Sequence[Latencies]) -> int:
    """The number of bins. A bin spans several steps of the server, because narrower ones would show single steps as spikes."""
    gaps = [gap for latency in latencies for gap in latency.itl] or [0.0]
    width = 5e-3 * percentile(gaps, 75)
    seconds = max(o.end for o in outcomes) - begin
    return min(MAX_BINS, max(8, int(seconds / width))) if width else MAX_BINS


def tokens_per_second(begin: float, outcomes: Sequence[RequestOutcome], bins: int) -> tuple[list[float], list[float]]:
    """Output tokens/s in `bins` equal intervals. Without events, all tokens of a request count at its end."""
    width = max(max(o.end for o in outcomes) - begin, 1e-9) / bins
    counts = [0.0] * bins
    for outcome in outcomes:
        times = outcome.times or (outcome.end,)
        for at in times:
            counts[min(bins - 1, max(0, int((at - begin) / width)))] += outcome.tokens / len(times)
    return [(i + 0.5) * width for i in range(bins)], [count / width for count in counts]


def running(begin: float, outcomes: Sequence[RequestOutcome], bins: int) -> tuple[list[float], list[float]]:
    """The number of running requests at `bins` moments."""
    width = (max(o.end for o in outcomes) - begin) / bins
    moments = [(i + 0.5) * width for i in range(bins)]
    return moments, [float(sum(o.start - begin <= t < o.end - begin for o in outcomes)) for t in moments]
