"""ComKD-CLIP's own task: few labelled pictures, classes never labelled (base-to-novel), other sets and domains.

    ray job submit --working-dir . -- python ray_jobs/adapt.py --labelled /data/flowers --teacher ViT-L-14/openai --student ViT-B-16/openai --out /data/adapted

A large teacher learns prompts from --set shots=16 labelled pictures of half of the classes; the student learns from it without labels. Prints the table; writes
few_shot.json and adapted.safetensors. For retrieval there is the recipe comkd_clip (distill.py).
"""

import click

from dclip_qdrant import cluster, front
from dclip_qdrant.errors import RecipeError


@click.command(help=__doc__)
@click.option("--labelled", required=True, help="Labelled pictures: a folder per class, or Parquet.")
@click.option("--teacher", required=True, help="The large CLIP: an open_clip name, or a local folder.")
@click.option("--student", required=True, help="The light one, likewise; its text tower is not used after training.")
@click.option("--out", required=True, help="Where weights and figures go.")
@click.option("--cross", multiple=True, help="Another labelled set, with classes of its own; repeatable.")
@click.option("--domain", "domains", multiple=True, help="The same classes from elsewhere; repeatable.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="shots, teacher_epochs, student_epochs, teacher_lr, student_lr, batch_size, depth, axis, align, attention, test, seed.")
def main(labelled, teacher, student, out, cross, domains, settings):
    from pydantic import ValidationError

    from dclip_qdrant.few_shot import run

    try:
        config = run.Config.model_validate_strings(dict(s.split("=", 1) if "=" in s else (s, "") for s in settings))
    except ValidationError as e:
        first = e.errors()[0]
        raise RecipeError("--set", f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}", f"one of {', '.join(run.Config.model_fields)}") from e
    where = lambda path, flag: cluster.absolute(path, flag)
    result = cluster.once(
        run.adapt, where(labelled, "--labelled"), teacher=cluster.model(teacher, "--teacher"), student=cluster.model(student, "--student"), out=where(out, "--out"),
        config=config, cross=tuple(where(c, "--cross") for c in cross), domains=tuple(where(d, "--domain") for d in domains),
    )  # fmt: skip
    print("\n" + run.table(result))


if __name__ == "__main__":
    front.run(main)
