"""The one job: runs whatever stage is missing, reuses the rest, and ends with a student folder and a table that shows what it is worth."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from upath import UPath

from dclip_qdrant import cluster, evaluation
from dclip_qdrant.comparison import differences, figures, recipe_rows, row, same_budget
from dclip_qdrant.errors import GateError, UsageError
from dclip_qdrant.labelled import Labelled
from dclip_qdrant.lookup import need
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.stages import Stage, digest

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What distill was asked for. Paths are absolute or URIs (`cluster.absolute`)."""

    pairs: str
    base: str
    out: str
    recipe: Recipe
    compare: tuple[Recipe, ...] = ()
    seeds: tuple[int, ...] = (0,)
    workers: int = 1
    actors: int | None = None
    labelled: str | None = None
    min_retention: float = 1.0
    name: str | None = None
    from_scratch: bool = False
    say: Say = field(default=print)

    @property
    def student(self) -> str:
        """The model that students start from; a cut of the base stands in a folder under the stages once `cut_student` wrote it."""
        cut = self.recipe.student.inherit
        if cut:
            return str(UPath(self.stages) / f"inherit-{digest({'base': self.base, **cut.model_dump()})}")
        return self.recipe.student.model or self.base

    @property
    def reference(self) -> str | None:
        """What retention is measured against, where it isn't the student as it starts: a cut of the base by itself knows nothing."""
        return self.base if self.recipe.student.inherit else None

    @property
    def stages(self) -> str:
        """Where stage folders go; the student and the table stand beside them."""
        return str(UPath(self.out) / "stages")


@dataclass(frozen=True)
class Prepared:
    """The stages that students of one recipe train from."""

    features: Stage
    cache: Stage | None
    teacher: Stage | None
    others: tuple[str, ...] = ()


def cut_student(job: Job) -> None:
    """Writes the student's starting point, where it is a cut of the base."""
    cut = job.recipe.student.inherit
    if cut:
        from dclip_qdrant.models import inherit

        inherit.write(job.base, Path(job.student), image_layers=cut.image_layers, text_layers=cut.text_layers)


def regions(job: Job) -> Stage:
    from dclip_qdrant.ray_stages import extract_regions, regions_stage

    pairs = Pairs.open(job.pairs)
    if job.from_scratch:
        regions_stage(job.stages, pairs, job.recipe).clear()
    return extract_regions(job.stages, pairs, job.recipe, actors=job.actors, say=job.say)


def wants_regions(recipe: Recipe) -> bool:
    """Whether a teacher or an objective asks for boxes."""
    from dclip_qdrant.training.student_task import reads_regions

    return recipe.teacher is not None or reads_regions(recipe)


def prepare(job: Job, recipe: Recipe) -> Prepared:
    """Regions, features, teacher and teacher cache of one recipe; whatever is there is reused."""
    from dclip_qdrant import ray_stages
    from dclip_qdrant.models import two_tower
    from dclip_qdrant.training import ray_train
    from dclip_qdrant.training.runs import Run

    pairs = Pairs.open(job.pairs)
    base = two_tower.load(job.base)
    student = base if job.student == job.base else two_tower.load(job.student)
    s = recipe.student
    student.choose("image", s.train, last_n=s.last_n, rank=s.lora_rank, alpha=s.lora_alpha)
    trunk = student.trunk_frozen
    boxes = regions(job) if wants_regions(recipe) else None
    seed = job.seeds[0]
    features = ray_stages.features_stage(job.stages, pairs, recipe, base=job.base, base_print=base.fingerprint, student=job.student, student_print=student.fingerprint, trunk=trunk,
                                         regions=boxes, seed=seed)  # fmt: skip
    if job.from_scratch:
        features.clear()
    ray_stages.extract_features(
        features,
        pairs,
        recipe,
        base=job.base,
        student=job.student if trunk else None,
        regions=boxes,
        seed=seed,
        actors=job.actors,
        say=job.say,
    )
    others = tuple(_other_teacher(job, recipe, pairs, model, seed) for model in recipe.ensemble.models)
    if recipe.teacher is None:
        return Prepared(features, None, None, others)
    run = Run(kind="teacher", root=job.stages, inputs={"features": features.path.name, "teacher": recipe.teacher.model_dump(mode="json"), "seed": seed}, recipe=recipe.as_dict(), seed=seed,
              base=job.base, student=job.student, pairs=job.pairs, features=str(features.path))  # fmt: skip
    cache = Stage(job.stages, "teacher-cache", {"teacher": run.stage.path.name})
    if job.from_scratch:
        run.stage.clear()
        cache.clear()
    ray_train.run_all([run], workers=job.workers, storage=_storage(job), say=job.say)
    ray_stages.teacher_cache(cache, features, base=job.base, teacher=run.stage.path, actors=job.actors, say=job.say)
    return Prepared(features, cache, run.stage, others)


def prepare_beside(job: Job, recipe: Recipe, main: Prepared) -> Prepared:
    """What a rival trains from: the main recipe's features serve it too, where it asks for no teacher or views of its own."""
    if recipe.teacher is None and not recipe.ensemble.models and recipe.train.views == job.recipe.train.views and (wants_regions(job.recipe) or not wants_regions(recipe)):
        return Prepared(main.features, None, None)
    return prepare(job, recipe)


def _other_teacher(job: Job, recipe: Recipe, pairs: Pairs, model: str, seed: int) -> str:
    """Where a further teacher's features of the same views are; made if they are missing."""
    from dclip_qdrant import ray_stages
    from dclip_qdrant.models import two_tower

    if model == "base":
        return model
    alone = Recipe(**(recipe.as_dict() | {"teacher": None}))
    fingerprint = two_tower.load(model).fingerprint
    stage = ray_stages.features_stage(job.stages, pairs, alone, base=model, base_print=fingerprint, student=model, student_print="", trunk=False, regions=None, seed=seed)
    if job.from_scratch:
        stage.clear()
    job.say(f"further teacher {model}")
    ray_stages.extract_features(stage, pairs, alone, base=model, student=None, regions=None, seed=seed, actors=job.actors, say=job.say)
    return str(stage.path)


def _storage(job: Job) -> str:
    path = UPath(job.stages) / "ray"
    path.mkdir(parents=True, exist_ok=True)
    return str(path)


def check(job: Job) -> None:
    """Everything that can be wrong is said before the first minute of work."""
    for package in ("torch", "open_clip", "ray", "onnx", "onnxscript", "safetensors"):
        need(package, "distill")
    pairs = Pairs.open(job.pairs)
    have = pairs.splits()
    if not have.get("train"):
        raise UsageError(
            "--pairs", f"no train split ({', '.join(have)})", "pictures to train on", "dclip-qdrant pairs SOURCE -o DIR splits by itself"
        )
    if len(set(job.seeds)) != len(job.seeds):
        raise UsageError("--seeds", ",".join(map(str, job.seeds)), "different numbers")
    from dclip_qdrant.detectors import build
    from dclip_qdrant.models import two_tower
    from dclip_qdrant.training import hubness
    from dclip_qdrant.training.student_task import Weighted

    cut_student(job)
    base = two_tower.load(job.base)
    student = base if job.student == job.base else two_tower.load(job.student)
    dim, teacher_dim = student.dim, base.dim
    for recipe in (job.recipe, *(same_budget(r, job.recipe) for r in job.compare)):
        Weighted(recipe.objectives, dim, teacher_dim)
        Weighted(recipe.index.objectives, dim, dim)
        if recipe.hubness.on or recipe.index.objectives:
            student.output_projections()
        if recipe.hubness.on:
            hubness.room(dim, recipe.hubness.share)
        if wants_regions(recipe):
            build(recipe.regions.detector, recipe.regions.options)
    if job.labelled:
        Labelled.open(job.labelled)
    if not have.get("val") and (len(job.recipe.keep.wise_ft) > 1):
        job.say("no val split: WiSE-FT's alpha can't be chosen by retrieval, the largest that keeps the retention is taken")


@dataclass(frozen=True)
class Facts:
    """What names a student's run besides its recipe: hashes of the pairs, the starting model and the labelled pictures, and the split of the table."""

    pairs: str
    student: str
    labelled: str | None
    split: str


def student_run(job: Job, recipe: Recipe, seed: int, p: Prepared, facts: Facts) -> Any:
    """The `Run` of one recipe and seed."""
    from dclip_qdrant.training.runs import Run

    what = {k: v for k, v in recipe.as_dict().items() if k not in ("about", "when")}  # another wording is not another run
    if not recipe.hubness.on:
        del what["hubness"]  # off is what there was before there was such a part
    inputs = asdict(facts) | {"recipe": what, "seed": seed, "features": p.features.path.name, "cache": p.cache.path.name if p.cache else None,
                              "min_retention": job.min_retention}  # fmt: skip
    if p.others:
        inputs["others"] = [UPath(o).name for o in p.others]
    return Run(kind="student", root=job.stages, inputs=inputs, recipe=recipe.as_dict(), seed=seed, base=job.base, student=job.student, pairs=job.pairs,
               features=str(p.features.path), teacher=str(p.cache.path) if p.cache else None, others=p.others, reference=job.reference, labelled=job.labelled,
               min_retention=job.min_retention, split=facts.split)  # fmt: skip


def base_run(student: Any) -> Any:
    """The `Run` that measures what a student's run is held against: the model that it starts from, or the one that it was cut from."""
    inputs = {k: student.inputs[k] for k in ("pairs", "student", "labelled", "split", "features")}
    return replace(student, kind="base", inputs=inputs, teacher=None, others=())


def distill(job: Job) -> dict[str, Any]:
    """The table's rows and the student's folder; see `Job`.

    Raises:
        GateError: the student keeps less than `min_retention` (it is written all the same).
    """
    from dclip_qdrant.models import two_tower
    from dclip_qdrant.training import ray_train
    from dclip_qdrant.training.runs import Run

    check(job)
    cluster.connect()
    pairs = Pairs.open(job.pairs)
    split = evaluation.pick_split(pairs, None)
    if split != "test":
        job.say(f"no test split: the table is measured on {split}" + (", which also chose alpha" if split == "val" else ""))
    base = two_tower.load(job.base)
    student = base if job.student == job.base else two_tower.load(job.student)
    facts = Facts(pairs.fingerprint, student.fingerprint, Labelled.open(job.labelled).fingerprint if job.labelled else None, split)
    recipes = [*(same_budget(r, job.recipe) for r in job.compare), job.recipe]
    main = prepare(job, job.recipe)
    runs: list[Run] = []
    for recipe in recipes:
        p = main if recipe == job.recipe else prepare_beside(job, recipe, main)
        runs += [student_run(job, recipe, seed, p, facts) for seed in job.seeds]
    start = base_run(runs[0])
    if job.from_scratch:
        for r in (start, *runs):
            r.stage.clear()
    ray_train.run_all([start, *runs], workers=job.workers, storage=_storage(job), say=job.say)
    rows = [row("base", [figures(start)])]
    for recipe in recipes:
        rows += recipe_rows(recipe, [r for r in runs if r.recipe == recipe.as_dict()], both=recipe != job.recipe)
    chosen = next(r for r in runs if r.recipe == job.recipe.as_dict() and r.seed == job.seeds[0])
    folder = _export(job, chosen, base=student, rows=rows)
    result = {"rows": rows, "student": str(folder), "split": split, "comparisons": differences(job.recipe, runs, start), "runs": {r.label: str(r.stage.path) for r in runs},
              "teacher": main.teacher.manifest() if main.teacher else None}  # fmt: skip
    (UPath(job.out) / "table.json").write_text(json.dumps(result, indent=1) + "\n")
    text = evaluation.table(rows)
    (UPath(job.out) / "table.md").write_text(text + "\n")
    job.say(f"\n{text}\n")
    for c in result["comparisons"]:
        job.say(
            f"{c['of']} minus {c['than']}, mean R@1 over both directions and all seeds: {c['difference'] * 100:+.1f} points, 95% [{c['ci'][0] * 100:+.1f}, {c['ci'][1] * 100:+.1f}]"
        )
    kept = rows[-1].get("retention")
    if kept is None:
        job.say("retention was not measured: give labelled pictures with --labelled")
    job.say(f"student: {folder}")
    final = chosen.stage.manifest()["metrics"].get("retention")
    if final is not None and final < job.min_retention:
        raise GateError(
            "retention",
            f"{final:.3f}",
            f"at least {job.min_retention:.3f}",
            f"the student is kept in {folder}; lower train.lr, or add smaller alphas to keep.wise_ft",
        )
    return result


def _export(job: Job, chosen: Any, *, base: Any, rows: list[dict[str, Any]]) -> Path:
    """The student folder, and the base beside it in the same form (for before-and-after, and for retention on other pictures)."""
    import safetensors.torch

    from dclip_qdrant.export import export
    from dclip_qdrant.models import two_tower
    from dclip_qdrant.student import Student

    out = Path(job.out)
    base_folder = out / "base"
    if not (base_folder / "manifest.json").exists() or job.from_scratch:
        export(
            two_tower.load(job.reference or job.student),
            base_folder,
            name="base",
            metrics={},
            recipe={"name": "base"},
            card="The model that the student started from, unchanged.\n",
        )
    marker = out / "student" / "run.txt"
    if marker.exists() and marker.read_text() == chosen.stage.path.name and not job.from_scratch:
        job.say("export: reused")
        return out / "student"
    model = two_tower.load(job.student)
    model.load_weights(safetensors.torch.load((chosen.stage.path / "weights.safetensors").read_bytes()))
    figures = chosen.stage.manifest()["metrics"] | {
        "base_student": {"folder": "../base", "fingerprint": Student.load(base_folder).fingerprint}
    }
    name = job.name or job.recipe.name
    folder = export(
        model, out / "student", name=name, metrics=figures, recipe=chosen.recipe, card="## Figures\n\n" + evaluation.table(rows) + "\n\n"
    )
    (folder / "run.txt").write_text(chosen.stage.path.name)
    job.say(f"export: {Student.load(folder).model_name}, agrees with torch")
    return folder
