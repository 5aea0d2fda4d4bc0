"""What distillation gains, in one picture: mean R@1 over parameters, of everything that jobs of `distill`
measured, with 95% intervals over the test pictures.

    python benchmarks/gain.py RUN [RUN ...] -o docs/gain.png

RUN: the --out of a job. All must have the same test pictures; seeds of a recipe are averaged.
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import safetensors

from dclip_qdrant import metrics
from dclip_qdrant.training.figures import load_ranks

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"teacher's model": "#777777", "base": "#444444", "sft": "#c46a1b"}
OURS = "#1f6fb4"


@dataclass(frozen=True)
class Point:
    """A model: its parameters, and mean R@1 of both directions in percent with its interval."""

    name: str
    parameters: int
    recall: float
    low: float
    high: float


def parameters_of(weights: Path) -> int:
    """Numbers in a safetensors file, buffers of norms included."""
    with safetensors.safe_open(weights, "np") as f:
        names = f.keys()
        return sum(int(np.prod(f.get_slice(name).get_shape())) for name in names)


def interval(stages: list[Path], kind: str, *, draws: int = 2000) -> tuple[float, float, float]:
    """Mean R@1 of both directions over seeds, and its 95% percentile interval from resampling pictures."""
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
    return mean(every), float(np.percentile(drawn, 2.5)), float(np.percentile(drawn, 97.5))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    points = sorted({p for run in args.runs for p in points_of(run)}, key=lambda p: p.recall)
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for p in points:
        colour = COLOURS.get(p.name, OURS)
        error = [[p.recall - p.low], [p.high - p.recall]]
        axes.errorbar(p.parameters / 1e6, p.recall, error, fmt="o", ms=7, capsize=3, color=colour)
        label = "sft + WiSE-FT" if p.name == "sft" else p.name
        axes.annotate(
            f"{label}  {p.recall:.1f}",
            (p.parameters / 1e6, p.recall),
            (9, -3),
            textcoords="offset points",
            color=colour,
        )
        print(f"{p.name:<18} {p.parameters / 1e6:6.1f} M  {p.recall:5.1f} [{p.low:.1f}, {p.high:.1f}]")
    axes.set(xlabel="parameters, image + text (millions)", ylabel="mean R@1, text to image and back (%)")
    axes.set_xlim(0, 1.45 * max(p.parameters for p in points) / 1e6)
    axes.grid(alpha=0.25)
    figure.savefig(args.out, dpi=130)


if __name__ == "__main__":
    main()
