"""The papers' own tasks, as jobs: ComKD-CLIP's few labelled pictures, CLIP-TD's fused encoder."""

import click

from dclip_qdrant.cli.commands import RenamedOption, command
from dclip_qdrant.cli.options import Decorator, detector_weights_option, number_list
from dclip_qdrant.cli.submit import submit_option
from dclip_qdrant.cli.train import out_option


def task_settings_option(help_text: str) -> Decorator:
    return click.option(
        "--set", "settings", multiple=True, metavar="KEY=VALUE", help=f"{help_text}; repeatable."
    )


@command(
    "adapt",
    example=(
        "dclip-qdrant adapt --labelled /data/flowers --teacher ViT-L-14/openai "
        "--student-model ViT-B-16/openai --out /data/adapted"
    ),
)
@click.option(
    "--labelled", required=True, metavar="DIR|FILE", help="Labelled pictures: a folder per class, or Parquet."
)
@click.option(
    "--teacher", required=True, metavar="MODEL", help="The large CLIP: an open_clip name, or a local folder."
)
@click.option(
    "--student-model",
    "student",
    cls=RenamedOption,
    former=["--student"],
    required=True,
    metavar="MODEL",
    help="The light CLIP, likewise; its text tower is not used after training.",
)
@out_option
@click.option(
    "--cross",
    multiple=True,
    metavar="DIR|FILE",
    help="Another labelled set, with classes of its own; repeatable.",
)
@click.option(
    "--domain",
    "domains",
    multiple=True,
    metavar="DIR|FILE",
    help="The same classes from elsewhere; repeatable.",
)
@task_settings_option(
    "shots, teacher_epochs, student_epochs, teacher_lr, student_lr, batch_size, depth, "
    "axis, align, attention, test or seed"
)
@submit_option
def adapt_command(
    labelled: str,
    teacher: str,
    student: str,
    out: str,
    cross: tuple[str, ...],
    domains: tuple[str, ...],
    settings: tuple[str, ...],
) -> None:
    """ComKD-CLIP's own task: few labelled pictures, classes never labelled (base-to-novel), other sets and
    domains.

    A large teacher learns prompts from --set shots=16 labelled pictures of half of the classes; the student
    learns from it without labels. Prints the table; writes few_shot.json and adapted.safetensors. For
    retrieval there is the recipe comkd_clip (distill).
    """
    from dclip_qdrant.jobs.adapt import adapt_as_task, table
    from dclip_qdrant.jobs.cluster import absolute, absolute_model

    result = adapt_as_task(
        absolute(labelled, "labelled"),
        teacher=absolute_model(teacher, "teacher"),
        student=absolute_model(student, "student"),
        out=absolute(out, "out"),
        settings=settings,
        cross=tuple(absolute(path, "cross") for path in cross),
        domains=tuple(absolute(path, "domains") for path in domains),
    )
    click.echo(table(result))


@command(
    "clip-td",
    example=(
        "dclip-qdrant clip-td --task vqa --train Q.json,A.json --test Q.json,A.json --images "
        "/data/coco --teacher ViT-B-32/openai --out /data/td"
    ),
)
@click.option("--task", type=click.Choice(["vqa", "snli_ve", "vcr"]), required=True)
@click.option(
    "--train",
    required=True,
    metavar="FILES",
    help="The published files: VQA v2 QUESTIONS,ANNOTATIONS; SNLI-VE and VCR one .jsonl.",
)
@click.option("--test", required=True, metavar="FILES", help="Likewise.")
@click.option("--images", "images_root", required=True, metavar="DIR", help="The folder with the pictures.")
@click.option("--test-images", metavar="DIR", help="The test pictures, where they are elsewhere.")
@click.option(
    "--teacher",
    required=True,
    metavar="MODEL",
    help="The CLIP that teaches: an open_clip name, or a local folder.",
)
@out_option
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=float,
    default=(0.1, 1.0),
    help="Part of the training examples; repeatable.",
)
@click.option(
    "--shift",
    is_flag=True,
    help="Hold out whole groups of training examples (VCR movies, VQA question types) and test on those too.",
)
@click.option(
    "--detector",
    default="grid",
    metavar="NAME",
    help="What finds regions: grid, yolo, or package.module:Class.",
)
@detector_weights_option("The detector's weights.")
@click.option("--seeds", default="0", callback=number_list, metavar="N,N", help="Of the training.")
@task_settings_option("width, weight, adapt_epochs, finetune_epochs, lr, image_size, …")
@submit_option
def clip_td_command(
    task: str,
    train: str,
    test: str,
    images_root: str,
    test_images: str | None,
    teacher: str,
    out: str,
    parts: tuple[float, ...],
    shift: bool,
    detector: str,
    detector_weights: str | None,
    seeds: tuple[int, ...],
    settings: tuple[str, ...],
) -> None:
    """CLIP-TD's own task: a fused encoder for VQA, SNLI-VE or VCR, taught by CLIP; low-shot and under domain
    shift.

    Trains the task alone, naive distillation and targeted distillation at each --part of the examples; a
    finished run is reused. Distillation needs no answers: with --set unlabelled=true its first step also sees
    the pictures and texts of the examples outside the part. Prints the table and writes clip_td.json. For
    retrieval there is the recipe clip_td (distill).
    """
    from dclip_qdrant.jobs.clip_td import ClipTdRequest, clip_td_as_task, tables
    from dclip_qdrant.jobs.cluster import absolute, absolute_model, absolute_weights

    def files(names: str, parameter: str) -> tuple[str, ...]:
        return tuple(absolute(name, parameter) for name in names.split(","))

    weights = absolute_weights(detector_weights, "detector_weights")
    images = absolute(images_root, "images_root")
    results = clip_td_as_task(
        ClipTdRequest(
            task=task,
            train=files(train, "train"),
            test=files(test, "test"),
            images=images,
            test_images=absolute(test_images, "test_images") if test_images else images,
            teacher=absolute_model(teacher, "teacher"),
            out=absolute(out, "out"),
            detector=(detector, {"weights": weights} if weights else {}),
            parts=parts,
            shift=shift,
            seeds=seeds,
            settings=settings,
        )
    )
    click.echo(tables(results))


COMMANDS = (adapt_command, clip_td_command)
