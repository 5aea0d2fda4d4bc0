"""The one job: pairs in, student out.

    ray job submit --working-dir . -- python ray_jobs/distill.py --pairs /data/pairs --base ViT-B-32/openai --out /data/run

Runs whatever stage is missing under --out (regions, features, teacher, teacher cache, distillation, export, evaluation) and reuses the rest;
submit it again after a crash. Prints the table and the student's folder. Exit code 3: the student keeps less than --min-retention.
"""

import click

from dclip_qdrant import cluster, front
from dclip_qdrant.pipeline import Job, distill
from dclip_qdrant.recipe import Recipe


@click.command(help=__doc__)
@click.option("--pairs", required=True, help="Folder made by `dclip-qdrant pairs`.")
@click.option("--base", required=True, help="The CLIP to start from: ViT-B-32/openai, hf-hub:ORG/NAME, or a local folder.")
@click.option("--out", required=True, help="Where stages and the student go.")
@click.option("--recipe", default="best", show_default=True, help="A recipe's name or a .toml file.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change the recipe, e.g. --set train.epochs=4 --set student.text=full."
)
@click.option("--weights", help="The detector's weights (short for --set regions.options.weights=...).")
@click.option(
    "--compare", multiple=True, default=("sft",), show_default=True, help="Recipes to put beside it, at the same trainable set and budget."
)
@click.option("--no-compare", is_flag=True, help="Train the recipe alone.")
@click.option("--seeds", default="0", show_default=True, help="Comma-separated; the first one's student is exported.")
@click.option("--workers", default=1, show_default=True, help="Ray Train workers.")
@click.option("--actors", type=int, help="Ray Data actors; default: one for every four CPUs, or one a GPU.")
@click.option("--labelled", help="Labelled pictures (folder per class, or Parquet) to measure zero-shot retention on.")
@click.option("--min-retention", default=1.0, show_default=True, help="Below it the student isn't called good (exit code 3).")
@click.option("--name", help="The student's name; default: the recipe's.")
@click.option("--from-scratch", is_flag=True, help="Redo every stage.")
def main(
    pairs, base, out, recipe, settings, weights, compare, no_compare, seeds, workers, actors, labelled, min_retention, name, from_scratch
):
    if weights:
        settings = (*settings, f'regions.options.weights="{cluster.absolute(weights, "--weights")}"')
    try:
        numbers = tuple(int(s) for s in seeds.split(","))
    except ValueError:
        raise click.BadParameter(f"{seeds!r}: expected numbers with commas, e.g. 0,1,2", param_hint="--seeds") from None
    distill(Job(
        pairs=cluster.absolute(pairs, "--pairs"), base=cluster.model(base, "--base"), out=cluster.absolute(out, "--out"), recipe=Recipe.load(recipe, settings),
        compare=() if no_compare else tuple(Recipe.load(r) for r in compare if r != recipe), seeds=numbers, workers=workers, actors=actors,
        labelled=cluster.absolute(labelled, "--labelled"), min_retention=min_retention, name=name, from_scratch=from_scratch, say=lambda line: print(line, flush=True),
    ))  # fmt: skip


if __name__ == "__main__":
    front.run(main)
