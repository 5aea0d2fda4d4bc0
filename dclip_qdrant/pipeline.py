"""The one job: runs whatever stage is missing, reuses the rest, and ends with a student folder and a table that shows what it is worth."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from upath import UPath

from dclip_qdrant import cluster, evaluation, metrics
from dclip_qdrant.errors import GateError, UsageError
from dclip_qdrant.labelled import Labelled
from dclip_qdrant.lookup import need
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.stages import Stage

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
        return self.recipe.student.model or self.base

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


def same_budget(recipe: Recipe, main: Recipe) -> Recipe:
    """`recipe` with the main one's detector, trainable set, budget and interpolation: rows are compared at equal student forward passes."""
    raw, other = recipe.as_dict(), main.as_dict()
    for part in ("student", "train", "keep"):
        raw[part] = other[part]
    raw["regions"] |= {k: other["regions"][k] for k in ("detector", "options")}
    share = main.train.region_share
    if share and not any(o.options.get("of") == "regions" for o in recipe.objectives):
        raw["train"] = other["train"] | {
            "region_share": 0.0,
            "epochs": math.ceil(main.train.epochs * (1 + share)),
        }  # crops are forward passes too
    return Recipe(**raw)


def regions(job: Job) -> Stage:
    from dclip_qdrant.ray_stages import extract_regions, regions_stage

    pairs = Pairs.open(job.pairs)
    if job.from_scratch:
        regions_stage(job.stages, pairs, job.recipe).clear()
    return extract_regions(job.stages, pairs, job.recipe, actors=job.actors, say=job.say)


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
    boxes = regions(job) if recipe.teacher else None
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
    if recipe.teacher is None:
        return Prepared(features, None, None)
    run = Run(kind="teacher", root=job.stages, inputs={"features": features.path.name, "teacher": recipe.teacher.model_dump(mode="json"), "seed": seed}, recipe=recipe.as_dict(), seed=seed,
              base=job.base, student=job.student, pairs=job.pairs, features=str(features.path))  # fmt: skip
    cache = Stage(job.stages, "teacher-cache", {"teacher": run.stage.path.name})
    if job.from_scratch:
        run.stage.clear()
        cache.clear()
    ray_train.run_all([run], workers=job.workers, storage=_storage(job), say=job.say)
    ray_stages.teacher_cache(cache, features, base=job.base, teacher=run.stage.path, actors=job.actors, say=job.say)
    return Prepared(features, cache, run.stage)


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
    from dclip_qdrant.training.student_task import Weighted

    teacher_dim = two_tower.load(job.base).dim
    dim = teacher_dim if job.student == job.base else two_tower.load(job.student).dim
    for recipe in (job.recipe, *(same_budget(r, job.recipe) for r in job.compare)):
        Weighted(recipe.objectives, dim, teacher_dim)
        Weighted(recipe.index.objectives, dim, dim)
        if recipe.teacher:
            build(recipe.regions.detector, recipe.regions.options)
    if job.labelled:
        Labelled.open(job.labelled)
    if not have.get("val") and (len(job.recipe.keep.wise_ft) > 1):
        job.say("no val split: WiSE-FT's alpha can't be chosen by retrieval, the largest that keeps the retention is taken")


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
    labelled = Labelled.open(job.labelled).fingerprint if job.labelled else None
    common = {"pairs": pairs.fingerprint, "student": student.fingerprint, "labelled": labelled, "split": split}

    def run(recipe: Recipe, seed: int, p: Prepared) -> Run:
        inputs = common | {
            "recipe": recipe.as_dict(),
            "seed": seed,
            "features": p.features.path.name,
            "cache": p.cache.path.name if p.cache else None,
            "min_retention": job.min_retention,
        }
        return Run(kind="student", root=job.stages, inputs=inputs, recipe=recipe.as_dict(), seed=seed, base=job.base, student=job.student, pairs=job.pairs,
                   features=str(p.features.path), teacher=str(p.cache.path) if p.cache else None, labelled=job.labelled, min_retention=job.min_retention, split=split)  # fmt: skip

    recipes = [*(same_budget(r, job.recipe) for r in job.compare), job.recipe]
    main = prepare(job, job.recipe)
    runs: list[Run] = []
    for recipe in recipes:
        p = main if recipe == job.recipe else Prepared(main.features, None, None) if recipe.teacher is None else prepare(job, recipe)
        runs += [run(recipe, seed, p) for seed in job.seeds]
    first = runs[0]
    start = Run(**(first.as_dict() | {"kind": "base", "inputs": common | {"features": first.inputs["features"]}, "teacher": None}))
    if job.from_scratch:
        for r in (start, *runs):
            r.stage.clear()
    ray_train.run_all([start, *runs], workers=job.workers, storage=_storage(job), say=job.say)
    rows = [_row("base", [_figures(start)])]
    for recipe in recipes:
        group = [r for r in runs if r.recipe == recipe.as_dict()]
        name = recipe.name
        if recipe != job.recipe and len(recipe.keep.wise_ft) > 1:
            rows.append(_row(name, [_figures(r, "_at_1") for r in group]))
            name += "+wise_ft"
        rows.append(_row(name, [_figures(r) for r in group], [r.stage.manifest()["metrics"]["alpha"] for r in group]))
    chosen = next(r for r in runs if r.recipe == job.recipe.as_dict() and r.seed == job.seeds[0])
    folder = _export(job, chosen, base=student, rows=rows)
    result = {"rows": rows, "student": str(folder), "split": split, "comparisons": _comparisons(runs, start, job), "runs": {r.label: str(r.stage.path) for r in runs},
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


def _figures(run: Any, suffix: str = "") -> dict[str, Any]:
    """A run's figures on the test split; with "_at_1" those of the trained weights before WiSE-FT."""
    m = run.stage.manifest()["metrics"]
    return m["test" + suffix] | {k: m.get(k + suffix, m.get(k)) for k in ("zero_shot", "retention")}


def _row(name: str, seeds: list[dict[str, Any]], alphas: list[float] | None = None) -> dict[str, Any]:
    """Means over seeds, the standard deviation beside them."""

    def over(get: Callable[[dict[str, Any]], float | None]) -> tuple[float | None, float | None]:
        values = [get(s) for s in seeds]
        if any(v is None for v in values):
            return None, None
        return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None

    row: dict[str, Any] = {"name": name, "seeds": len(seeds), "n_images": seeds[0]["n_images"], "n_texts": seeds[0]["n_texts"]}
    spread: dict[str, Any] = {}
    for way in ("t2i", "i2t"):
        row[way], spread[way] = {}, {}
        for key in seeds[0][way]:
            row[way][key], spread[way][key] = over(lambda s, w=way, k=key: s[w][k])
    for key in ("mrr", "map", "mean_r@1", "zero_shot", "retention"):
        row[key], spread[key] = over(lambda s, k=key: s.get(k))
    if len(seeds) > 1:
        row["spread"] = spread
    else:
        row["ci"] = seeds[0].get("ci")
    if alphas:
        row["alphas"] = alphas
    return row


def _comparisons(runs: list[Any], start: Any, job: Job) -> list[dict[str, Any]]:
    """The main recipe against the base and each other recipe, paired over pictures; seeds are averaged picture by picture."""
    from dclip_qdrant.training.runs import load_ranks

    def score(stage: Stage, name: str) -> np.ndarray:
        return metrics.mean_r1(load_ranks(stage.path, name))

    def mean(recipe: dict[str, Any], name: str) -> np.ndarray:
        chosen = [r.stage for r in runs if r.recipe == recipe]
        return np.mean([score(s, name if (s.path / f"ranks-{name}.npz").exists() else "test") for s in chosen], axis=0)

    mine = mean(job.recipe.as_dict(), "test")
    rivals = [("base", score(start.stage, "test"))]
    for recipe in {json.dumps(r.recipe): r.recipe for r in runs if r.recipe != job.recipe.as_dict()}.values():
        rivals.append((recipe["name"], mean(recipe, "test_at_1")))
        if len(recipe["keep"]["wise_ft"]) > 1:
            rivals.append((recipe["name"] + "+wise_ft", mean(recipe, "test")))
    return [{"of": job.recipe.name, "than": name} | metrics.paired_difference(theirs, mine) for name, theirs in rivals]


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
            two_tower.load(job.student),
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
