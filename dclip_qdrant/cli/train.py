"""Students made: the jobs. Each runs on a private Ray cluster on this machine, on the one of the job that it
stands in, or, with --submit, as a job of a running cluster. `ray_jobs/*.py` are the same commands."""

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from dclip_qdrant.cli.commands import command
from dclip_qdrant.cli.options import detector_weights_option, number_list, table_or_json
from dclip_qdrant.cli.submit import submit_option
from dclip_qdrant.errors import PartialError, UsageError

if TYPE_CHECKING:
    from dclip_qdrant.jobs.compare import SuiteResult

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
recipe_weights_option = detector_weights_option(
    "The detector's weights, short for --set regions.options.weights=…"
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


def models_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--base, or a teacher and a student of different models."""
    for option in (
        click.option(
            "--teacher-recipe",
            metavar="NAME|FILE",
            help="Fine-tune the teacher's model on the pairs by this recipe first, e.g. projections or sft.",
        ),
        click.option(
            "--student",
            metavar="MODEL",
            help="The CLIP that the student starts from, where it isn't the base: a lighter one.",
        ),
        click.option(
            "--teacher", metavar="MODEL", help="The CLIP that teaches, where it isn't the base: a larger one."
        ),
        click.option(
            "--base",
            metavar="MODEL",
            help="The CLIP to start from, teacher and student alike: ViT-B-32/openai, hf-hub:ORG/NAME, or a "
            "local folder.",
        ),
    ):
        command = option(command)
    return command


def _models(base: str | None, teacher: str | None, student: str | None) -> tuple[str, tuple[str, ...]]:
    """The model that teaches, and the recipe's setting for the one that the student starts from."""
    from dclip_qdrant.jobs.cluster import absolute_model

    if base is None and (teacher is None or student is None):
        came = "no base" if teacher is None and student is None else "one of teacher and student"
        expected = "`base` alone, `teacher` and `student`, or one of the two beside the base"
        raise UsageError("`base`", came, expected)
    teaches = absolute_model(teacher or base or "", "teacher" if teacher else "base")
    if teacher is None and student is None:
        return teaches, ()
    starts = absolute_model(student or base or "", "student" if student else "base")
    return teaches, (f"student.model={json.dumps(starts)}",)


def _with_weights(settings: tuple[str, ...], weights: str | None) -> tuple[str, ...]:
    """A recipe's settings with the detector's weights on top."""
    from dclip_qdrant.jobs.cluster import absolute_weights

    path = absolute_weights(weights, "detector_weights")
    return (*settings, f"regions.options.weights={json.dumps(path)}") if path else settings


@command(
    "distill",
    example=(
        "dclip-qdrant distill --pairs /data/pairs --base ViT-B-32/openai --out /data/run "
        "--labelled /data/labelled"
    ),
)
@pairs_option
@models_options
@out_option
@labelled_option
@click.option(
    "--recipe",
    metavar="NAME|FILE",
    help="A recipe's name or a .toml file.  [default: joint with --teacher, else best]",
)
@recipe_settings_option
@recipe_weights_option
@click.option(
    "--compare",
    multiple=True,
    default=("sft",),
    metavar="NAME|FILE",
    help="Recipes to put beside it, at the same trainable set and budget.",
)
@click.option(
    "--pictures",
    metavar="DIR",
    help="Pictures without captions to learn from too (pairs made with --pictures-only), for recipes that "
    "draw them, like `pictures`.",
)
@click.option("--no-compare", is_flag=True, help="Train the recipe alone; its verdict decides no exit code.")
@click.option(
    "--seeds", default="0", callback=number_list, metavar="N,N", help="The first one's student is exported."
)
@workers_option
@actors_option
@click.option(
    "--reader",
    type=click.Choice(["auto", "memory", "stream"]),
    default="auto",
    help="How training reads: all of train in memory (exact), as a stream (any size), or what fits.",
)
@min_retention_option
@click.option(
    "--tracker",
    metavar="NAME",
    help="Where metrics go besides metrics.jsonl in each run's stage: tensorboard, mlflow, wandb, or "
    "package.module:Class.",
)
@click.option(
    "--plan",
    "plan_only",
    is_flag=True,
    help="Say what it would take (time, memory, disk, network) from a few batches, and do no more.",
)
@click.option(
    "--plan-pictures", type=click.IntRange(1), metavar="N", help="Plan for so many pictures of train."
)
@click.option(
    "--allow-no-gain", is_flag=True, help="Exit code 0 also for a student that isn't shown to be better."
)
@click.option("--name", metavar="NAME", help="The student's name.  [default: the recipe's]")
@from_scratch_option
@table_or_json
@submit_option
def distill_command(
    pairs: str,
    base: str | None,
    teacher: str | None,
    student: str | None,
    teacher_recipe: str | None,
    out: str,
    labelled: str | None,
    recipe: str | None,
    settings: tuple[str, ...],
    detector_weights: str | None,
    compare: tuple[str, ...],
    pictures: str | None,
    no_compare: bool,
    seeds: tuple[int, ...],
    workers: int,
    actors: int | None,
    reader: str,
    min_retention: float,
    tracker: str | None,
    plan_only: bool,
    plan_pictures: int | None,
    allow_no_gain: bool,
    name: str | None,
    from_scratch: bool,
    form: str,
) -> None:
    """The one job: pairs in, student out.

    Runs whatever stage is missing under --out (regions, features, teacher, teacher cache, distillation,
    export, evaluation) and reuses the rest; run it again after a crash. Prints the table and a verdict:
    better, worse, or can't tell, with the number of test pictures that it would take.

    Exit code 3: the student keeps less than --min-retention, is not shown to be better than the base, or is
    worse than plain fine-tuning.

    A large teacher and a light student: --teacher LARGE --student LIGHT, each with its own preprocessing;
    --teacher-recipe projections (or sft) fine-tunes the large one on the pairs first.
    """
    from dclip_qdrant.jobs.cluster import absolute, absolute_or_none
    from dclip_qdrant.jobs.distill import check_gain, check_retention, distill
    from dclip_qdrant.jobs.plan import plan
    from dclip_qdrant.jobs.request import Request
    from dclip_qdrant.recipe import Recipe

    recipe = recipe or ("joint" if teacher else "best")
    rivals = () if no_compare else tuple(rival for rival in compare if rival != recipe)
    teaches, starts = _models(base, teacher, student)
    request = Request(
        pairs=absolute(pairs, "pairs"),
        base=teaches,
        out=absolute(out, "out"),
        recipe=Recipe.load(recipe, (*_with_weights(settings, detector_weights), *starts)),
        teach=Recipe.load(teacher_recipe) if teacher_recipe else None,
        compare=tuple(Recipe.load(rival) for rival in rivals),
        seeds=seeds,
        workers=workers,
        actors=actors,
        pictures=absolute_or_none(pictures, "pictures"),
        labelled=absolute_or_none(labelled, "labelled"),
        min_retention=min_retention,
        name=name,
        from_scratch=from_scratch,
        reader=reader,
        tracker=tracker,
    )
    if plan_only or plan_pictures:
        expected = plan(request, plan_pictures)
        click.echo(json.dumps(expected.as_dict(), indent=1) if form == "json" else expected.text())
        expected.check()
        return
    result = distill(request)
    click.echo(json.dumps(result.as_dict(), indent=1) if form == "json" else result.text())
    if result.verdict.is_success and form != "json":
        click.echo(f"      dclip-qdrant ingest PICTURES --student {result.student} --collection NAME")
    check_retention(result, request.recipe, min_retention)
    if not (allow_no_gain or no_compare):  # held against nothing it isn't judged either
        check_gain(result)


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
    settings = _with_weights(settings, detector_weights)
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
    from dclip_qdrant.recipe import Recipe
    from dclip_qdrant.tables.storage import as_path

    if detector:
        settings = (f"regions.detector={detector}", "regions.options={}", *settings)
    chosen = Recipe.load(recipe, _with_weights(settings, detector_weights))
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
@models_options
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
    base: str | None,
    teacher: str | None,
    student: str | None,
    teacher_recipe: str | None,
    out: str,
    recipe: str,
    settings: tuple[str, ...],
    detector_weights: str | None,
    seed: int,
    workers: int,
    actors: int | None,
    from_scratch: bool,
) -> None:
    """Fine-tunes the region teacher of a recipe on Ray Train (regions and features first, where they are
    missing). With the same --out, distill reuses it."""
    from dclip_qdrant.jobs.cluster import absolute, connect
    from dclip_qdrant.jobs.conduct import taught
    from dclip_qdrant.jobs.experiment import Experiment
    from dclip_qdrant.jobs.preparation import prepare
    from dclip_qdrant.jobs.request import Request
    from dclip_qdrant.recipe import Recipe

    teaches, starts = _models(base, teacher, student)
    chosen = Recipe.load(recipe, (*_with_weights(settings, detector_weights), *starts))
    if chosen.teacher is None:
        raise UsageError("`recipe`", f"{recipe!r} has no teacher", "a recipe with one, like best or dclip")
    request = Request(
        pairs=absolute(pairs, "pairs"),
        base=teaches,
        out=absolute(out, "out"),
        recipe=chosen,
        teach=Recipe.load(teacher_recipe) if teacher_recipe else None,
        seeds=(seed,),
        workers=workers,
        actors=actors,
        from_scratch=from_scratch,
    )
    experiment = Experiment.open(request)
    connect()
    experiment = taught(experiment)
    trained = prepare(experiment, experiment.request.recipe).teacher
    if trained is None:
        raise RuntimeError("a recipe with a teacher was prepared without one")
    facts = trained.manifest()
    answer = {"teacher": str(trained.path), "gate": facts["gate"], "last": facts["history"][-1]}
    click.echo(json.dumps(answer))


COMMANDS = (
    distill_command,
    compare_command,
    extract_regions_command,
    finetune_teacher_command,
)
