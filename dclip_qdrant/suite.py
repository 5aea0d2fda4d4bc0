"""The experiment in one command: recipes x seeds as Ray tasks, at equal budgets, and a report that says which differences are inside the noise.

A suite is a TOML file (`suites/`): groups of recipes that are compared at the same trainable set. A run that is done is reused, one that fails is
named and doesn't sink the others.
"""

import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from upath import UPath

from dclip_qdrant import cluster, comparison, evaluation, metrics, pipeline
from dclip_qdrant.errors import RecipeError
from dclip_qdrant.labelled import Labelled
from dclip_qdrant.lookup import did_you_mean
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.recipe import Recipe

HERE = Path(__file__).parent / "suites"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Group(_Part):
    """Recipes at one trainable set."""

    title: str
    about: str = ""
    main: str = Field(description="the recipe that sets detector, trainable set, learning rates and budget for all of the group")
    recipes: tuple[str, ...] = Field((), description="the others")
    set: tuple[str, ...] = Field((), description="settings on top of the main recipe")
    rival: str = Field("sft", description="what every row is held against besides the base")


class Suite(_Part):
    name: str
    about: str = ""
    seeds: tuple[int, ...] = (0, 1, 2)
    prepare: str = Field("", description="how the pairs are made; for people, nothing is run")
    groups: tuple[Group, ...] = Field(min_length=1)

    @classmethod
    def load(cls, name: str) -> "Suite":
        """A suite by name or path. Raises RecipeError: none there, not TOML, an unknown key."""
        path = Path(name) if name.endswith(".toml") else HERE / f"{name}.toml"
        if not path.is_file():
            raise RecipeError("--suite", f"no {name!r}", do=did_you_mean(name, suite_names()))
        try:
            return cls(**tomllib.loads(path.read_text()))
        except tomllib.TOMLDecodeError as e:
            raise RecipeError(path, f"not TOML: {e}") from e
        except ValidationError as e:
            first = e.errors()[0]
            raise RecipeError(path, f"{'.'.join(map(str, first['loc']))}: {first['msg'][0].lower()}{first['msg'][1:]}") from e


def only(suite: Suite, groups: tuple[str, ...], recipes: tuple[str, ...]) -> Suite:
    """A part of a suite: the groups of these titles and, beside each group's main recipe, these recipes; an empty tuple leaves all.

    Raises:
        RecipeError: a title or a recipe that isn't there.
    """
    titles = [g.title for g in suite.groups]
    named = {r for g in suite.groups for r in g.recipes}
    for flag, wanted, known in (("--group", groups, titles), ("--recipe", recipes, sorted(named))):
        for name in wanted:
            if name not in known:
                raise RecipeError(flag, f"no {name!r} in suite {suite.name}", do=did_you_mean(name, known))
    kept = [g for g in suite.groups if not groups or g.title in groups]
    return suite.model_copy(update={"groups": tuple(g.model_copy(update={"recipes": tuple(r for r in g.recipes if not recipes or r in recipes)}) for g in kept)})


def suite_names() -> list[str]:
    return sorted(p.stem for p in HERE.glob("*.toml"))


@dataclass(frozen=True)
class Asked:
    """What compare was asked for beside the suite; paths as in `pipeline.Job`."""

    pairs: str
    base: str
    out: str
    labelled: str | None = None
    settings: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None
    parallel: int | None = None
    min_retention: float = 1.0
    say: Callable[[str], None] = print


def compare(suite: Suite, asked: Asked) -> dict[str, Any]:
    """Runs what is missing; the result, as it is in `compare.json` under `out`: for each group rows, differences and failures."""
    cluster.connect()
    jobs = [_job(group, suite, asked) for group in suite.groups]
    for job in jobs:
        pipeline.check(job)  # all mistakes before the first minute of work
    groups = [_group(group, job, asked) for group, job in zip(suite.groups, jobs, strict=True)]
    result = {"suite": suite.name, "about": suite.about, "seeds": list(jobs[0].seeds), "groups": groups}
    (UPath(asked.out) / "compare.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def _job(group: Group, suite: Suite, asked: Asked) -> pipeline.Job:
    return pipeline.Job(
        pairs=asked.pairs, base=asked.base, out=asked.out, recipe=Recipe.load(group.main, [*group.set, *asked.settings]), compare=tuple(Recipe.load(r) for r in group.recipes),
        seeds=asked.seeds or suite.seeds, labelled=asked.labelled, min_retention=asked.min_retention, say=asked.say,
    )  # fmt: skip


def _group(group: Group, job: pipeline.Job, asked: Asked) -> dict[str, Any]:
    from dclip_qdrant.models import two_tower

    pairs = Pairs.open(job.pairs)
    split = evaluation.pick_split(pairs, None)
    start = two_tower.load(job.student)
    facts = pipeline.Facts(pairs.fingerprint, start.fingerprint, Labelled.open(job.labelled).fingerprint if job.labelled else None, split)
    failures: dict[str, str] = {}
    recipes = [job.recipe, *(comparison.same_budget(r, job.recipe) for r in job.compare)]
    main = pipeline.prepare(job, job.recipe)
    runs: dict[str, list[Any]] = {}
    for recipe in recipes:
        try:
            p = main if recipe is job.recipe else pipeline.prepare_beside(job, recipe, main)
        except Exception as e:  # a rival's teacher that can't be trained is that rival's failure
            failures[recipe.name] = _why(e)
            job.say(f"{recipe.name}: failed before training, {failures[recipe.name]}")
            continue
        runs[recipe.name] = [pipeline.student_run(job, recipe, seed, p, facts) for seed in job.seeds]
    base = pipeline.base_run(runs[job.recipe.name][0])
    failed = run_tasks([base, *(r for rs in runs.values() for r in rs)], parallel=asked.parallel, say=job.say)
    failures |= failed
    if not base.stage.done:
        raise RecipeError(group.title, f"the base could not be measured: {failures.get(base.label)}")
    done = {name: [r for r in rs if r.stage.done] for name, rs in runs.items()}
    rows = [comparison.row("base", [comparison.figures(base)])]
    for recipe in recipes:
        if done.get(recipe.name):
            new = comparison.recipe_rows(recipe, done[recipe.name], both=True)
            seconds = sum(r.stage.manifest()["metrics"]["seconds"] for r in done[recipe.name]) / len(done[recipe.name])
            for r in new:
                r |= {"seconds": seconds, "epochs": recipe.train.epochs, "passes": round(recipe.train.epochs * (1 + recipe.train.region_share), 2)}
            rows += new
    against = _differences(group.rival, recipes, done, base)
    sweeps = {name: _frontier(rs) for name, rs in done.items() if rs and len(rs[0].recipe["keep"]["wise_ft"]) > 1}
    return {"title": group.title, "about": group.about, "main": group.main, "split": split, "rows": rows, "differences": against, "failures": failures,
            "sweeps": sweeps, "start": _size(start, job)}  # fmt: skip


def _why(e: BaseException) -> str:
    ours = cluster.ours(e)
    return str(ours) if ours else f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"[:300]


def _differences(rival: str, recipes: list[Recipe], done: dict[str, list[Any]], base: Any) -> list[dict[str, Any]]:
    """Each recipe (after WiSE-FT, where it has that) minus the base, the rival as trained, and the rival after WiSE-FT."""
    against = [("base", comparison.scores([base]))]
    if done.get(rival):
        against.append((rival, comparison.scores(done[rival], "test_at_1")))
        if len(done[rival][0].recipe["keep"]["wise_ft"]) > 1:
            against.append((f"{rival}+wise_ft", comparison.scores(done[rival])))
    out = []
    for recipe in recipes:
        if done.get(recipe.name):
            mine = comparison.scores(done[recipe.name])
            name = recipe.name + ("+wise_ft" if len(recipe.keep.wise_ft) > 1 else "")
            out += [{"of": name, "than": than} | metrics.paired_difference(theirs, mine) for than, theirs in against if than != name]
    return out


def _frontier(runs: list[Any]) -> list[dict[str, float]]:
    """What WiSE-FT's alphas trade on validation, means over seeds; with the first seed's choice of a strength against hubs."""
    found = [r.stage.manifest()["metrics"] for r in runs]
    sweeps = [[p for p in m["sweep"] if p.get("hubness") == found[0].get("hubness")] for m in found]
    mean = lambda points, key: sum(p[key] for p in points) / len(points)
    return [
        {"alpha": points[0]["alpha"]} | {k: mean(points, k) for k in ("val_mean_r@1", "val", "retention") if all(k in p for p in points)}
        for points in zip(*sweeps, strict=True)
    ]


def _size(start: Any, job: pipeline.Job) -> dict[str, Any]:
    """Parameters and latency of the group's students, which all have one architecture: measured on the model that they start from, as a student folder."""
    from dclip_qdrant.export import export
    from dclip_qdrant.student import Student

    folder = Path(job.stages) / f"start-{start.fingerprint[:12]}"
    if not (folder / "manifest.json").is_file():
        export(start, folder, name="start", metrics={}, recipe={"name": "start"})
    student = Student.load(folder)
    texts = Pairs.open(job.pairs).table(["captions"])["captions"].slice(0, 60).to_pylist()
    return student.manifest["parameters"] | evaluation.latency(student, [c for cs in texts for c in cs])


# --- tasks


def run_tasks(runs: list[Any], *, parallel: int | None, say: Callable[[str], None]) -> dict[str, str]:
    """Does the runs that are not done, each a task of one of `parallel` Ray actors (default: one a GPU, or one for every four CPUs); why each failed one failed.

    An actor keeps what its runs share (evaluation sets); one that dies is started anew and takes only its own run with it.
    """
    import ray

    todo = [r for r in runs if not r.stage.done]
    for r in runs:
        if r not in todo:
            say(f"{r.label}: reused {r.stage.path.name}")
    if not todo:
        return {}
    size = min(len(todo), cluster.pool_size(parallel))

    @ray.remote(num_cpus=1, num_gpus=1 if cluster.gpus() else 0, max_restarts=-1, max_task_retries=0)
    class Trainer:
        def __init__(self, threads: int) -> None:
            import torch

            from dclip_qdrant.training.distributed import Comm
            from dclip_qdrant.training.runs import Worker

            torch.set_num_threads(threads)
            self.worker = Worker(Comm(), "cuda" if torch.cuda.is_available() else "cpu", lambda line: print(line, flush=True))

        def do(self, run: dict[str, Any]) -> str | None:
            from dclip_qdrant.training.runs import Run

            try:
                self.worker.do(Run(**run))
            except Exception as e:
                return _why(e)
            return None

    trainers = [Trainer.remote(cluster.threads_for(size)) for _ in range(size)]
    idle, waiting, failed = list(trainers), list(todo), {}
    flying: dict[Any, tuple[Any, Any]] = {}
    while waiting or flying:
        while waiting and idle:
            trainer, run = idle.pop(), waiting.pop(0)
            flying[trainer.do.remote(run.as_dict())] = (trainer, run)
        (ready, *_), _ = ray.wait(list(flying))
        trainer, run = flying.pop(ready)
        idle.append(trainer)
        try:
            why = ray.get(ready)
        except ray.exceptions.RayError as e:
            why = _why(e)
        if why is not None:
            failed[run.label] = why
            say(f"{run.label}: failed, {why}")
        else:
            say(f"{run.label}: done ({len(todo) - len(waiting) - len(flying)} of {len(todo)})")
    for trainer in trainers:
        ray.kill(trainer)
    return failed


def leaked(asked: Asked, share: float) -> Asked:
    """The same question of pairs in which `share` of the test pictures stand in train too, as in DCLIP's own data (docs/papers.md 1.2)."""
    from dclip_qdrant.pairs.leak import leak

    folder = UPath(asked.out) / f"leaked-{share:g}"
    leak(asked.pairs, str(folder), share=share)
    return replace(asked, pairs=str(folder), out=str(UPath(asked.out) / "leaked"))


__all__ = ["Asked", "Suite", "compare", "leaked", "only", "run_tasks", "suite_names"]
