"""The runs of an experiment, and what names each: a run is done once, whatever asks for it."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from dclip_qdrant.jobs.experiment import Experiment
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.tables import storage
from dclip_qdrant.tables.stages import Stage
from dclip_qdrant.training.run import Run

WORDING = ("about", "when")  # of a recipe: another wording is not another run


@dataclass(frozen=True)
class Prepared:
    """The stages that students of one recipe train from."""

    features: Stage
    teacher_cache: Stage | None = None
    teacher: Stage | None = None
    others: tuple[str, ...] = ()
    fine_tuned: str | None = None  # folder of the student after plain fine-tuning
    pictures: Stage | None = None  # features of the pictures without captions


def teacher_run(experiment: Experiment, recipe: Recipe, features: Stage) -> Run:
    """The `Run` of a recipe's region teacher."""
    if recipe.teacher is None:
        raise ValueError(f"{recipe.name} has no teacher")
    request, seed = experiment.request, experiment.request.seeds[0]
    settings = recipe.teacher.model_dump(mode="json")
    return Run(
        kind="teacher",
        root=request.stages,
        inputs={"features": features.path.name, "teacher": settings, "seed": seed} | experiment.read_by,
        recipe=recipe.as_dict(),
        seed=seed,
        base=request.base,
        student=experiment.student_name,
        pairs=request.pairs,
        features=str(features.path),
        streams=experiment.streams,
        tracker=experiment.request.tracker,
    )


def student_run(experiment: Experiment, recipe: Recipe, seed: int, prepared: Prepared) -> Run:
    """The `Run` of one recipe and seed."""
    settings = {k: v for k, v in recipe.as_dict().items() if k not in WORDING}
    # what is off names a run as it did before there was such a part
    if not recipe.hubness.on:
        del settings["hubness"]
    if not recipe.ensemble.joint:
        settings["ensemble"] = {"models": recipe.ensemble.models}
    if recipe.student.start == "as_is":
        del settings["student"]["start"]
    if not recipe.train.mixup:
        del settings["train"]["mixup"]
    if not recipe.keep.averages:
        del settings["keep"]["fine_tuned"]
    cache = prepared.teacher_cache
    inputs: dict[str, Any] = (
        asdict(experiment.facts)
        | {
            "recipe": settings,
            "seed": seed,
            "features": prepared.features.path.name,
            "cache": cache.path.name if cache else None,
            "min_retention": experiment.request.min_retention,
        }
        | experiment.read_by
    )
    if prepared.pictures:
        inputs["pictures"] = prepared.pictures.path.name
    if prepared.others:
        inputs["others"] = [storage.as_path(other).name for other in prepared.others]
    return Run(
        kind="student",
        root=experiment.request.stages,
        inputs=inputs,
        recipe=recipe.as_dict(),
        seed=seed,
        base=experiment.request.base,
        student=experiment.student_name,
        pairs=experiment.request.pairs,
        features=str(prepared.features.path),
        teacher=str(cache.path) if cache else None,
        others=prepared.others,
        fine_tuned=prepared.fine_tuned if recipe.keep.averages else None,
        pictures=experiment.request.pictures if prepared.pictures else None,
        picture_features=str(prepared.pictures.path) if prepared.pictures else None,
        reference=experiment.reference,
        labelled=experiment.request.labelled,
        min_retention=experiment.request.min_retention,
        split=experiment.split,
        streams=experiment.streams,
        tracker=experiment.request.tracker,
    )


def base_run(student: Run) -> Run:
    """The `Run` that measures what a student's run is held against: the model that it starts from, or the one
    that it was cut from."""
    inputs = {k: student.inputs[k] for k in ("pairs", "student", "labelled", "split", "features")}
    return replace(student, kind="base", inputs=inputs, teacher=None, others=(), pictures=None)


def teacher_model_run(student: Run) -> Run:
    """The `Run` that measures the model that teaches by itself."""
    inputs = {k: student.inputs[k] for k in ("pairs", "labelled", "split", "features")}
    return replace(student, kind="teacher_model", inputs=inputs, teacher=None, others=(), reference=None)
