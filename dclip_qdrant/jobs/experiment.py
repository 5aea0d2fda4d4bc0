"""One experiment: pairs, base, student, split and facts, resolved once for the runs of recipes on them."""

import logging
from dataclasses import dataclass, replace
from functools import cached_property

from dclip_qdrant.detectors import build
from dclip_qdrant.errors import UsageError
from dclip_qdrant.jobs import cluster
from dclip_qdrant.jobs.comparison import same_budget
from dclip_qdrant.jobs.needs import Shape, trunk_widths
from dclip_qdrant.jobs.request import (
    Request,
    check_out,
    check_pictures,
    check_reader,
    check_teach,
    labelled_fingerprint,
)
from dclip_qdrant.lookup import need
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.pairs.splits import pick_split
from dclip_qdrant.progress import Stages
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.tables import storage
from dclip_qdrant.tables.stages import digest
from dclip_qdrant.training import hubness, trackers
from dclip_qdrant.training.models import inherit, two_tower
from dclip_qdrant.training.models.trial import check_size, try_recipe, try_towers
from dclip_qdrant.training.models.two_tower import TwoTower
from dclip_qdrant.training.student_task import Weighted, reads_regions

logger = logging.getLogger(__name__)

NEEDED = ("torch", "open_clip", "ray", "onnx", "onnxscript", "safetensors")
GUESSED_CAPTIONS = 5  # a picture, of pairs without a manifest


@dataclass(frozen=True)
class Facts:
    """What names a student's run besides its recipe: hashes of the pairs, the starting model and the labelled
    pictures, and the split of the table."""

    pairs: str
    student: str
    labelled: str | None
    split: str


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

    def ray_storage(self) -> str:
        path = storage.as_path(self.request.stages) / "ray"
        path.mkdir(parents=True, exist_ok=True)
        return str(path)

    # --- runs

    @property
    def read_by(self) -> dict[str, str]:
        """What names a trained run beside what it reads: batches of a stream are others."""
        return {"reader": "stream"} if self.streams else {}

    @property
    def sends_pictures(self) -> bool:
        """Whether the features hold pictures that are inside the pairs: a stream has no other way to them."""
        learns = not self.trunks_at_rest[0]
        return self.streams and learns and self.pairs.hold_pictures()


def wants_regions(recipe: Recipe) -> bool:
    """Whether a teacher or an objective asks for boxes."""
    return recipe.teacher is not None or reads_regions(recipe)
