"""Line charts of the demo's report, as inline SVG."""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 500, 250, 46, 14, 28, 30
COLOURS = ("var(--b)", "var(--c)", "var(--a)")
Line = Sequence[tuple[float, float]]


def of_runs(table: dict[str, Any]) -> str:
    """The teacher's and the students' losses, and WiSE-FT's sweep, of seed 0."""
    metrics: dict[str, dict[str, Any]] = {}
    for label, folder in table["runs"].items():
        if label.endswith("seed 0"):
            recipe = label.split()[1]
            metrics[recipe] = json.loads((Path(folder) / "manifest.json").read_text())["metrics"]
    charts = []
    if table.get("teacher"):
        losses = [(row["epoch"], row["loss"]) for row in table["teacher"]["history"]]
        charts.append(chart({"teacher": losses}, "Teacher: InfoNCE over epochs", "epoch"))
    students = {name: [(r["epoch"], r["info_nce"]) for r in m["history"]] for name, m in metrics.items()}
    charts.append(chart(students, "Students: InfoNCE over epochs (train)", "epoch"))
    sweeps = {name: [(p["alpha"], p["val"]) for p in m["sweep"]] for name, m in metrics.items()}
    charts.append(chart(sweeps, "WiSE-FT: mean validation recall over alpha", "alpha"))
    return f'<div class="grid">{"".join(charts)}</div>'


def chart(lines: dict[str, Line], title: str, unit: str) -> str:
    """One line a name, of (x, y)."""
    xs = [x for line in lines.values() for x, _ in line]
    ys = [y for line in lines.values() for _, y in line]
    left, right = min(xs), max(max(xs), min(xs) + 1e-6)
    low, high = min(ys), max(max(ys), min(ys) + 1e-6)
    margin = (high - low) * 0.08
    low, high = low - margin, high + margin

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - BOTTOM - TOP),
        )

    out = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="{html.escape(title)}">',
        f'<text x="{LEFT}" y="16">{html.escape(title)}</text>',
    ]
    for value in np.linspace(low, high, 4):
        _, y = at(left, value)
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for value in _ticks(left, right):
        x, _ = at(value, low)
        out.append(f'<text x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{value:g}</text>')
    out.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 24}" text-anchor="end">{unit}</text>')
    names = []
    for name, colour in zip(lines, COLOURS, strict=False):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in lines[name]))
        out.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2.2" points="{points}"/>')
        names.append(f'<tspan dx="10" style="fill:{colour}">{html.escape(name)}</tspan>')
    # beside the title: no line passes there
    legend = f'<text x="{WIDTH - RIGHT}" y="16" text-anchor="end" style="font-weight:600">'
    return "".join(out) + legend + "".join(names) + "</text></svg>"


def _ticks(left: float, right: float) -> list[float]:
    if right <= 1:
        return sorted({float(f"{value:.2g}") for value in np.linspace(left, right, 5)})
    return sorted({float(round(v)) for v in np.linspace(left, right, min(6, int(right - left) + 1))})
