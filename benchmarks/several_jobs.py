"""Several jobs of `distill` together: what a recipe gains over plain fine-tuning, student by student, and how
sure that is when jobs are repeated from nothing.

    python benchmarks/several_jobs.py RUN [RUN ...] [--recipe joint] [--rival sft] [--pairs PAIRS]

RUN: the --out of a job; all must have the same test pictures. Seeds of one job share its teacher and its
drawn views, and count as one each in "all students"; "jobs alike" gives every job the same weight. Intervals
of 95% are over pictures, and over the students (or jobs) too where the line says so. PAIRS: measures the
students on other pictures than the jobs did, about 15 seconds a student for 500 of them.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors.torch
from finished_jobs import stages_of

from dclip_qdrant import metrics
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.recipe import InheritSettings
from dclip_qdrant.training.evaluate import EvalSet
from dclip_qdrant.training.figures import load_ranks
from dclip_qdrant.training.models import inherit, two_tower


class OtherPictures:
    """A split of pairs that no job measured."""

    def __init__(self, pairs: str, split: str) -> None:
        found = Pairs.open(pairs)
        if not found.splits().get(split):
            sys.exit(f"{pairs}: no pictures in the split {split!r}; it has {', '.join(found.splits())}")
        self.pictures = EvalSet(found, split, None)

    def ranks(self, run: Path, stage: Path) -> metrics.Ranks:
        model = start_of(run, stage)
        model.load_weights(safetensors.torch.load_file(stage / "weights.safetensors"))
        return self.pictures.ranks(model)


def start_of(run: Path, stage: Path) -> two_tower.TwoTower:
    """A model of a student's shape: the job's base, cut again where the student's recipe cuts it."""
    whole = two_tower.load(str(run / "base"))
    settings = json.loads((stage / "manifest.json").read_text())["inputs"]["recipe"]["student"].get("inherit")
    if settings is None:
        return whole
    with tempfile.TemporaryDirectory() as folder:
        cut = str(Path(folder) / "cut")
        inherit.write(whole, cut, InheritSettings(**settings))
        return two_tower.load(cut)


def recalls(ranks: metrics.Ranks) -> tuple[np.ndarray, np.ndarray]:
    """Of a student as chosen: mean R@1 of both directions of each picture [N], and the mean of R@1, 5 and
    10."""
    each = metrics.per_picture(ranks)
    at_all = np.mean([each[f"{way}.r@{k}"] for way in ("t2i", "i2t") for k in metrics.KS], axis=0)
    return metrics.mean_r1(ranks), at_all


def students(run: Path, recipe: str, rival: str, other: OtherPictures | None = None) -> dict[int, np.ndarray]:
    """By seed: the recipe's and the rival's recalls of each picture, [2 models, 2 recalls, N]."""
    stages = stages_of(run)
    models = [stages.get(name, {}) for name in (recipe, rival)]

    def recalls_of(stage: Path) -> tuple[np.ndarray, np.ndarray]:
        return recalls(other.ranks(run, stage) if other else load_ranks(stage, "chosen"))

    both = sorted(models[0].keys() & models[1].keys())
    return {seed: np.array([recalls_of(model[seed]) for model in models]) for seed in both}


def line(name: str, own: np.ndarray, other: np.ndarray) -> str:
    """Points of a difference of recalls of the same pictures, [N] or [S, N] of several students."""
    found = metrics.paired_difference(other, own)
    low, high = found["ci"]
    figures = f"{100 * own.mean():5.1f} {100 * other.mean():5.1f}"
    return f"{name:<28} {figures}  {100 * found['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def print_together(name: str, rows: np.ndarray) -> None:
    """Recalls [S, 2 models, 2 recalls, N] of students, or of jobs with their students averaged."""
    own, other = rows[:, 0], rows[:, 1]
    print(line(name, own.mean(0)[0], other.mean(0)[0]))
    print(line("  interval over these too", own[:, 0], other[:, 0]))
    print(line("  mean of R@1, 5 and 10", own.mean(0)[1], other.mean(0)[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--recipe", default="joint")
    parser.add_argument("--rival", default="sft")
    parser.add_argument("--pairs")
    parser.add_argument("--split", default="test")
    args = parser.parse_args()
    other = OtherPictures(args.pairs, args.split) if args.pairs else None
    jobs = [students(run, args.recipe, args.rival, other) for run in args.runs]
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
    alike = np.array([np.mean(list(found.values()), axis=0) for found in jobs])  # [jobs, 2, 2, N]
    if len(every) > 1:
        print_together(f"all {len(every)} students", every)
    if len(jobs) > 1:
        print_together("jobs alike", alike)


if __name__ == "__main__":
    main()
