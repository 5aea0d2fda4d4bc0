"""CLIP-TD's own task: a fused encoder for VQA, SNLI-VE or VCR, taught by CLIP; low-shot and under domain shift.

    ray job submit --working-dir . -- python ray_jobs/clip_td.py --task vqa --train Q.json,A.json --test Q.json,A.json --images /data/coco --teacher ViT-B-32/openai --out /data/td

Trains the task alone, naive distillation and targeted distillation at each --part of the examples, over --seeds; a finished run is reused. Distillation needs no
answers: with --set unlabelled=true its first step also sees the pictures and texts of the examples outside the part. Prints the table and writes clip_td.json.
For retrieval there is the recipe clip_td (distill.py).
"""

import json
import statistics

import click
from upath import UPath

from dclip_qdrant import cluster, front
from dclip_qdrant.errors import RecipeError, UsageError

FILES = {"vqa": "questions.json,annotations.json", "snli_ve": "examples.jsonl", "vcr": "examples.jsonl"}


@click.command(help=__doc__)
@click.option("--task", type=click.Choice(list(FILES)), required=True)
@click.option("--train", required=True, help="The published files: VQA v2 QUESTIONS,ANNOTATIONS; SNLI-VE and VCR one .jsonl.")
@click.option("--test", required=True, help="Likewise.")
@click.option("--images", required=True, help="The folder with the pictures.")
@click.option("--test-images", help="The test pictures, where they are elsewhere.")
@click.option("--teacher", required=True, help="The CLIP that teaches: an open_clip name, or a local folder.")
@click.option("--out", required=True, help="Where figures and checkpoints go.")
@click.option("--part", "parts", multiple=True, type=float, default=(0.1, 1.0), show_default=True, help="Part of the training examples; repeatable.")
@click.option("--shift", is_flag=True, help="Domain shift: hold out whole groups of training examples (VCR movies, VQA question types) and test on those too.")
@click.option("--detector", default="grid", show_default=True, help="What finds regions: grid, yolo, or package.module:Class.")
@click.option("--weights", help="The detector's weights.")
@click.option("--seeds", default="0", show_default=True)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="width, weight, adapt_epochs, finetune_epochs, lr, image_size, ...")
def main(task, train, test, images, test_images, teacher, out, parts, shift, detector, weights, seeds, settings):
    from pydantic import ValidationError

    from dclip_qdrant.reasoning import run
    from dclip_qdrant.reasoning.task import Config

    try:
        config = Config.model_validate_strings(dict(s.split("=", 1) if "=" in s else (s, "") for s in settings))
    except ValidationError as e:
        first = e.errors()[0]
        raise RecipeError("--set", f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}", f"one of {', '.join(Config.model_fields)}") from e
    if config.unlabelled and task == "vcr":
        raise UsageError("--set unlabelled", "true with --task vcr", "false: which of an example's texts is distilled is its answer")
    where = lambda path, flag: cluster.absolute(path, flag)
    options = {"weights": where(weights, "--weights")} if weights else {}
    train_sets = _read(task, [where(f, "--train") for f in train.split(",")], where(images, "--images"))
    test_sets = _read(task, [where(f, "--test") for f in test.split(",")], where(test_images or images, "--images"))
    results = cluster.once(run.protocol, train_sets, test_sets, teacher=cluster.model(teacher, "--teacher"), detector=(detector, options), out=where(out, "--out"), config=config,
                           parts=parts, shift=shift, seeds=tuple(int(s) for s in seeds.split(",")))  # fmt: skip
    rows = []
    for r in results:
        spread = lambda v: statistics.stdev(v) if len(v) > 1 else None
        rows.append({"method": r["method"], "examples": r["examples"]} | {k: (statistics.mean(v), spread(v)) for k, v in r["figures"].items()})
    (UPath(where(out, "--out")) / "clip_td.json").write_text(json.dumps(results, indent=1) + "\n")
    print("\n" + "\n".join([run.table(rows), "", *run.compared(results)]))


def _read(task, files, images):
    """The sub-tasks of a task: {"vqa": examples}, {"snli_ve": examples}, or {"q->a": ..., "qa->r": ...}."""
    from dclip_qdrant.reasoning import readers

    if len(files) != len(FILES[task].split(",")):
        raise UsageError("--train/--test", f"{len(files)} files for {task}", FILES[task])
    if task == "vcr":
        answers, rationales = readers.vcr(files[0], images)
        return {"q->a": answers, "qa->r": rationales}
    return {task: readers.vqa(*files, images) if task == "vqa" else readers.snli_ve(files[0], images)}


if __name__ == "__main__":
    front.run(main)
