"""Several jobs of `distill` together: what a recipe gains over plain fine-tuning, student by student, and how
sure that is when jobs are repeated from nothing.

    python benchmarks/several_jobs.py RUN [RUN ...] [--recipe joint] [--rival sft]

RUN: the --out of a job; all must have the same test pictures. Seeds of one job share its teacher and its
drawn views, and count as one each in "all students"; "jobs alike" gives every job the same weight. Intervals
of 95% draw the pictures again; "and students" draws these again too (of few students it still says too
little).
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from dclip_qdrant import metrics
from dclip_qdrant.training.figures import load_ranks

DRAWS = 4000


def recalls(stage: Path) -> tuple[np.ndarray, np.ndarray]:
    """Of a student as chosen: mean R@1 of both directions of each picture [N], and the mean of R@1, 5 and
    10."""
    ranks = load_ranks(stage, "chosen")
    each = metrics.per_picture(ranks)
    at_all = np.mean([each[f"{way}.r@{k}"] for way in ("t2i", "i2t") for k in metrics.KS], axis=0)
    return metrics.mean_r1(ranks), at_all


def students(run: Path, recipe: str, rival: str) -> dict[str, np.ndarray]:
    """By seed: the recipe's and the rival's recalls of each picture, [2 models, 2 recalls, N]."""
    table = run / "table.json"
    if not table.exists():
        sys.exit(f"{run}: no table.json; name the --out of a finished job of distill")
    runs = json.loads(table.read_text())["runs"]
    out = {}
    for label, folder in runs.items():
        name, _, seed = label.removeprefix("student ").partition(" seed ")
        other = f"student {rival} seed {seed}"
        if name == recipe and other in runs:
            out[seed] = np.array([recalls(Path(folder)), recalls(Path(runs[other]))])
    return out


def line(name: str, own: np.ndarray, other: np.ndarray) -> str:
    """Points of a difference of recalls [N] of the same pictures."""
    found = metrics.paired_difference(other, own)
    low, high = found["ci"]
    figures = f"{100 * own.mean():5.1f} {100 * other.mean():5.1f}"
    return f"{name:<28} {figures}  {100 * found['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def students_drawn_again(differences: np.ndarray) -> tuple[float, float]:
    """Differences of students and pictures [S, N] -> the 95% interval of their mean when both are drawn
    again."""
    rng = np.random.default_rng(0)
    many, pictures = differences.shape
    drawn = [
        differences[rng.integers(many, size=many)][:, rng.integers(pictures, size=pictures)].mean()
        for _ in range(DRAWS)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--recipe", default="joint")
    parser.add_argument("--rival", default="sft")
    args = parser.parse_args()
    jobs = [students(run, args.recipe, args.rival) for run in args.runs]
    none = [str(run) for run, found in zip(args.runs, jobs, strict=True) if not found]
    if none:
        sys.exit(f"{', '.join(none)}: no {args.recipe} and {args.rival} of one seed in table.json")
    if len({student.shape for found in jobs for student in found.values()}) > 1:
        sys.exit("the jobs have other numbers of test pictures; all must have the same ones")
    print(f"{'mean R@1':<28} {args.recipe:>5} {args.rival:>5}  {args.recipe} minus {args.rival}")
    for run, found in zip(args.runs, jobs, strict=True):
        for seed, (own, other) in found.items():
            print(line(f"{run.name} seed {seed}", own[0], other[0]))
    every = np.array([student for found in jobs for student in found.values()])  # [S, 2, 2, N]
    own, other = every.mean(0)
    print(line(f"all {len(every)} students", own[0], other[0]))
    low, high = students_drawn_again(every[:, 0, 0] - every[:, 1, 0])
    print(f"{'  pictures and students':<28} {'':11}       [{100 * low:+.1f}, {100 * high:+.1f}]")
    alike = np.mean([np.mean(list(found.values()), axis=0) for found in jobs], axis=0)
    print(line("jobs alike", alike[0, 0], alike[1, 0]))
    print(line("all, mean of R@1, 5 and 10", own[1], other[1]))


if __name__ == "__main__":
    main()
