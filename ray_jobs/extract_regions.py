"""Finds regions in every picture of a pairs folder, with a pool of detectors on Ray Data.

    ray job submit --working-dir . -- python ray_jobs/extract_regions.py --pairs /data/pairs --out /data/run --weights yolo11n.pt

Resumes; distill.py reuses what it wrote. --preview N writes N pictures with the boxes drawn.
"""

import json

import click

from dclip_qdrant import cluster, front
from dclip_qdrant.pipeline import Job, regions
from dclip_qdrant.preview import write_preview
from dclip_qdrant.recipe import Recipe


@click.command(help=__doc__)
@click.option("--pairs", required=True, help="Folder made by `dclip-qdrant pairs`.")
@click.option("--out", required=True, help="Where the stage's folder goes.")
@click.option("--recipe", default="best", show_default=True, help="Whose regions table is used.")
@click.option("--detector", help="Short for --set regions.detector=...")
@click.option("--weights", help="Short for --set regions.options.weights=...")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE")
@click.option("--actors", type=int)
@click.option("--preview", type=int, default=0, help="Pictures with boxes to write to <stage>/preview.")
@click.option("--from-scratch", is_flag=True)
def main(pairs, out, recipe, detector, weights, settings, actors, preview, from_scratch):
    pairs, out = cluster.absolute(pairs, "--pairs"), cluster.absolute(out, "--out")
    if detector:
        settings = (f"regions.detector={detector}", "regions.options={}", *settings)
    if weights:
        settings = (*settings, f'regions.options.weights="{cluster.absolute(weights, "--weights")}"')
    job = Job(
        pairs=pairs,
        base="",
        out=out,
        recipe=Recipe.load(recipe, settings),
        actors=actors,
        from_scratch=from_scratch,
        say=lambda line: print(line, flush=True),
    )
    cluster.connect()
    stage = regions(job)
    if preview:
        print(f"preview: {write_preview(stage.path, pairs, preview)}")
    print(json.dumps({"stage": str(stage.path), **{k: v for k, v in stage.manifest().items() if k in ("pictures", "boxes", "without")}}))


if __name__ == "__main__":
    front.run(main)
