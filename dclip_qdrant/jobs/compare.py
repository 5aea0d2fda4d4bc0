"""The experiment in one command: recipes x seeds as Ray tasks, at equal budgets.

A run that is done is reused, one that fails is named and doesn't sink the others. `suite_report.py` says
which differences are inside the noise.
"""

import logging
from dataclasses import asdict, dataclass, replace
from typing import Any

from dclip_qdrant.errors import RecipeError
from dclip_qdrant.jobs import cluster, comparison
from dclip_qdrant.jobs.comparison import AFTER_WISE_FT, Difference, Row
from dclip_qdrant.jobs.conduct import Outcome, conduct
from dclip_qdrant.jobs.experiment import Experiment
from dclip_qdrant.jobs.export import export
from dclip_qdrant.jobs.request import Request
from dclip_qdrant.jobs.stream import alone
from dclip_qdrant.jobs.suite import Group, Suite
from dclip_qdrant.jobs.train_runs import not_done
from dclip_qdrant.pairs.leak import leak
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.serving.evaluation import latency
from dclip_qdrant.serving.student import Student
from dclip_qdrant.tables import storage
from dclip_qdrant.training.figures import RunFigures, SweepPoint
from dclip_qdrant.training.run import Run

logger = logging.getLogger(__name__)

TEXTS_TIMED = 60


@dataclass(frozen=True)
class CompareRequest:
    """What was asked for beside the suite; paths as in `experiment.Request`."""

    pairs: str
    base: str
    out: str
    labelled: str | None = None
    settings: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None
    parallel: int | None = None
    min_retention: float = 1.0


@dataclass(frozen=True)
class StudentSize:
    """Parameters and latency of a group's students, which all have one architecture."""

    image: int
    text: int
    ms_per_image: float
    ms_per_text: float


@dataclass(frozen=True)
class GroupResult:
    title: str
    about: str
    main: str
    split: str
    rows: list[Row]
    differences: list[Difference]
    failures: dict[str, str]
    sweeps: dict[str, list[SweepPoint]]  # by recipe, means over seeds
    size: StudentSize

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"rows": [row.as_dict() for row in self.rows]}


@dataclass(frozen=True)
class SuiteResult:
    suite: str
    about: str
    seeds: list[int]
    groups: list[GroupResult]

    @property
    def failures(self) -> list[str]:
        return [label for group in self.groups for label in group.failures]

    def as_dict(self) -> dict[str, Any]:
        """What compare.json holds."""
        return {
            "suite": self.suite,
            "about": self.about,
            "seeds": self.seeds,
            "groups": [group.as_dict() for group in self.groups],
        }


def compare(suite: Suite, request: CompareRequest) -> SuiteResult:
    """Runs what is missing; the result, as it is in `compare.json` under `out`."""
    cluster.connect()
    # all mistakes before the first minute of work
    experiments = [Experiment.open(_request(group, suite, request)) for group in suite.groups]
    groups = []
    for group, experiment in zip(suite.groups, experiments, strict=True):
        groups.append(_run_group(group, experiment, request.parallel))
    seeds = list(experiments[0].request.seeds)
    result = SuiteResult(suite.name, suite.about, seeds, groups)
    storage.write_json(storage.as_path(request.out) / "compare.json", result.as_dict())
    return result


def compare_leaked(suite: Suite, request: CompareRequest, share: float) -> SuiteResult:
    """The same question of pairs in which `share` of the test pictures stand in train too, as in DCLIP's own
    data (docs/papers.md 1.2)."""
    out = storage.as_path(request.out)
    folder = out / f"leaked-{share:g}"
    leak(request.pairs, str(folder), share=share)
    return compare(suite, replace(request, pairs=str(folder), out=str(out / "leaked")))


def _request(group: Group, suite: Suite, request: CompareRequest) -> Request:
    return Request(
        pairs=request.pairs,
        base=request.base,
        out=request.out,
        recipe=Recipe.load(group.main, [*group.set, *request.settings]),
        compare=tuple(Recipe.load(name) for name in group.recipes),
        seeds=request.seeds or suite.seeds,
        labelled=request.labelled,
        min_retention=request.min_retention,
    )


def _run_group(group: Group, experiment: Experiment, parallel: int | None) -> GroupResult:
    def failed_before_training(recipe: Recipe, error: Exception) -> str:
        """A rival's teacher that can't be trained is that rival's failure."""
        reason = why(error)
        logger.warning("%s: failed before training, %s", recipe.name, reason)
        return reason

    size = _student_size(experiment)  # first: what can't be exported is said before any training
    outcome = conduct(
        experiment, lambda runs: run_side_by_side(runs, parallel=parallel), tolerate=failed_before_training
    )
    if not outcome.base.stage.done:
        came = f"the base could not be measured: {outcome.failures.get(outcome.base.label)}"
        raise RecipeError(group.title, came)
    done = {name: [r for r in runs if r.stage.done] for name, runs in outcome.runs.items()}
    done = {name: runs for name, runs in done.items() if runs}
    main_first = [experiment.recipes[-1], *experiment.recipes[:-1]]
    recipes = [recipe for recipe in main_first if recipe.name in done]
    rows = [comparison.base_row(outcome.base)]
    for recipe in recipes:
        rows += _rows_with_costs(recipe, done[recipe.name])
    sweeps = {r.name: _mean_sweep(done[r.name]) for r in recipes if len(r.keep.wise_ft) > 1}
    return GroupResult(
        title=group.title,
        about=group.about,
        main=group.main,
        split=experiment.split,
        rows=rows,
        differences=_differences(group.rival, recipes, done, outcome),
        failures=outcome.failures,
        sweeps=sweeps,
        size=size,
    )


def why(error: BaseException) -> str:
    """An error as one line."""
    own = cluster.own_error(error)
    if own is not None:
        return str(own)
    first_line = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {first_line}"[:300]


def _rows_with_costs(recipe: Recipe, runs: list[Run]) -> list[Row]:
    seconds = sum(RunFigures.of_stage(run.stage).seconds for run in runs) / len(runs)
    epochs = recipe.train.epochs
    passes = round(epochs * comparison.passes(recipe), 2)
    rows = comparison.recipe_rows(recipe, runs, both=True)
    return [replace(row, seconds=seconds, epochs=epochs, passes=passes) for row in rows]


def _differences(
    rival: str, recipes: list[Recipe], done: dict[str, list[Run]], outcome: Outcome
) -> list[Difference]:
    """Each recipe (after WiSE-FT, where it has that) minus the base, the rival as trained, and the rival
    after WiSE-FT."""
    swept = {recipe.name for recipe in recipes if len(recipe.keep.wise_ft) > 1}
    against = [("base", comparison.scores([outcome.base]))]
    if rival in done:
        against.append((rival, comparison.scores(done[rival], "as_trained")))
        if rival in swept:
            against.append((rival + AFTER_WISE_FT, comparison.scores(done[rival])))
    out = []
    for recipe in recipes:
        own = comparison.scores(done[recipe.name])
        name = recipe.name + (AFTER_WISE_FT if recipe.name in swept else "")
        out += [comparison.difference(name, own, than, other) for than, other in against if than != name]
    return out


def _mean_sweep(runs: list[Run]) -> list[SweepPoint]:
    """What WiSE-FT's alphas trade on validation, means over seeds; with the first seed's choice of a strength
    against hubs and of a share of the plainly fine-tuned student."""
    figures = [RunFigures.of_stage(run.stage) for run in runs]
    first = figures[0]
    sweeps = [
        [p for p in f.sweep if (p.hubness, p.fine_tuned) == (first.hubness, first.fine_tuned)]
        for f in figures
    ]

    def mean(values: list[float | None]) -> float | None:
        there = [v for v in values if v is not None]
        return sum(there) / len(there) if len(there) == len(values) else None

    return [
        SweepPoint(
            alpha=points[0].alpha,
            hubness=first.hubness,
            fine_tuned=first.fine_tuned,
            val=mean([p.val for p in points]),
            val_mean_r1=mean([p.val_mean_r1 for p in points]),
            retention=mean([p.retention for p in points]),
        )
        for points in zip(*sweeps, strict=True)
    ]


def _student_size(experiment: Experiment) -> StudentSize:
    """Measured on the model that the group's students start from, as a student folder."""
    start = experiment.student
    folder = storage.as_path(experiment.request.stages) / f"start-{start.fingerprint[:12]}"
    if not (folder / "manifest.json").is_file():
        export(start, folder, name="start", metrics={}, recipe={"name": "start"})
    student = Student.load(folder)
    lists = experiment.pairs.table(["captions"])["captions"].slice(0, TEXTS_TIMED).to_pylist()
    timed = latency(student, [caption for captions in lists for caption in captions])
    parameters = student.manifest["parameters"]
    return StudentSize(parameters["image"], parameters["text"], timed["ms_per_image"], timed["ms_per_text"])


def run_side_by_side(runs: list[Run], *, parallel: int | None) -> dict[str, str]:
    """Does the runs that are not done, each a task of one of `parallel` Ray actors (default: one a GPU, or
    one for every four CPUs); why each that failed did, by label.

    An actor keeps what its runs share (evaluation sets); one that dies is started anew and takes only its own
    run with it.
    """
    import ray
    from ray.exceptions import RayError

    waiting = not_done(runs)
    if not waiting:
        return {}
    count, size = len(waiting), min(len(waiting), cluster.pool_size(parallel, "parallel"))

    @ray.remote(num_cpus=1, num_gpus=1 if cluster.gpus() else 0, max_restarts=-1, max_task_retries=0)
    class Trainer:
        def __init__(self, threads: int) -> None:
            import torch

            from dclip_qdrant.training.distributed import Comm
            from dclip_qdrant.training.worker import Worker

            cluster.log_to_stdout()
            torch.set_num_threads(threads)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self.worker = Worker(
                Comm(),
                device,
                logging.getLogger(__name__).info,
                alone,
            )

        def do(self, run: dict[str, Any]) -> str | None:
            try:
                self.worker.do(Run(**run))
            except Exception as e:
                return why(e)
            return None

    trainers = [Trainer.remote(cluster.threads_for(size)) for _ in range(size)]
    idle, failed = list(trainers), {}
    flying: dict[Any, tuple[Any, Run]] = {}
    while waiting or flying:
        while waiting and idle:
            trainer, run = idle.pop(), waiting.pop(0)
            flying[trainer.do.remote(run.as_dict())] = (trainer, run)
        (ready, *_), _ = ray.wait(list(flying))
        trainer, run = flying.pop(ready)
        idle.append(trainer)
        try:
            reason = ray.get(ready)
        except RayError as e:
            reason = why(e)
        if reason is not None:
            failed[run.label] = reason
            logger.warning("%s: failed, %s", run.label, reason)
        else:
            logger.info("%s: done (%d of %d)", run.label, count - len(waiting) - len(flying), count)
    for trainer in trainers:
        ray.kill(trainer)  # pyright: ignore[reportArgumentType]  (Ray types actors as their class)
    return failed
