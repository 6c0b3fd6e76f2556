"""Draws `docs/step.svg`: one call of `EngineCore.step` with asynchronous scheduling, over time.

    python docs/site/step_picture.py

`tests/test_docs.py` compares `CALLS` with the calls that a running engine makes, and the file with what this module draws.
"""
from __future__ import annotations

from html import escape
from pathlib import Path

FILE = Path(__file__).resolve().parents[1] / "step.svg"
LANES = ("core", "engine", "worker", "device")
# What one call of `step` does, in its order: (lane, method, which step it is for: "n" or "n + 1", begin, end)
CALLS = (
    ("core", "schedule", "n + 1", 1.0, 2.6),
    ("worker", "launch", "n + 1", 2.6, 4.4),
    ("engine", "masks", "n + 1", 4.4, 5.6),
    ("worker", "sample", "n + 1", 5.6, 7.2),
    ("worker", "wait", "n", 7.2, 9.0),
    ("engine", "advance_grammars", "n", 9.0, 11.2),
    ("engine", "push_text", "n", 11.2, 12.8),
    ("engine", "propose", "n", 12.8, 14.2),
    ("core", "update", "n", 14.2, 15.6),
    ("engine", "assemble", "n", 15.6, 17.0),
)
DEVICE = (("n", 0.0, 9.0), ("n + 1", 9.0, 18.0))
EXPLAINED = {
    "core": "decides: which sequences, how many tokens, which blocks", "engine": "text, grammars, what each request gets",
    "worker": "its part on the host: tensors, kernel launches", "device": "the forward pass and the sampler"}
UNIT, LEFT, TOP, HEIGHT, GAP = 50, 120, 46, 44, 30  # pixels
COLORS = {"n": "#9ecae9", "n + 1": "#ffd8a8"}  # told apart without hue too: one is darker, and every box names its step


def box(lane: str, label: str, step: str, begin: float, end: float) -> str:
    x, y, width = LEFT + begin * UNIT, TOP + LANES.index(lane) * (HEIGHT + GAP), (end - begin) * UNIT
    size = min(14.0, width / (0.66 * len(label)))
    return (f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{HEIGHT}" rx="4" fill="{COLORS[step]}" stroke="#333"/>'
            f'<text x="{x + width / 2:g}" y="{y + 20:g}" font-size="{size:.1f}" text-anchor="middle">{label}</text>'
            f'<text x="{x + width / 2:g}" y="{y + 36:g}" font-size="11" text-anchor="middle">step {step}</text>')


def arrow(x: float, upper: str, lower: str, down: bool) -> str:
    """A vertical arrow between two lanes at a time."""
    at = LEFT + x * UNIT
    y1, y2 = TOP + LANES.index(upper) * (HEIGHT + GAP) + HEIGHT, TOP + LANES.index(lower) * (HEIGHT + GAP)
    start, end = (y1, y2 - 3) if down else (y2, y1 + 3)
    return f'<line x1="{at:g}" y1="{start:g}" x2="{at:g}" y2="{end:g}" stroke="#333" stroke-width="1.5" marker-end="url(#head)"/>'


def render() -> str:
    width, height = LEFT + 18 * UNIT + 20, TOP + len(LANES) * (HEIGHT + GAP) + 40
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
             'font-family="DejaVu Sans, Verdana, sans-serif" fill="#111">',
             '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
             '<path d="M0,0 L8,4 L0,8 z"/></marker></defs>',
             f'<rect width="{width}" height="{height}" fill="#fff"/>',
             f'<text x="{LEFT}" y="22" font-size="13">'
             'time, from left to right; one call of EngineCore.step, from schedule to assemble</text>']
    for i, lane in enumerate(LANES):
        y = TOP + i * (HEIGHT + GAP)
        parts.append(f'<text x="12" y="{y + 20}" font-size="14" font-weight="bold">{lane}</text>'
                     f'<text x="{LEFT}" y="{y + HEIGHT + 15}" font-size="11" fill="#444">{escape(EXPLAINED[lane])}</text>')
    parts += [box(*call) for call in CALLS]
    parts += [box("device", "forward pass, sampling", *span) for span in DEVICE]
    parts += [arrow(7.1, "worker", "device", True), arrow(8.9, "worker", "device", False)]
    y = TOP + len(LANES) * (HEIGHT + GAP) + 16
    parts.append(f'<text x="{LEFT}" y="{y}" font-size="12">The device has step n + 1 before the host reads the result of step n, '
                 "so it never waits for the host.</text></svg>")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    FILE.write_text(render(), encoding="utf-8")
    print(f"wrote {FILE}")
