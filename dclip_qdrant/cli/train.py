"""Students made: the jobs. Each runs on a private Ray cluster on this machine, on the one of the job that it
stands in, or, with --submit, as a job of a running cluster. `ray_jobs/*.py` are the same commands."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dclip_qdrant.cli.commands import command
from dclip_qdrant.cli.options import Decorator, number_list, table_or_json, together
from dclip_qdrant.cli.submit import submit_option
from dclip_qdrant.errors import PartialError, UsageError

if TYPE_CHECKING:
    from dclip_qdrant.jobs.compare import SuiteResult
    from dclip_qdrant.recipe import Recipe

pairs_option = click.option(
    "--pairs", required=True, metavar="DIR", help="Pairs, as `dclip-qdrant pairs` makes them."
)
base_option = click.option(
    "--base",
    required=True,
    metavar="MODEL",
    help="The CLIP to start from: ViT-B-32/openai, hf-hub:ORG/NAME, or a local folder.",
)
out_option = click.option(
    "--out", required=True, metavar="DIR", help="Where stages and results go, local or a URI."
)
labelled_option = click.option(
    "--labelled",
    metavar="DIR|FILE",
    help="Labelled pictures (a folder per class, or Parquet) to measure zero-shot retention on.",
)
recipe_option = click.option(
    "--recipe", default="best", metavar="NAME|FILE", help="A recipe's name or a .toml file."
)
recipe_settings_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change the recipe, e.g. --set train.epochs=4; repeatable.",
)
recipe_weights_option = together(
    click.option(
        "--detector-weights",
        metavar="FILE",
        help="The detector's weights, short for --set regions.options.weights=…",
    ),
    click.option("--weights", "detector_weights_too", hidden=True),
)
workers_option = click.option("--workers", type=click.IntRange(1), default=1, help="Ray Train workers.")
actors_option = click.option(
    "--actors",
    type=click.IntRange(1),
    help="Ray Data actors.  [default: one for every four CPUs, or one a GPU]",
)
min_retention_option = click.option(
    "--min-retention",
    default=1.0,
    help="Below this part of the base's zero-shot accuracy a student isn't called good.",
)
from_scratch_option = click.option("--from-scratch", is_flag=True, help="Redo every stage.")


def task_settings_option(help_text: str) -> Decorator:
    return click.option(
        "--set", "settings", multiple=True, metavar="KEY=VALUE", help=f"{help_text}; repeatable."
    )


def _recipe(name: str, settings: tuple[str, ...], weights: str | None) -> "Recipe":
    """A recipe with settings and the detector's weights on top."""
    from dclip_qdrant.jobs.cluster import absolute
    from dclip_qdrant.recipe import Recipe

    if weights:
        path = absolute(weights, "detector_weights") if Path(weights).exists() or "/" in weights else weights
        settings = (*settings, f"regions.options.weights={json.dumps(path)}")
    return Recipe.load(name, settings)


@command(
    "distill",
    example=(
        "dclip-qdrant distill --pairs /data/pairs --base ViT-B-32/openai --out /data/run "
        "--labelled /data/labelled"
    ),
)
@pairs_option
@base_option
@out_option
@labelled_option
@recipe_option
@recipe_settings_option
@recipe_weights_option
@click.option(
    "--compare",
    multiple=True,
    default=("sft",),
    metavar="NAME|FILE",
    help="Recipes to put beside it, at the same trainable set and budget.",
)
@click.option("--no-compare", is_flag=True, help="Train the recipe alone.")
@click.option(
    "--seeds", default="0", callback=number_list, metavar="N,N", help="The first one's student is exported."
)
@workers_option
@actors_option
@min_retention_option
@click.option("--name", metavar="NAME", help="The student's name.  [default: the recipe's]")
@from_scratch_option
@table_or_json
@submit_option
def distill_command(
    pairs: str,
    base: str,
    out: str,
    labelled: str | None,
    recipe: str,
    settings: tuple[str, ...],
    detector_weights: str | None,
    detector_weights_too: str | None,
    compare: tuple[str, ...],
    no_compare: bool,
    seeds: tuple[int, ...],
    workers: int,
    actors: int | None,
    min_retention: float,
    name: str | None,
    from_scratch: bool,
    form: str,
) -> None:
    """The one job: pairs in, student out.

    Runs whatever stage is missing under --out (regions, features, teacher, teacher cache, distillation,
    export, evaluation) and reuses the rest; run it again after a crash. Prints the table. Exit code 3: the
    student keeps less than --min-retention.
    """
    from dclip_qdrant.jobs.cluster import absolute, absolute_model, absolute_or_none
    from dclip_qdrant.jobs.distill import check_retention, distill
    from dclip_qdrant.jobs.experiment import Request
    from dclip_qdrant.recipe import Recipe

    rivals = () if no_compare else tuple(rival for rival in compare if rival != recipe)
    request = Request(
        pairs=absolute(pairs, "pairs"),
        base=absolute_model(base, "base"),
        out=absolute(out, "out"),
        recipe=_recipe(recipe, settings, detector_weights or detector_weights_too),
        compare=tuple(Recipe.load(rival) for rival in rivals),
        seeds=seeds,
        workers=workers,
        actors=actors,
        labelled=absolute_or_none(labelled, "labelled"),
        min_retention=min_retention,
        name=name,
        from_scratch=from_scratch,
    )
    result = distill(request)
    click.echo(json.dumps(result.as_dict(), indent=1) if form == "json" else result.text())
    check_retention(result, min_retention)


@command(
    "compare",
    example=(
        "dclip-qdrant compare --suite flickr8k --pairs /data/pairs --base ViT-B-32/openai --out /data/compare"
    ),
)
@click.option(
    "--suite", "suite_name", required=True, metavar="NAME|FILE", help="A suite's name or a .toml file."
)
@click.option(
    "--group", "groups", multiple=True, metavar="TITLE", help="Only the group of this title; repeatable."
)
@click.option(
    "--only",
    "recipes",
    multiple=True,
    metavar="NAME",
    help="Only this recipe beside each group's main one; repeatable.",
)
@pairs_option
@base_option
@out_option
@labelled_option
@recipe_settings_option
@recipe_weights_option
@click.option("--seeds", callback=number_list, metavar="N,N", help="Instead of the suite's.")
@click.option(
    "--parallel",
    type=click.IntRange(1),
    help="Runs at the same time.  [default: one a GPU, or one for every four CPUs]",
)
@min_retention_option
@click.option(
    "--reproduce-leak",
    type=float,
    metavar="SHARE",
    help=(
        "Also with this part of the test pictures in train, to see what a leak is worth "
        "(DCLIP's: 0.33 to 0.42)."
    ),
)
@click.option(
    "--report", metavar="FILE", help="The Markdown file to write the section into.  [default: OUT/results.md]"
)
@click.option(
    "--figures", metavar="FILE", help="Also put what `dclip-qdrant recipes show` tells into this JSON file."
)
@submit_option
def compare_command(
    suite_name: str,
    groups: tuple[str, ...],
    recipes: tuple[str, ...],
    pairs: str,
    base: str,
    out: str,
    labelled: str | None,
    settings: tuple[str, ...],
    detector_weights: str | None,
    detector_weights_too: str | None,
    seeds: tuple[int, ...] | None,
    parallel: int | None,
    min_retention: float,
    reproduce_leak: float | None,
    report: str | None,
    figures: str | None,
) -> None:
    """The experiment: every recipe of a suite, over seeds, beside the base and plain fine-tuning at the same
    budget.

    What is done is reused; a run that fails is named and doesn't sink the rest (exit code 3). Writes
    compare.json, and the report with its plots.
    """
    from dclip_qdrant.jobs.cluster import absolute, absolute_model, absolute_or_none
    from dclip_qdrant.jobs.compare import CompareRequest, compare, compare_leaked
    from dclip_qdrant.jobs.suite import Suite
    from dclip_qdrant.jobs.suite_report import update_figures, write_report
    from dclip_qdrant.tables.storage import local_path

    suite = Suite.load(suite_name).only(groups, recipes)
    weights = detector_weights or detector_weights_too
    if weights:
        settings = (*settings, f"regions.options.weights={json.dumps(absolute(weights, 'detector_weights'))}")
    request = CompareRequest(
        pairs=absolute(pairs, "pairs"),
        base=absolute_model(base, "base"),
        out=absolute(out, "out"),
        labelled=absolute_or_none(labelled, "labelled"),
        settings=settings,
        seeds=seeds,
        parallel=parallel,
        min_retention=min_retention,
    )
    target = local_path(absolute(report, "report") if report else f"{request.out}/results.md", "`report`")
    result = compare(suite, request)
    leaked = compare_leaked(suite, request, reproduce_leak) if reproduce_leak else None
    write_report(
        result,
        target,
        command=_compare_line(suite_name, groups, recipes, settings, reproduce_leak),
        machine=_machine_line(result),
        leaked=leaked,
        leak_share=reproduce_leak or 0.0,
    )
    click.echo(f"report: {target}")
    if figures:
        update_figures(result, local_path(absolute(figures, "figures"), "`figures`"))
    if result.failures:
        came = f"{len(result.failures)} runs failed: {', '.join(result.failures)}"
        raise PartialError(suite_name, came, do="run it again: what is done is reused")


def _machine_line(result: "SuiteResult") -> str:
    """When and on what the figures came about."""
    import platform

    from dclip_qdrant.jobs.cluster import cpus, gpus

    size = f"{gpus()} GPUs" if gpus() else f"Ray with {cpus()} CPUs"
    seeds = ", ".join(map(str, result.seeds))
    return f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {size}, seeds {seeds}."


def _compare_line(
    suite: str,
    groups: tuple[str, ...],
    recipes: tuple[str, ...],
    settings: tuple[str, ...],
    leak: float | None,
) -> str:
    """The command without this machine's paths."""
    name = "SUITE.toml" if suite.endswith(".toml") else suite
    words = [f"dclip-qdrant compare --suite {name} --pairs PAIRS --base BASE --labelled LABELLED --out OUT"]
    words += [f'--group "{group}"' for group in groups]
    words += [f"--only {recipe}" for recipe in recipes]
    words += [f"--set {setting}" for setting in settings if "weights=" not in setting]
    if leak:
        words.append(f"--reproduce-leak {leak:g}")
    return " ".join(words)


@command(
    "extract-regions",
    example=(
        "dclip-qdrant extract-regions --pairs /data/pairs --out /data/run --detector-weights "
        "yolo11n.pt --preview 20"
    ),
)
@pairs_option
@out_option
@recipe_option
@click.option("--detector", metavar="NAME", help="Short for --set regions.detector=…")
@recipe_weights_option
@recipe_settings_option
@actors_option
@click.option(
    "--preview", type=click.IntRange(0), default=0, help="Pictures with boxes to write to STAGE/preview."
)
@from_scratch_option
@submit_option
def extract_regions_command(
    pairs: str,
    out: str,
    recipe: str,
    detector: str | None,
    detector_weights: str | None,
    detector_weights_too: str | None,
    settings: tuple[str, ...],
    actors: int | None,
    preview: int,
    from_scratch: bool,
) -> None:
    """Finds regions in every picture of the pairs, with a pool of detectors on Ray Data.

    Goes on where it was stopped; distill reuses what it wrote. Prints the stage's folder and what is in it.
    """
    from dclip_qdrant.jobs.cluster import absolute, connect
    from dclip_qdrant.jobs.extract_regions import extract_regions, write_preview
    from dclip_qdrant.pairs import Pairs
    from dclip_qdrant.tables.storage import as_path

    if detector:
        settings = (f"regions.detector={detector}", "regions.options={}", *settings)
    chosen = _recipe(recipe, settings, detector_weights or detector_weights_too)
    opened = Pairs.open(absolute(pairs, "pairs"))
    root = str(as_path(absolute(out, "out")) / "stages")
    connect()
    stage = extract_regions(root, opened, chosen, actors=actors, from_scratch=from_scratch)
    facts = {k: v for k, v in stage.manifest().items() if k in ("pictures", "boxes", "without")}
    if preview:
        facts["preview"] = str(write_preview(stage.path, opened, preview))
    click.echo(json.dumps({"stage": str(stage.path), **facts}))


@command(
    "finetune-teacher",
    example="dclip-qdrant finetune-teacher --pairs /data/pairs --base ViT-B-32/openai --out /data/run",
)
@pairs_option
@base_option
@out_option
@recipe_option
@recipe_settings_option
@recipe_weights_option
@click.option("--seed", default=0, help="Of the training.")
@workers_option
@actors_option
@from_scratch_option
@submit_option
def finetune_teacher_command(
    pairs: str,
    base: str,
    out: str,
    recipe: str,
    settings: tuple[str, ...],
    detector_weights: str | None,
    detector_weights_too: str | None,
    seed: int,
    workers: int,
    actors: int | None,
    from_scratch: bool,
) -> None:
    """Fine-tunes the region teacher of a recipe on Ray Train (regions and features first, where they are
    missing). With the same --out, distill reuses it."""
    from dclip_qdrant.jobs.cluster import absolute, absolute_model, connect
    from dclip_qdrant.jobs.experiment import Experiment, Request

    chosen = _recipe(recipe, settings, detector_weights or detector_weights_too)
    if chosen.teacher is None:
        raise UsageError("`recipe`", f"{recipe!r} has no teacher", "a recipe with one, like best or dclip")
    request = Request(
        pairs=absolute(pairs, "pairs"),
        base=absolute_model(base, "base"),
        out=absolute(out, "out"),
        recipe=chosen,
        seeds=(seed,),
        workers=workers,
        actors=actors,
        from_scratch=from_scratch,
    )
    experiment = Experiment.open(request)
    connect()
    teacher = experiment.prepare(chosen).teacher
    if teacher is None:
        raise RuntimeError("a recipe with a teacher was prepared without one")
    facts = teacher.manifest()
    answer = {"teacher": str(teacher.path), "gate": facts["gate"], "last": facts["history"][-1]}
    click.echo(json.dumps(answer))


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
    metavar="MODEL",
    help="The light CLIP, likewise; its text tower is not used after training.",
)
@click.option("--student", "student_too", hidden=True)
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
    student: str | None,
    student_too: str | None,
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

    light = student or student_too
    if light is None:
        raise click.UsageError("Missing option '--student-model'.")
    result = adapt_as_task(
        absolute(labelled, "labelled"),
        teacher=absolute_model(teacher, "teacher"),
        student=absolute_model(light, "student"),
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
@click.option("--detector-weights", metavar="FILE", help="The detector's weights.")
@click.option("--weights", "detector_weights_too", hidden=True)
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
    detector_weights_too: str | None,
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
    from dclip_qdrant.jobs.cluster import absolute, absolute_model

    def files(names: str, parameter: str) -> tuple[str, ...]:
        return tuple(absolute(name, parameter) for name in names.split(","))

    weights = detector_weights or detector_weights_too
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
            detector=(detector, {"weights": absolute(weights, "detector_weights")} if weights else {}),
            parts=parts,
            shift=shift,
            seeds=seeds,
            settings=settings,
        )
    )
    click.echo(tables(results))


COMMANDS = (
    distill_command,
    compare_command,
    extract_regions_command,
    finetune_teacher_command,
    adapt_command,
    clip_td_command,
)
