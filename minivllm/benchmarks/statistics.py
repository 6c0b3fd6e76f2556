"""Percentiles and medians of timings."""
from __future__ import annotations

import math
from collections.abc import Sequence


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100), interpolated linearly between neighbors as numpy does by default.

    `core.simulate.nearest_rank` does not interpolate.
    """
    if not values:
        raise ValueError("no values")
    if not 0.0 <= q <= 100.0:
        raise ValueError(f"q must be within 0 and 100, got {q}")
    ordered = sorted(values)
    position = q / 100.0 * (len(ordered) - 1)
    low, high = math.floor(position), math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def median(values: Sequence[float]) -> float:
    return percentile(values, 50.0)


def spread(values: Sequence[float]) -> float:
    """(largest - smallest) / median: how much repetitions differ, and so how reliable a figure is."""
    middle = median(values)
    return (max(values) - min(values)) / middle if middle else 0.0
