"""Does what is missing of an experiment.

`distill` and `compare` are the same experiment with two runners: Ray Train workers that do one run after
another, and Ray actors that do several at a time.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from dclip_qdrant.jobs.experiment import Experiment
from dclip_qdrant.jobs.named_runs import Prepared, base_run, student_run, teacher_model_run
from dclip_qdrant.jobs.preparation import prepare, prepare_beside, trained_model
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.training.models import two_tower
from dclip_qdrant.training.run import Run

logger = logging.getLogger(__name__)

Runner = Callable[[list[Run]], dict[str, str]]  # does runs; why each that failed did, by label


@dataclass
class Outcome:
    """The runs of an experiment, by recipe, and what failed. `teacher_model`: the figures of the model that
    teaches, where it isn't the student's own."""

    base: Run
    teacher_model: Run | None
    runs: dict[str, list[Run]]
    prepared: Prepared
    failures: dict[str, str] = field(default_factory=dict)


def taught(experiment: Experiment) -> Experiment:
    """This experiment with its teaching model fine-tuned on the pairs by the recipe `request.teach`: a
    stage of its own, an open_clip folder. The student starts where it would have started."""
    recipe = experiment.request.teach
    if recipe is None:
        return experiment
    alone = replace(
        experiment.request, recipe=recipe, compare=(), teach=None, seeds=experiment.request.seeds[:1]
    )
    teaching = replace(experiment, request=alone, recipes=(recipe,))
    run = student_run(teaching, recipe, alone.seeds[0], prepare(teaching, recipe))
    folder = trained_model(experiment, run, "teacher-model", experiment.base)
    logger.info("teacher's model: %s", folder)
    start = experiment.request.recipe.student.model or experiment.request.base
    recipes = tuple(starting_from(recipe, start) for recipe in experiment.recipes)
    request = replace(experiment.request, base=folder, recipe=recipes[-1], teach=None)
    return replace(experiment, request=request, base=two_tower.load(folder), recipes=recipes)


def starting_from(recipe: Recipe, model: str) -> Recipe:
    """The recipe with its student started from this model."""
    return recipe.model_copy(update={"student": recipe.student.model_copy(update={"model": model})})


def conduct(
    experiment: Experiment, runner: Runner, *, tolerate: Callable[[Recipe, Exception], str] | None = None
) -> Outcome:
    """Prepares every recipe and does what is missing of the base's run and every recipe's, seed by seed.

    `tolerate` says why a rival failed before training, which is then left out; without it the error
    passes.
    """
    main_recipe = experiment.request.recipe
    main = prepare(experiment, main_recipe)
    failures: dict[str, str] = {}
    runs: dict[str, list[Run]] = {}
    for recipe in experiment.recipes:
        try:
            prepared = main if recipe is main_recipe else prepare_beside(experiment, recipe, main)
        except Exception as e:
            if tolerate is None:
                raise
            failures[recipe.name] = tolerate(recipe, e)
            continue
        runs[recipe.name] = [
            student_run(experiment, recipe, seed, prepared) for seed in experiment.request.seeds
        ]
    first = runs[main_recipe.name][0]
    base = base_run(first)
    is_other = experiment.request.recipe.student.model not in (None, experiment.request.base)
    teacher_model = teacher_model_run(first) if is_other else None
    untrained = [run for run in (base, teacher_model) if run is not None]
    every = [*untrained, *(run for of_recipe in runs.values() for run in of_recipe)]
    if experiment.request.from_scratch:
        for run in every:
            run.stage.clear()
    experiment.progress.begin("training")
    failures |= runner(every)
    return Outcome(base, teacher_model, runs, main, failures)
