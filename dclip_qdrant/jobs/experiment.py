"""One experiment: pairs, base, student, split and facts, resolved once, and the runs of recipes on them.

`distill` and `compare` are the same experiment with two runners: Ray Train workers that do one run after
another, and Ray actors that do several at a time.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import safetensors.torch

from dclip_qdrant.detectors import build
from dclip_qdrant.errors import UsageError
from dclip_qdrant.jobs import cluster, train_runs
from dclip_qdrant.jobs.comparison import same_budget
from dclip_qdrant.jobs.extract_regions import extract_regions
from dclip_qdrant.jobs.features import FeatureRequest, extract_features
from dclip_qdrant.jobs.needs import Shape, trunk_widths
from dclip_qdrant.jobs.request import (
    Request,
    check_out,
    check_pictures,
    check_reader,
    check_teach,
    labelled_fingerprint,
)
from dclip_qdrant.jobs.teacher_cache import cache_teacher
from dclip_qdrant.lookup import need
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.pairs.splits import pick_split
from dclip_qdrant.progress import Stages
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.tables import storage
from dclip_qdrant.tables.stages import Stage, digest
from dclip_qdrant.training import hubness, trackers
from dclip_qdrant.training.models import inherit, two_tower
from dclip_qdrant.training.models.model_folder import write_model
from dclip_qdrant.training.models.trial import check_size, try_recipe, try_towers
from dclip_qdrant.training.models.two_tower import TwoTower
from dclip_qdrant.training.runs import Run
from dclip_qdrant.training.student_task import Weighted, reads_regions

logger = logging.getLogger(__name__)

NEEDED = ("torch", "open_clip", "ray", "onnx", "onnxscript", "safetensors")
GUESSED_CAPTIONS = 5  # a picture, of pairs without a manifest
WORDING = ("about", "when")  # of a recipe: another wording is not another run

Runner = Callable[[list[Run]], dict[str, str]]  # does runs; why each that failed did, by label


@dataclass(frozen=True)
class Facts:
    """What names a student's run besides its recipe: hashes of the pairs, the starting model and the labelled
    pictures, and the split of the table."""

    pairs: str
    student: str
    labelled: str | None
    split: str


@dataclass(frozen=True)
class Prepared:
    """The stages that students of one recipe train from."""

    features: Stage
    teacher_cache: Stage | None = None
    teacher: Stage | None = None
    others: tuple[str, ...] = ()
    fine_tuned: str | None = None  # folder of the student after plain fine-tuning
    pictures: Stage | None = None  # features of the pictures without captions


@dataclass
class Outcome:
    """The runs of an experiment, by recipe, and what failed. `teacher_model`: the figures of the model that
    teaches, where it isn't the student's own."""

    base: Run
    teacher_model: Run | None
    runs: dict[str, list[Run]]
    prepared: Prepared
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """A request with everything that it names, opened and checked."""

    request: Request
    pairs: Pairs
    base: TwoTower
    labelled: str | None  # fingerprint of the labelled pictures
    split: str  # of the table
    recipes: tuple[Recipe, ...]  # the rivals at the main recipe's budget, then the main one

    @classmethod
    def open(cls, request: Request) -> "Experiment":
        """Everything that can be wrong is said here, before the first minute of work; nothing is written.

        Raises:
            UsageError: a path, a base or a recipe that can't be meant. MissingExtra.
        """
        for package in NEEDED:
            need(package, "distill")
        check_out(request.out)
        pairs = Pairs.open(request.pairs)
        have = pairs.splits()
        if not have.get("train"):
            do = "dclip-qdrant pairs SOURCE -o DIR splits by itself"
            raise UsageError("`pairs`", f"no train split ({', '.join(have)})", "pictures to train on", do)
        if len(set(request.seeds)) != len(request.seeds):
            raise UsageError("`seeds`", ",".join(map(str, request.seeds)), "different numbers")
        rivals = tuple(same_budget(r, request.recipe) for r in request.compare)
        recipes = (*rivals, request.recipe)
        names = [r.name for r in recipes]
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice:
            raise UsageError("`compare`", f"two recipes named {twice!r}", "different names")
        check_teach(request)
        check_pictures(request, recipes)
        check_reader(request, recipes)
        trackers.check(request.tracker)
        labelled = labelled_fingerprint(request.labelled) if request.labelled else None
        base = two_tower.load(request.base)
        experiment = cls(request, pairs, base, labelled, pick_split(pairs, None), recipes)
        if experiment.split == "val" and have["val"] < 2:
            came = "no test split and one val picture"
            raise UsageError("`pairs`", came, "a test split, or val pictures that can be halved")
        experiment._check_recipes()
        if not have.get("val") and len(request.recipe.keep.wise_ft) > 1:
            logger.warning(
                "no val split: WiSE-FT's alpha can't be chosen by retrieval, the largest that keeps the "
                "retention is taken"
            )
        return experiment

    def _check_recipes(self) -> None:
        # a cut of the base has its width and its projections: nothing has to be cut to check them
        student = self.whole_student
        for model in {id(m): m for m in (self.base, student)}.values():
            try_towers(model)
        if self.request.recipe.student.inherit is None:  # a cut is smaller than what it is cut from
            check_size(student)
        if self.request.teach is not None:
            teach = self.request.teach
            objectives = Weighted(teach.objectives, self.base.dim, self.base.dim)
            try_recipe(teach, objectives.reads, self.base, self.base)
        for recipe in self.recipes:
            if recipe.ensemble.joint and student is self.base and self.request.teach is None:
                came = (
                    f"{recipe.name!r} joins a teacher with the student's start, and both are {student.name}"
                )
                expected = "`teacher`, another model, or `teacher_recipe`, which fine-tunes this one first"
                raise UsageError("`recipe`", came, expected)
            objectives = Weighted(recipe.objectives, student.dim, self.base.dim)
            try_recipe(recipe, objectives.reads, self.base, student)
            Weighted(recipe.index.objectives, student.dim, student.dim)
            if recipe.hubness.on or recipe.index.objectives:
                student.output_projections()
            if recipe.hubness.on:
                hubness.room(student.dim, recipe.hubness.share)
            if wants_regions(recipe):
                build(recipe.regions.detector, recipe.regions.options)

    @property
    def student_name(self) -> str:
        """The model that students start from, as workers load it: the base, another one, or a cut of
        either."""
        cut = self.request.recipe.student.inherit
        if cut:
            mark = digest({"base": self.whole_student_name, **cut.model_dump(exclude_none=True)})
            return str(storage.as_path(self.request.stages) / f"inherit-{mark}")
        return self.whole_student_name

    @property
    def whole_student_name(self) -> str:
        """The model that students start from, or are cut from."""
        return self.request.recipe.student.model or self.request.base

    @cached_property
    def whole_student(self) -> TwoTower:
        name = self.whole_student_name
        return self.base if name == self.request.base else two_tower.load(name)

    @cached_property
    def student(self) -> TwoTower:
        """The model that students start from. A cut is written under the stages, once."""
        return self._own_student() if self.request.recipe.student.inherit else self.whole_student

    def _own_student(self) -> TwoTower:
        """The model that students start from, opened anew: whoever says what of it learns wants one of their
        own. A cut is written first, whoever comes first."""
        cut = self.request.recipe.student.inherit
        if cut:
            inherit.write(self.whole_student, self.student_name, cut)
        return two_tower.load(self.student_name)

    @property
    def reference(self) -> str | None:
        """What retention is measured against, where it isn't the student as it starts: a cut of the base by
        itself knows nothing."""
        return self.whole_student_name if self.request.recipe.student.inherit else None

    @property
    def facts(self) -> Facts:
        return Facts(self.pairs.fingerprint, self.student.fingerprint, self.labelled, self.split)

    def taught(self) -> "Experiment":
        """This experiment with its teaching model fine-tuned on the pairs by the recipe `request.teach`: a
        stage of its own, an open_clip folder. The student starts where it would have started."""
        recipe = self.request.teach
        if recipe is None:
            return self
        alone = replace(self.request, recipe=recipe, compare=(), teach=None, seeds=self.request.seeds[:1])
        teaching = replace(self, request=alone, recipes=(recipe,))
        run = teaching.student_run(recipe, alone.seeds[0], teaching.prepare(recipe))
        folder = self._trained_model(run, "teacher-model", self.base)
        logger.info("teacher's model: %s", folder)
        start = self.request.recipe.student.model or self.request.base
        recipes = tuple(starting_from(recipe, start) for recipe in self.recipes)
        request = replace(self.request, base=folder, recipe=recipes[-1], teach=None)
        return replace(self, request=request, base=two_tower.load(folder), recipes=recipes)

    @cached_property
    def progress(self) -> Stages:
        """What the job is at."""
        main = self.request.recipe
        before = ["regions"] if wants_regions(main) else []
        teacher = ["teacher", "teacher cache"] if main.teacher else []
        return Stages([*before, "features", *teacher, "training", "export"])

    # --- reading

    def shape(self) -> Shape:
        """What is cached of the pictures of train, for the recipe that is cached most of."""
        manifest, splits = self.pairs.manifest, self.pairs.splits()
        total = sum(splits.values())
        captions = manifest.get("captions", total * GUESSED_CAPTIONS) / max(1, total)
        image, text = self.trunks_at_rest
        trunk, text_trunk = trunk_widths(self._own_student(), image=image, text=text)
        teachers = [recipe.teacher for recipe in self.recipes if recipe.teacher is not None]
        one_for_all = all(t.fusion == "regions_only" or t.caption == "same" for t in teachers)
        return Shape(
            pictures=splits.get("train", 0),
            captions=captions,
            views=max(recipe.train.views for recipe in self.recipes),
            regions=max((r.regions.top_k + 1 for r in self.recipes if wants_regions(r)), default=0),
            teacher=self.base.dim,
            trunk=trunk,
            text_trunk=text_trunk,
            targets=(1.0 if one_for_all else captions) if teachers else 0.0,
        )

    @cached_property
    def streams(self) -> bool:
        """Whether training streams. Needs a cluster."""
        # a reader that was asked for needs no shape, which takes a model
        return self.request.reader == "stream" or (self.request.reader == "auto" and self.must_stream())

    def must_stream(self, shape: Shape | None = None) -> bool:
        """Whether the pictures of train, or those of `shape`, don't fit into half of the smallest node's
        memory.

        Raises:
            UsageError: they don't, and a recipe can't be streamed.
        """
        limit = cluster.node_memory() / 2
        needed = (shape or self.shape()).in_memory(self.request.workers)
        streams = needed > limit
        logger.info(
            "reader: %s (all of train takes %.1f GB of a node, half of the smallest has %.1f)",
            "stream" if streams else "memory",
            needed / 1e9,
            limit / 1e9,
        )
        if streams:
            check_reader(replace(self.request, reader="stream"), self.recipes)
        return streams

    # --- stages

    def regions(self) -> Stage:
        return extract_regions(
            self.request.stages,
            self.pairs,
            self.request.recipe,
            actors=self.request.actors,
            from_scratch=self.request.from_scratch,
        )

    def prepare(self, recipe: Recipe) -> Prepared:
        """Regions, features, teacher and teacher cache of one recipe; whatever is there is reused."""
        request = self.request
        # a rival's own stages stand inside the main recipe's
        begin = self.progress.begin if recipe is request.recipe else lambda name: None
        if wants_regions(recipe):
            begin("regions")
        boxes = self.regions() if wants_regions(recipe) else None
        begin("features")
        features = extract_features(
            self.feature_request(recipe, boxes), actors=request.actors, from_scratch=request.from_scratch
        )
        folders = {model: self._other_model(recipe, model, features) for model in recipe.ensemble.models}
        others = tuple(self._features_of_other(recipe, m, folders[m]) for m in recipe.ensemble.models)
        fine_tuned = folders.get("fine_tuned")
        pictures = self._picture_features(recipe) if recipe.train.picture_share else None
        if recipe.teacher is None:
            return Prepared(features, others=others, fine_tuned=fine_tuned, pictures=pictures)
        run = self.teacher_run(recipe, features)
        cache = self.teacher_cache_stage(run)
        if request.from_scratch:
            run.stage.clear()
            cache.clear()
        begin("teacher")
        train_runs.run_in_order([run], workers=request.workers, storage=self.ray_storage())
        begin("teacher cache")
        cache_teacher(cache, features, base=request.base, teacher=run.stage.path, actors=request.actors)
        return Prepared(features, cache, run.stage, others, fine_tuned, pictures)

    def feature_request(self, recipe: Recipe, boxes: Stage | None) -> FeatureRequest:
        """What is to be cached for a recipe."""
        request, (image, text) = self.request, self.trunks_at_rest
        return FeatureRequest(
            root=request.stages,
            pairs=self.pairs,
            recipe=recipe,
            base=request.base,
            base_fingerprint=self.base.fingerprint,
            student=self.student_name if image or text else None,
            student_fingerprint=self.student.fingerprint,
            student_image=image,
            student_text=text,
            regions=boxes,
            seed=request.seeds[0],
            pictures=self._sends_pictures,
        )

    def teacher_run(self, recipe: Recipe, features: Stage) -> Run:
        """The `Run` of a recipe's region teacher."""
        if recipe.teacher is None:
            raise ValueError(f"{recipe.name} has no teacher")
        request, seed = self.request, self.request.seeds[0]
        settings = recipe.teacher.model_dump(mode="json")
        return Run(
            kind="teacher",
            root=request.stages,
            inputs={"features": features.path.name, "teacher": settings, "seed": seed} | self._read_by,
            recipe=recipe.as_dict(),
            seed=seed,
            base=request.base,
            student=self.student_name,
            pairs=request.pairs,
            features=str(features.path),
            streams=self.streams,
            tracker=self.request.tracker,
        )

    def teacher_cache_stage(self, teacher: Run) -> Stage:
        return Stage(self.request.stages, "teacher-cache", {"teacher": teacher.stage.path.name})

    def prepare_beside(self, recipe: Recipe, main: Prepared) -> Prepared:
        """What a rival trains from: the main recipe's features serve it too, where it asks for no teacher or
        views of its own."""
        main_recipe = self.request.recipe
        same_views = recipe.train.views == main_recipe.train.views
        regions_there = wants_regions(main_recipe) or not wants_regions(recipe)
        needs_more = recipe.teacher is not None or recipe.ensemble.models or recipe.train.picture_share
        if not needs_more and same_views and regions_there:
            return Prepared(main.features)
        return self.prepare(recipe)

    @cached_property
    def trunks_at_rest(self) -> tuple[bool, bool]:
        """Whether nothing below the student's image projection learns, and nothing below its text
        projection: then what they read is cached. The same for every recipe, since rivals get the main one's
        trainable set.

        A frozen text tower that is the teaching model's own needs no cache beside that one's vectors.
        """
        settings = self.request.recipe.student
        student = self._own_student()
        _, text_learns = student.choose_towers(settings)
        cached_already = not text_learns and self.student_name == self.request.base
        return student.trunk_frozen, student.text_trunk_frozen and not cached_already

    def _other_model(self, recipe: Recipe, model: str, features: Stage) -> str:
        """An open_clip name or the folder of a further teacher; made if it is missing."""
        if model == "student":
            return self.whole_student_name
        return self._fine_tuned_student(recipe, features) if model == "fine_tuned" else model

    def _features_of_other(self, recipe: Recipe, model: str, folder: str) -> str:
        """Where a further teacher's features of the same views are; made if they are missing."""
        if model == "base":
            return model
        logger.info("further teacher %s", model)
        request = FeatureRequest(
            root=self.request.stages,
            pairs=self.pairs,
            recipe=recipe.model_copy(update={"teacher": None}),
            base=folder,
            base_fingerprint="",
            seed=self.request.seeds[0],
        )
        request = replace(request, base_fingerprint=two_tower.load(request.base).fingerprint)
        if model == "student" and recipe.student.start == "fitted":  # below its projections too
            request = replace(
                request,
                student=self.student_name,
                student_fingerprint=self.student.fingerprint,
                student_image=self.student.has_trunk,
                student_text=self.student.has_text_trunk,
            )
        stage = extract_features(request, actors=self.request.actors, from_scratch=self.request.from_scratch)
        return str(stage.path)

    def _fine_tuned_student(self, recipe: Recipe, features: Stage) -> str:
        """The student after plain fine-tuning at this recipe's budget: what `sft` makes of the first seed as
        a rival, so that `compare` finds that run done. An open_clip folder."""
        rival = same_budget(Recipe.load("sft"), recipe)
        run = self.student_run(rival, self.request.seeds[0], self.prepare_beside(rival, Prepared(features)))
        return self._trained_model(run, "fine-tuned-student", self.student)

    def _trained_model(self, run: Run, name: str, like: TwoTower) -> str:
        """Does a student's run and writes what it trained as an open_clip folder `like` the model that it
        started from; where it is."""
        if self.request.from_scratch:
            run.stage.clear()
        train_runs.run_in_order([run], workers=self.request.workers, storage=self.ray_storage())
        folder = str(storage.as_path(self.request.stages) / f"{name}-{digest(run.inputs)}")
        write_model(
            folder,
            config=like.config,
            weights=safetensors.torch.load((run.stage.path / "weights.safetensors").read_bytes()),
            preprocess=like.preprocess,
            tokenizer=like.tokenizer,
        )
        return folder

    def _picture_features(self, recipe: Recipe) -> Stage:
        """What the teaching model (and the student's trunk, where it rests) sees in pictures without
        captions."""
        if self.request.pictures is None:
            raise ValueError("no pictures without captions")  # check_pictures has said so
        logger.info("pictures without captions")
        image_rests = self.trunks_at_rest[0]
        request = FeatureRequest(
            root=self.request.stages,
            pairs=Pairs.open(self.request.pictures),
            recipe=recipe.model_copy(update={"teacher": None}),
            base=self.request.base,
            base_fingerprint=self.base.fingerprint,
            student=self.student_name if image_rests else None,
            student_fingerprint=self.student.fingerprint,
            seed=self.request.seeds[0],
        )
        return extract_features(request, actors=self.request.actors, from_scratch=self.request.from_scratch)

    def ray_storage(self) -> str:
        path = storage.as_path(self.request.stages) / "ray"
        path.mkdir(parents=True, exist_ok=True)
        return str(path)

    # --- runs

    def student_run(self, recipe: Recipe, seed: int, prepared: Prepared) -> Run:
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
            asdict(self.facts)
            | {
                "recipe": settings,
                "seed": seed,
                "features": prepared.features.path.name,
                "cache": cache.path.name if cache else None,
                "min_retention": self.request.min_retention,
            }
            | self._read_by
        )
        if prepared.pictures:
            inputs["pictures"] = prepared.pictures.path.name
        if prepared.others:
            inputs["others"] = [storage.as_path(other).name for other in prepared.others]
        return Run(
            kind="student",
            root=self.request.stages,
            inputs=inputs,
            recipe=recipe.as_dict(),
            seed=seed,
            base=self.request.base,
            student=self.student_name,
            pairs=self.request.pairs,
            features=str(prepared.features.path),
            teacher=str(cache.path) if cache else None,
            others=prepared.others,
            fine_tuned=prepared.fine_tuned if recipe.keep.averages else None,
            pictures=self.request.pictures if prepared.pictures else None,
            picture_features=str(prepared.pictures.path) if prepared.pictures else None,
            reference=self.reference,
            labelled=self.request.labelled,
            min_retention=self.request.min_retention,
            split=self.split,
            streams=self.streams,
            tracker=self.request.tracker,
        )

    @property
    def _read_by(self) -> dict[str, str]:
        """What names a trained run beside what it reads: batches of a stream are others."""
        return {"reader": "stream"} if self.streams else {}

    @property
    def _sends_pictures(self) -> bool:
        """Whether the features hold pictures that are inside the pairs: a stream has no other way to them."""
        learns = not self.trunks_at_rest[0]
        return self.streams and learns and self.pairs.hold_pictures()

    def run(self, runner: Runner, *, tolerate: Callable[[Recipe, Exception], str] | None = None) -> Outcome:
        """Prepares every recipe and does what is missing of the base's run and every recipe's, seed by seed.

        `tolerate` says why a rival failed before training, which is then left out; without it the error
        passes.
        """
        main_recipe = self.request.recipe
        main = self.prepare(main_recipe)
        failures: dict[str, str] = {}
        runs: dict[str, list[Run]] = {}
        for recipe in self.recipes:
            try:
                prepared = main if recipe is main_recipe else self.prepare_beside(recipe, main)
            except Exception as e:
                if tolerate is None:
                    raise
                failures[recipe.name] = tolerate(recipe, e)
                continue
            runs[recipe.name] = [self.student_run(recipe, seed, prepared) for seed in self.request.seeds]
        first = runs[main_recipe.name][0]
        base = base_run(first)
        is_other = self.request.recipe.student.model not in (None, self.request.base)
        teacher_model = teacher_model_run(first) if is_other else None
        untrained = [run for run in (base, teacher_model) if run is not None]
        every = [*untrained, *(run for of_recipe in runs.values() for run in of_recipe)]
        if self.request.from_scratch:
            for run in every:
                run.stage.clear()
        self.progress.begin("training")
        failures |= runner(every)
        return Outcome(base, teacher_model, runs, main, failures)


def starting_from(recipe: Recipe, model: str) -> Recipe:
    """The recipe with its student started from this model."""
    return recipe.model_copy(update={"student": recipe.student.model_copy(update={"model": model})})


def wants_regions(recipe: Recipe) -> bool:
    """Whether a teacher or an objective asks for boxes."""
    return recipe.teacher is not None or reads_regions(recipe)


def base_run(student: Run) -> Run:
    """The `Run` that measures what a student's run is held against: the model that it starts from, or the one
    that it was cut from."""
    inputs = {k: student.inputs[k] for k in ("pairs", "student", "labelled", "split", "features")}
    return replace(student, kind="base", inputs=inputs, teacher=None, others=(), pictures=None)


def teacher_model_run(student: Run) -> Run:
    """The `Run` that measures the model that teaches by itself."""
    inputs = {k: student.inputs[k] for k in ("pairs", "labelled", "split", "features")}
    return replace(student, kind="teacher_model", inputs=inputs, teacher=None, others=(), reference=None)
