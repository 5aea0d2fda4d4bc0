"""What distillation gains, in one picture. Left: mean R@1 over parameters, of everything that jobs of
`distill` measured, with 95% intervals over the test pictures. Right: what each recipe gains over plain
fine-tuning, by the figures that `dclip-qdrant recipes show` tells.

    python benchmarks/gain.py RUN [RUN ...] -o docs/gain.png [--figures --suite NAME]

RUN: the --out of a job. All must have the same test pictures; seeds of a recipe are averaged over all jobs.
`--figures`: first puts the runs' main recipes among those figures, under the name of `--suite`.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import safetensors
from finished_jobs import stages_of, table_of
from upath import UPath

from dclip_qdrant import metrics
from dclip_qdrant.jobs.comparison import difference, scores_of_stages
from dclip_qdrant.jobs.suite_report import put_figures
from dclip_qdrant.recipe import HERE
from dclip_qdrant.training.figures import load_ranks

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

FIGURES = HERE / "figures.json"
LARGE_TEACHER = "A large teacher"  # the group of figures that come from such runs

COLOURS = {"teacher_model": "#777777", "base": "#444444", "sft": "#c46a1b"}
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


def stages_of_all(runs: list[Path]) -> dict[str, list[tuple[Path, Path]]]:
    """By the name of what was measured: (its stage, the weights file) of each of its runs, over all jobs."""
    out: dict[str, list[tuple[Path, Path]]] = {}
    for run in runs:
        weights = {"base": run / "base" / "open_clip_model.safetensors"}
        weights["teacher_model"] = next(
            (run / "stages").glob("teacher-model-*/open_clip_model.safetensors"), weights["base"]
        )
        for kind in weights:
            for manifest in (run / "stages").glob(f"{kind}-*/manifest.json"):
                out.setdefault(kind, []).append((manifest.parent, weights[kind]))
        for name, seeds in stages_of(run).items():
            out.setdefault(name, []).extend((s, s / "weights.safetensors") for s in seeds.values())
    return out


def points_of(runs: list[Path]) -> list[Point]:
    """A point a model, its runs averaged; a recipe's students of unlike sizes are models of their own."""
    sized: dict[tuple[str, int], list[Path]] = {}
    for name, stages in stages_of_all(runs).items():
        for stage, weights in stages:
            sized.setdefault((name, parameters_of(weights)), []).append(stage)
    return [Point(name, size, *interval(stages, "chosen")) for (name, size), stages in sized.items()]


def figures_of(recipe: str, runs: list[Path], suite: str) -> dict[str, Any]:
    """What the jobs whose main recipe it is measured of it together, as `dclip_qdrant/recipes/figures.json`
    has it."""
    stages = {name: [UPath(stage) for stage, _ in rows] for name, rows in stages_of_all(runs).items()}
    own = stages[recipe]
    trained = [json.loads((stage / "manifest.json").read_text())["metrics"] for stage in own]
    against = {"base": scores_of_stages(stages["base"][:1])}
    if "sft" in stages:
        against["sft"] = scores_of_stages(stages["sft"], "as_trained")
        against["sft+wise_ft"] = scores_of_stages(stages["sft"])
    scores = scores_of_stages(own)
    differences = [difference(recipe, scores, than, other) for than, other in against.items()]
    return {
        "recipe": recipe,
        "suite": suite,
        "group": LARGE_TEACHER,
        "seeds": len(own),
        "mean_r@1": float(np.mean([m["chosen"]["test"]["mean_r@1"] for m in trained])),
        "retention": float(np.mean([m["chosen"]["retention"] for m in trained])),
        "seconds": round(float(np.mean([m["seconds"] for m in trained])), 1),
        "differences": [{"than": d.than, "difference": d.difference, "ci": d.ci} for d in differences],
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
    largest = max(p.parameters for p in points)
    for p in points:
        colour = COLOURS.get(p.name, OURS)
        error = [[p.recall - p.low], [p.high - p.recall]]
        axes.errorbar(p.parameters / 1e6, p.recall, error, fmt="o", ms=7, capsize=3, color=colour)
        label = {"sft": "plain fine-tuning", "teacher_model": "large teacher"}.get(p.name, p.name)
        left = p.name == "sft" and p.parameters > largest / 2  # the teacher stands at its right
        if left:
            label = label.replace(" ", "\n")  # between the models at both sides
        axes.annotate(
            f"{label}  {p.recall:.1f}",
            (p.parameters / 1e6, p.recall),
            (-9 if left else 9, 0),
            textcoords="offset points",
            va="center",
            ha="right" if left else "left",
            color=colour,
        )
    axes.set(xlabel="parameters, image + text (millions)", ylabel="mean R@1, text to image and back (%)")
    counts = " or ".join(sorted({f"{p.pictures:,}" for p in points}))
    axes.set_title(f"What was measured on {counts} test photos", fontsize=10)
    axes.set_xlim(0, 1.45 * largest / 1e6)
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
    axes.set_title("What each recipe gains (blue: from a large teacher, other photos)", fontsize=10)
    axes.grid(alpha=0.25, axis="x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--suite", default="flickr8k, half of dev", help="what the runs' figures are called")
    parser.add_argument("--figures", action="store_true", help=f"put the runs' recipes into {FIGURES.name}")
    args = parser.parse_args()
    if args.figures:
        jobs: dict[str, list[Path]] = {}
        for run in args.runs:
            main_row = table_of(run)["rows"][-1]
            jobs.setdefault(main_row["name"], []).append(run)
        put_figures([figures_of(recipe, own, args.suite) for recipe, own in jobs.items()], FIGURES)
    points = sorted(points_of(args.runs), key=lambda p: p.recall)
    for p in points:
        print(f"{p.name:<18} {p.parameters / 1e6:6.1f} M  {p.recall:5.1f} [{p.low:.1f}, {p.high:.1f}]")
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 4.8), layout="constrained")
    draw_models(left, points)
    draw_gains(right, gains())
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
