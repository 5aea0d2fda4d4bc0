"""What distillation gains, in one picture. Left: mean R@1 over parameters, of everything that jobs of
`distill` measured, with 95% intervals over the test pictures. Right: what each recipe gains over plain
fine-tuning, by the figures that `dclip-qdrant recipes show` tells.

    python benchmarks/gain.py RUN [RUN ...] -o docs/gain.png [--figures --suite NAME]

RUN: the --out of a job. All must have the same test pictures; seeds of a recipe are averaged. `--figures`:
first puts the runs' main recipes among those figures, under the name of `--suite`.
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import safetensors

from dclip_qdrant import metrics
from dclip_qdrant.jobs.suite_report import put_figures
from dclip_qdrant.recipe import HERE
from dclip_qdrant.training.figures import load_ranks

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

FIGURES = HERE / "figures.json"
LARGE_TEACHER = "A large teacher"  # the group of figures that come from such runs

COLOURS = {"teacher's model": "#777777", "base": "#444444", "sft": "#c46a1b"}
OURS = "#1f6fb4"


@dataclass(frozen=True)
class Point:
    """A model: its parameters, and mean R@1 of both directions on so many pictures, in percent with its
    interval."""

    name: str
    parameters: int
    pictures: int
    recall: float
    low: float
    high: float


def parameters_of(weights: Path) -> int:
    """Numbers in a safetensors file, buffers of norms included."""
    with safetensors.safe_open(weights, "np") as f:
        names = f.keys()
        return sum(int(np.prod(f.get_slice(name).get_shape())) for name in names)


def interval(stages: list[Path], kind: str, *, draws: int = 2000) -> tuple[int, float, float, float]:
    """The pictures, mean R@1 of both directions over seeds, and its 95% percentile interval from resampling
    pictures."""
    values, weights = [], np.ones(1)
    for stage in stages:
        ranks = load_ranks(stage, kind)
        each = metrics.per_picture(ranks)
        weights = np.bincount(ranks.owner, minlength=len(ranks.i2t)).astype(float)
        values.append((each["t2i.r@1"], each["i2t.r@1"]))
    t2i, i2t = np.mean(values, axis=0)
    rng = np.random.default_rng(0)

    def mean(take: np.ndarray) -> float:
        return 50 * (np.average(t2i[take], weights=weights[take]) + i2t[take].mean())

    every = np.arange(len(t2i))
    drawn = [mean(rng.integers(len(every), size=len(every))) for _ in range(draws)]
    return len(every), mean(every), float(np.percentile(drawn, 2.5)), float(np.percentile(drawn, 97.5))


def points_of(run: Path) -> list[Point]:
    table = json.loads((run / "table.json").read_text())
    stages: dict[str, list[Path]] = {}
    for label, folder in table["runs"].items():
        name = re.sub(r"^student (.*) seed \d+$", r"\1", label)
        stages.setdefault(name, []).append(Path(folder))
    out = []
    for kind, title in (("base", "base"), ("teacher_model", "teacher's model")):
        for stage in (run / "stages").glob(f"{kind}-*/manifest.json"):
            stages.setdefault(title, []).append(stage.parent)
    for name, folders in stages.items():
        if name == "base":
            weights = run / "base" / "open_clip_model.safetensors"
        elif name == "teacher's model":
            weights = next((run / "stages").glob("teacher-model-*/open_clip_model.safetensors"))
        else:
            weights = folders[0] / "weights.safetensors"
        out.append(Point(name, parameters_of(weights), *interval(folders, "chosen")))
    return out


def figures_of(run: Path, suite: str) -> dict[str, Any]:
    """A job's main recipe, as `dclip_qdrant/recipes/figures.json` has it."""
    table = json.loads((run / "table.json").read_text())
    row = table["rows"][-1]  # the main recipe's is the last
    stages = [Path(folder) for label, folder in table["runs"].items() if f" {row['name']} seed" in label]
    seconds = [json.loads((s / "manifest.json").read_text())["metrics"]["seconds"] for s in stages]
    return {
        "recipe": row["name"],
        "suite": suite,
        "group": LARGE_TEACHER,
        "seeds": row["seeds"],
        "mean_r@1": row["mean_r@1"],
        "retention": row["retention"],
        "seconds": round(float(np.mean(seconds)), 1),
        "differences": [
            {key: difference[key] for key in ("than", "difference", "ci")}
            for difference in table["comparisons"]
        ],
    }


def gains() -> list[tuple[str, bool, dict[str, Any]]]:
    """Of each recipe that was measured on photos: its name, whether a large teacher taught it, and its
    difference to the stronger row of plain fine-tuning of the same student at the same budget."""
    best: dict[str, tuple[str, bool, dict[str, Any]]] = {}
    for figures in json.loads(FIGURES.read_text()):
        if figures["suite"] == "demo" or figures["recipe"] == "sft":
            continue
        than = {d["than"]: d for d in figures["differences"]}
        plain = than.get("sft+wise_ft") or than.get("sft")
        if plain:
            large = figures["group"] == LARGE_TEACHER
            best.setdefault(figures["recipe"], (figures["recipe"], large, plain))
    return sorted(best.values(), key=lambda row: row[2]["difference"])


def draw_models(axes: Axes, points: list[Point]) -> None:
    for p in points:
        colour = COLOURS.get(p.name, OURS)
        error = [[p.recall - p.low], [p.high - p.recall]]
        axes.errorbar(p.parameters / 1e6, p.recall, error, fmt="o", ms=7, capsize=3, color=colour)
        label = {"sft": "plain fine-tuning", "teacher's model": "large teacher"}.get(p.name, p.name)
        left = p.name == "sft"  # the teacher stands at its right
        axes.annotate(
            f"{label}  {p.recall:.1f}",
            (p.parameters / 1e6, p.recall),
            (-9 if left else 9, -3),
            textcoords="offset points",
            ha="right" if left else "left",
            color=colour,
        )
    axes.set(xlabel="parameters, image + text (millions)", ylabel="mean R@1, text to image and back (%)")
    counts = " or ".join(sorted({f"{p.pictures:,}" for p in points}))
    axes.set_title(f"What was measured on {counts} test photos", fontsize=10)
    axes.set_xlim(0, 1.45 * max(p.parameters for p in points) / 1e6)
    axes.grid(alpha=0.25)


def draw_gains(axes: Axes, rows: list[tuple[str, bool, dict[str, Any]]]) -> None:
    for y, (_, large, plain) in enumerate(rows):
        low, high = (100 * x for x in plain["ci"])
        value = 100 * plain["difference"]
        colour = OURS if large else COLOURS["base"]
        axes.errorbar(value, y, xerr=[[value - low], [high - value]], fmt="o", ms=6, capsize=3, color=colour)
    axes.axvline(0, color=COLOURS["sft"], lw=1)
    axes.set_yticks(
        range(len(rows)), [f"{name}, large teacher" if large else name for name, large, _ in rows]
    )
    axes.set_xlabel(
        "points of mean R@1 over plain fine-tuning\nof the same student (with WiSE-FT where it has it)"
    )
    axes.set_title("What each recipe gains (blue: taught by a large teacher, on other photos)", fontsize=10)
    axes.grid(alpha=0.25, axis="x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--suite", default="flickr8k, half of dev", help="what the runs' figures are called")
    parser.add_argument("--figures", action="store_true", help=f"put the runs' recipes into {FIGURES.name}")
    args = parser.parse_args()
    if args.figures:
        put_figures([figures_of(run, args.suite) for run in args.runs], FIGURES)
    points = sorted({p for run in args.runs for p in points_of(run)}, key=lambda p: p.recall)
    for p in points:
        print(f"{p.name:<18} {p.parameters / 1e6:6.1f} M  {p.recall:5.1f} [{p.low:.1f}, {p.high:.1f}]")
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 4.8), layout="constrained")
    draw_models(left, points)
    draw_gains(right, gains())
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
