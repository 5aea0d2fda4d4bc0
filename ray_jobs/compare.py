"""The experiment: every recipe of a suite, over seeds, beside the base and plain fine-tuning at the same budget.

    ray job submit --working-dir . -- python ray_jobs/compare.py --suite flickr8k --pairs /data/pairs --base ViT-B-32/openai --out /data/compare

What is done is reused; a run that fails is named and doesn't sink the rest (exit code 3). Writes compare.json, and the report with its plots.
"""

import platform
import time
from pathlib import Path

import click

from dclip_qdrant import cluster, front, suite, suite_report
from dclip_qdrant.errors import PartialError


@click.command(help=__doc__)
@click.option("--suite", "suite_name", required=True, help="A suite's name or a .toml file.")
@click.option("--group", "groups", multiple=True, help="Only the group of this title; repeatable.")
@click.option("--recipe", "recipes", multiple=True, help="Only this recipe beside each group's main one; repeatable.")
@click.option("--pairs", required=True, help="Folder made by `dclip-qdrant pairs`.")
@click.option("--base", required=True, help="The CLIP to start from, as in distill.py.")
@click.option("--out", required=True, help="Where stages and compare.json go; distill.py's --out can be shared.")
@click.option("--labelled", help="Labelled pictures (folder per class, or Parquet) to measure zero-shot retention on.")
@click.option("--weights", help="The detector's weights.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change the main recipe of every group, e.g. --set train.epochs=4.")
@click.option("--seeds", help="Comma-separated, instead of the suite's.")
@click.option("--parallel", type=int, help="Runs at the same time; default: one a GPU, or one for every four CPUs.")
@click.option("--min-retention", default=1.0, show_default=True, help="What WiSE-FT's alpha must keep.")
@click.option("--reproduce-leak", type=float, metavar="SHARE", help="Also with this part of the test pictures in train, to see what a leak is worth (DCLIP's: 0.33 to 0.42).")
@click.option("--report", help="The Markdown file to write the section into.  [default: OUT/results.md]")
@click.option("--figures", help="Also put what `dclip-qdrant recipes show` tells into this JSON file (dclip_qdrant/recipes/figures.json in a checkout).")
def main(suite_name, groups, recipes, pairs, base, out, labelled, weights, settings, seeds, parallel, min_retention, reproduce_leak, report, figures):
    what = suite.only(suite.Suite.load(suite_name), groups, recipes)
    if weights:
        settings = (*settings, f'regions.options.weights="{cluster.absolute(weights, "--weights")}"')
    try:
        numbers = tuple(int(s) for s in seeds.split(",")) if seeds else None
    except ValueError:
        raise click.BadParameter(f"{seeds!r}: expected numbers with commas, e.g. 0,1,2", param_hint="--seeds") from None
    asked = suite.Asked(
        pairs=cluster.absolute(pairs, "--pairs"), base=cluster.model(base, "--base"), out=cluster.absolute(out, "--out"), labelled=cluster.absolute(labelled, "--labelled"),
        settings=settings, seeds=numbers, parallel=parallel, min_retention=min_retention, say=lambda line: print(line, flush=True),
    )  # fmt: skip
    target = Path(cluster.absolute(report, "--report") if report else f"{asked.out}/results.md")
    result = suite.compare(what, asked)
    leaked = suite.compare(what, suite.leaked(asked, reproduce_leak)) | {"share": reproduce_leak} if reproduce_leak else None
    cpus, gpus = cluster.cpus(), cluster.gpus()
    machine = f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, " + (f"{gpus} GPUs" if gpus else f"Ray with {cpus} CPUs") + f", seeds {', '.join(map(str, result['seeds']))}."
    suite_report.write(result, target, command=_command(suite_name, groups, recipes, settings, reproduce_leak), machine=machine, leaked=leaked)
    print(f"report: {target}")
    if figures:
        suite_report.update_figures(result, Path(cluster.absolute(figures, "--figures")))
    failures = [f for group in result["groups"] for f in group["failures"]]
    if failures:
        raise PartialError(suite_name, f"{len(failures)} runs failed: {', '.join(failures)}", do="submit again: what is done is reused")


def _command(name, groups, recipes, settings, leak):
    """The command without this machine's paths."""
    name = "SUITE.toml" if name.endswith(".toml") else name
    more = [*(f'--group "{g}"' for g in groups), *(f"--recipe {r}" for r in recipes)] + [f"--set {s}" for s in settings if "weights=" not in s] + ([f"--reproduce-leak {leak:g}"] if leak else [])
    return " ".join(["ray job submit --working-dir . -- python ray_jobs/compare.py", f"--suite {name} --pairs PAIRS --base BASE --labelled LABELLED --out OUT", *more])


if __name__ == "__main__":
    front.run(main)
