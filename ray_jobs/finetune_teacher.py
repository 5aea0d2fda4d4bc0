"""Fine-tunes the region teacher of a recipe on Ray Train (regions and features first, where they are missing).

ray job submit --working-dir . -- python ray_jobs/finetune_teacher.py --pairs /data/pairs --base ViT-B-32/openai --out /data/run
"""

import json

import click

from dclip_qdrant import cluster, front
from dclip_qdrant.pipeline import Job, check, prepare
from dclip_qdrant.recipe import Recipe


@click.command(help=__doc__)
@click.option("--pairs", required=True, help="Folder made by `dclip-qdrant pairs`.")
@click.option("--base", required=True, help="The CLIP underneath: ViT-B-32/openai, hf-hub:ORG/NAME, or a local folder.")
@click.option("--out", required=True, help="Where the stages' folders go; the same as distill's, so that it reuses them.")
@click.option("--recipe", default="best", show_default=True)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE")
@click.option("--weights", help="Short for --set regions.options.weights=...")
@click.option("--seed", default=0, show_default=True)
@click.option("--workers", default=1, show_default=True)
@click.option("--actors", type=int)
@click.option("--from-scratch", is_flag=True)
def main(pairs, base, out, recipe, settings, weights, seed, workers, actors, from_scratch):
    if weights:
        settings = (*settings, f'regions.options.weights="{cluster.absolute(weights, "--weights")}"')
    base = cluster.model(base, "--base")
    chosen = Recipe.load(recipe, settings)
    if chosen.teacher is None:
        raise click.UsageError(f"the recipe {recipe!r} has no teacher")
    job = Job(pairs=cluster.absolute(pairs, "--pairs"), base=base, out=cluster.absolute(out, "--out"), recipe=chosen, seeds=(seed,), workers=workers, actors=actors,
              from_scratch=from_scratch, say=lambda line: print(line, flush=True))  # fmt: skip
    check(job)
    cluster.connect()
    teacher = prepare(job, chosen).teacher
    facts = teacher.manifest()
    print(json.dumps({"teacher": str(teacher.path), "gate": facts["gate"], "last": facts["history"][-1]}))


if __name__ == "__main__":
    front.run(main)
