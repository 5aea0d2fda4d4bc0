"""What the students of one recipe train from: regions, features, a region teacher and its targets, further
teachers. Whatever is there is reused."""

import logging
from dataclasses import replace

import safetensors.torch

from dclip_qdrant.jobs import train_runs
from dclip_qdrant.jobs.comparison import same_budget
from dclip_qdrant.jobs.experiment import Experiment, wants_regions
from dclip_qdrant.jobs.extract_regions import extract_regions
from dclip_qdrant.jobs.features import FeatureRequest, extract_features
from dclip_qdrant.jobs.named_runs import Prepared, student_run, teacher_run
from dclip_qdrant.jobs.teacher_cache import cache_teacher
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.tables import storage
from dclip_qdrant.tables.stages import Stage, digest
from dclip_qdrant.training.models import two_tower
from dclip_qdrant.training.models.model_folder import write_model
from dclip_qdrant.training.models.two_tower import TwoTower
from dclip_qdrant.training.run import Run

logger = logging.getLogger(__name__)


def prepare(experiment: Experiment, recipe: Recipe) -> Prepared:
    """Regions, features, teacher and teacher cache of one recipe; whatever is there is reused."""
    request = experiment.request
    # a rival's own stages stand inside the main recipe's
    begin = experiment.progress.begin if recipe is request.recipe else lambda name: None
    if wants_regions(recipe):
        begin("regions")
    boxes = regions(experiment) if wants_regions(recipe) else None
    begin("features")
    features = extract_features(
        feature_request(experiment, recipe, boxes), actors=request.actors, from_scratch=request.from_scratch
    )
    folders = {model: _other_model(experiment, recipe, model, features) for model in recipe.ensemble.models}
    others = tuple(_features_of_other(experiment, recipe, m, folders[m]) for m in recipe.ensemble.models)
    fine_tuned = folders.get("fine_tuned")
    pictures = _picture_features(experiment, recipe) if recipe.train.picture_share else None
    if recipe.teacher is None:
        return Prepared(features, others=others, fine_tuned=fine_tuned, pictures=pictures)
    run = teacher_run(experiment, recipe, features)
    cache = teacher_cache_stage(experiment, run)
    if request.from_scratch:
        run.stage.clear()
        cache.clear()
    begin("teacher")
    train_runs.run_in_order([run], workers=request.workers, storage=experiment.ray_storage())
    begin("teacher cache")
    cache_teacher(cache, features, base=request.base, teacher=run.stage.path, actors=request.actors)
    return Prepared(features, cache, run.stage, others, fine_tuned, pictures)


def prepare_beside(experiment: Experiment, recipe: Recipe, main: Prepared) -> Prepared:
    """What a rival trains from: the main recipe's features serve it too, where it asks for no teacher or
    views of its own."""
    main_recipe = experiment.request.recipe
    same_views = recipe.train.views == main_recipe.train.views
    regions_there = wants_regions(main_recipe) or not wants_regions(recipe)
    needs_more = recipe.teacher is not None or recipe.ensemble.models or recipe.train.picture_share
    if not needs_more and same_views and regions_there:
        return Prepared(main.features)
    return prepare(experiment, recipe)


def regions(experiment: Experiment) -> Stage:
    return extract_regions(
        experiment.request.stages,
        experiment.pairs,
        experiment.request.recipe,
        actors=experiment.request.actors,
        from_scratch=experiment.request.from_scratch,
    )


def feature_request(experiment: Experiment, recipe: Recipe, boxes: Stage | None) -> FeatureRequest:
    """What is to be cached for a recipe."""
    request, (image, text) = experiment.request, experiment.trunks_at_rest
    return FeatureRequest(
        root=request.stages,
        pairs=experiment.pairs,
        recipe=recipe,
        base=request.base,
        base_fingerprint=experiment.base.fingerprint,
        student=experiment.student_name if image or text else None,
        student_fingerprint=experiment.student.fingerprint,
        student_image=image,
        student_text=text,
        regions=boxes,
        seed=request.seeds[0],
        pictures=experiment.sends_pictures,
    )


def teacher_cache_stage(experiment: Experiment, teacher: Run) -> Stage:
    return Stage(experiment.request.stages, "teacher-cache", {"teacher": teacher.stage.path.name})


def _other_model(experiment: Experiment, recipe: Recipe, model: str, features: Stage) -> str:
    """An open_clip name or the folder of a further teacher; made if it is missing."""
    if model == "student":
        return experiment.whole_student_name
    return _fine_tuned_student(experiment, recipe, features) if model == "fine_tuned" else model


def _features_of_other(experiment: Experiment, recipe: Recipe, model: str, folder: str) -> str:
    """Where a further teacher's features of the same views are; made if they are missing."""
    if model == "base":
        return model
    logger.info("further teacher %s", model)
    request = FeatureRequest(
        root=experiment.request.stages,
        pairs=experiment.pairs,
        recipe=recipe.model_copy(update={"teacher": None}),
        base=folder,
        base_fingerprint=two_tower.load(folder).fingerprint,
        seed=experiment.request.seeds[0],
    )
    if model == "student" and recipe.student.start == "fitted":  # below its projections too
        request = replace(
            request,
            student=experiment.student_name,
            student_fingerprint=experiment.student.fingerprint,
            student_image=experiment.student.has_trunk,
            student_text=experiment.student.has_text_trunk,
        )
    stage = extract_features(
        request, actors=experiment.request.actors, from_scratch=experiment.request.from_scratch
    )
    return str(stage.path)


def _fine_tuned_student(experiment: Experiment, recipe: Recipe, features: Stage) -> str:
    """The student after plain fine-tuning at this recipe's budget: what `sft` makes of the first seed as
    a rival, so that `compare` finds that run done. An open_clip folder."""
    rival = same_budget(Recipe.load("sft"), recipe)
    prepared = prepare_beside(experiment, rival, Prepared(features))
    run = student_run(experiment, rival, experiment.request.seeds[0], prepared)
    return trained_model(experiment, run, "fine-tuned-student", experiment.student)


def trained_model(experiment: Experiment, run: Run, name: str, like: TwoTower) -> str:
    """Does a student's run and writes what it trained as an open_clip folder `like` the model that it
    started from; where it is."""
    if experiment.request.from_scratch:
        run.stage.clear()
    train_runs.run_in_order([run], workers=experiment.request.workers, storage=experiment.ray_storage())
    folder = str(storage.as_path(experiment.request.stages) / f"{name}-{digest(run.inputs)}")
    write_model(
        folder,
        config=like.config,
        weights=safetensors.torch.load((run.stage.path / "weights.safetensors").read_bytes()),
        preprocess=like.preprocess,
        tokenizer=like.tokenizer,
    )
    return folder


def _picture_features(experiment: Experiment, recipe: Recipe) -> Stage:
    """What the teaching model (and the student's trunk, where it rests) sees in pictures without
    captions."""
    if experiment.request.pictures is None:
        raise ValueError("no pictures without captions")  # check_pictures has said so
    logger.info("pictures without captions")
    image_rests = experiment.trunks_at_rest[0]
    request = FeatureRequest(
        root=experiment.request.stages,
        pairs=Pairs.open(experiment.request.pictures),
        recipe=recipe.model_copy(update={"teacher": None}),
        base=experiment.request.base,
        base_fingerprint=experiment.base.fingerprint,
        student=experiment.student_name if image_rests else None,
        student_fingerprint=experiment.student.fingerprint,
        seed=experiment.request.seeds[0],
    )
    return extract_features(
        request, actors=experiment.request.actors, from_scratch=experiment.request.from_scratch
    )
