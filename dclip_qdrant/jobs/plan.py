"""What a distillation will take, before it starts: memory, disk, network and hours, from the stages' own code
on a few batches. A plan that can't fit is refused."""

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from upath import UPath

from dclip_qdrant.errors import GateError, UsageError
from dclip_qdrant.jobs import cluster, probe
from dclip_qdrant.jobs.experiment import Experiment, wants_regions
from dclip_qdrant.jobs.extract_regions import regions_stage
from dclip_qdrant.jobs.named_runs import Prepared, student_run, teacher_run
from dclip_qdrant.jobs.preparation import feature_request, prepare_beside, teacher_cache_stage
from dclip_qdrant.jobs.request import Request
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.progress import duration
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.tables import storage
from dclip_qdrant.tables.stages import Stage
from dclip_qdrant.training.streaming import WINDOW_ROWS
from dclip_qdrant.training.student_batch import DECODED_BYTES

logger = logging.getLogger(__name__)

SAMPLE, HELD_OUT = 256, 64  # pictures that are measured on, at least and at most
OBJECTS = 1 << 30  # bytes of a private cluster's object store
DRIVER = 2 << 30  # bytes of the job itself, Ray and its controllers
# seconds, seen on two slow cores: a pool of actors, a group of Ray Train workers
START_POOL, START_WORKERS = 8.0, 10.0


@dataclass(frozen=True)
class Step:
    """One stage: what it takes, all of its processes together."""

    name: str
    seconds: float
    memory: float = 0.0  # bytes on a node
    disk: float = 0.0  # bytes that stay


@dataclass(frozen=True)
class Plan:
    """Bytes and seconds; `train` and `total` are pictures."""

    train: int
    total: int
    workers: int
    reader: str
    steps: list[Step]
    memory: float  # of the smallest node
    free: float | None  # on the disk of `out`; None where that can't be told
    read: float  # bytes of pictures that are read
    network: float  # bytes that a worker receives in a step of the main recipe
    worker: float  # bytes of memory of a training worker

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)

    @property
    def needs_memory(self) -> float:
        """Bytes on a node while the stage that takes most is at work."""
        return max(step.memory for step in self.steps) + OBJECTS + DRIVER

    @property
    def disk(self) -> float:
        return sum(step.disk for step in self.steps)

    def as_dict(self) -> dict[str, Any]:
        sums = {"seconds": self.seconds, "needs_memory": self.needs_memory, "disk": self.disk}
        return asdict(self) | sums

    def text(self) -> str:
        """For people."""
        rows = [f"{self.train:,} of {self.total:,} pictures to train on, {self.workers} workers", ""]
        rows += ["| stage | time | memory of a node | disk |", "|---|---|---|---|"]
        for step in self.steps:
            rows.append(f"| {step.name} | {duration(step.seconds)} | {_gb(step.memory)} | {_gb(step.disk)} |")
        free = "unknown" if self.free is None else _gb(self.free)
        exact = {"memory": "all of train in memory", "stream": "streamed"}[self.reader]
        return "\n".join(
            [
                *rows,
                "",
                f"time: {duration(self.seconds)}, measured on a few batches on this machine",
                f"memory: {_gb(self.needs_memory)} of a node that has {_gb(self.memory)}; a worker "
                f"{_gb(self.worker)}, {exact}",
                f"disk: {_gb(self.disk)}, free {free}; pictures read: {_gb(self.read)}",
                f"network: {self.network / 1e6:.1f} MB into each worker a step",
            ]
        )

    def check(self) -> None:
        """Raises GateError: it can't fit."""
        if self.needs_memory > self.memory:
            came = f"{_gb(self.needs_memory)} of memory"
            do = "fewer workers or actors, a smaller batch, or a stream instead of all in memory"
            raise GateError("plan", came, f"at most {_gb(self.memory)}, what a node has", do)
        if self.free is not None and self.disk > self.free:
            came = f"{_gb(self.disk)} of disk"
            raise GateError("plan", came, f"at most {_gb(self.free)}, what is free", "another `out`")


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"


def plan(request: Request, pictures: int | None = None) -> Plan:
    """Measures and adds up. `pictures`: as if train had so many (default: what the pairs have).

    Raises:
        UsageError: what `Experiment.open` refuses, or stages that no plan has.
    """
    experiment = Experiment.open(request)
    if request.teach is not None:
        came = "a teacher that is fine-tuned first"
        raise UsageError("`teacher_recipe`", came, "a plan of each of the two without it")
    for recipe in experiment.recipes:
        if recipe.ensemble.models or recipe.train.picture_share:
            came = f"{recipe.name!r} has further teachers, or learns from pictures without captions"
            raise UsageError("`recipe`", came, "for a plan, a recipe without them")
    cluster.connect()
    with _scratch(request) as folder:
        return _Planner(experiment, folder, pictures).plan()


@contextmanager
def _scratch(request: Request) -> Iterator[UPath]:
    """A folder among the stages that every process reaches."""
    folder = storage.as_path(request.stages) / "plan"
    storage.remove(folder)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        storage.remove(folder)


class _Planner:
    """Measures each stage on a sample, in the order in which they need each other."""

    def __init__(self, experiment: Experiment, folder: UPath, pictures: int | None) -> None:
        request = experiment.request
        splits = experiment.pairs.splits()
        self.experiment, self.request, self.folder = experiment, request, folder
        self.train = pictures or splits["train"]
        self.held_out = {split: splits.get(split, 0) for split in ("val", "test")}
        self.total = self.train + sum(self.held_out.values())
        self.actors = cluster.pool_size(request.actors)
        self.batch = max(1, request.recipe.train.batch_size // request.workers)
        sample = max(SAMPLE, 2 * self.batch)
        self.sample = probe.write_sample(experiment.pairs, folder / "pairs", sample, HELD_OUT)
        shape = experiment.shape()
        self.shape = replace(shape, pictures=self.train)
        self.sampled = replace(shape, pictures=Pairs.open(self.sample).splits()["train"])
        self.reader = request.reader
        if request.reader == "auto":
            self.reader = "stream" if experiment.must_stream(self.shape) else "memory"
        self.on_sample = replace(
            experiment,
            request=replace(
                request, pairs=self.sample, out=str(folder), reader="memory", workers=1, from_scratch=False
            ),
            pairs=Pairs.open(self.sample),
        )

    def plan(self) -> Plan:
        request, main = self.request, self.request.recipe
        steps: list[Step] = []
        arguments = {"threads": cluster.threads_for(self.actors)}
        boxes = None
        if wants_regions(main):
            settings = main.regions
            boxes = regions_stage(self.on_sample.request.stages, self.on_sample.pairs, main)
            detector = {"detector": settings.detector, "options": settings.options}
            cost = self._probed(boxes, probe.regions, self.sample, arguments | detector)
            steps.append(self._mapped("regions", cost))
        short = _short(main)
        wanted = feature_request(self.on_sample, short, boxes)
        features = wanted.stage
        cost = self._probed(features, probe.features, self.sample, arguments | wanted.arguments())
        steps.append(self._mapped("features", cost))
        prepared = Prepared(features)
        if main.teacher is not None:
            run = teacher_run(self.on_sample, short, features)
            spent = _measured(probe.run, run.as_dict(), self._threads())
            steps.append(self._trained("teacher", spent, main.teacher.epochs, 0))
            cache = teacher_cache_stage(self.on_sample, run)
            taught = {"base": request.base, "teacher": str(run.stage.path)} | arguments
            cost = self._probed(cache, probe.teacher_cache, str(features.path), taught)
            steps.append(self._mapped("teacher cache", cost, main.train.views * self.train))
            prepared = Prepared(features, cache, run.stage)
        learning = 0
        for recipe in self.experiment.recipes:
            is_main = recipe.name == main.name
            own = prepared if is_main else prepare_beside(self.on_sample, _short(recipe), prepared)
            run = student_run(self.on_sample, _short(recipe), request.seeds[0], own)
            spent = _measured(probe.run, run.as_dict(), self._threads())
            points = recipe.sweep_points
            step = self._trained(recipe.name, spent, recipe.train.epochs, points)
            many = len(request.seeds)
            name = f"{recipe.name}, {many} seeds" if many > 1 else recipe.name
            steps.append(replace(step, name=name, seconds=step.seconds * many))
            learning = spent.learning
        steps.append(Step("export", 2 * _measured(probe.export_seconds, self.request.base)))
        steps.append(Step("starts of Ray Train", START_WORKERS * (2 if main.teacher else 1)))
        workers = [s.memory for s in steps if s.name not in ("regions", "features", "teacher cache")]
        return Plan(
            train=self.train,
            total=self.total,
            workers=request.workers,
            reader=self.reader,
            steps=steps,
            memory=cluster.node_memory(),
            free=_free(request.out),
            read=self._picture_bytes() * self.total * (2 if boxes else 1),
            network=self._network(main, learning),
            worker=max(workers) / request.workers,
        )

    def _probed(
        self, stage: Stage, function: Callable[..., probe.Cost], source: str, arguments: dict[str, Any]
    ) -> probe.Cost:
        """Measures a stage's actor; what it wrote is the stage, for those that read it."""
        stage.path.mkdir(parents=True)
        cost = _measured(function, source, arguments | {"out": str(stage.path)})
        stage.finish()
        return cost

    def _threads(self) -> int:
        return cluster.threads_for(self.request.workers)

    def _mapped(self, name: str, cost: probe.Cost, rows: int | None = None) -> Step:
        rows = self.total if rows is None else rows
        seconds = START_POOL + cost.fixed + rows * cost.seconds / self.actors
        return Step(name, seconds, cost.memory * self.actors, rows * cost.disk)

    def _trained(self, name: str, cost: probe.RunCost, epochs: int, points: int) -> Step:
        workers = self.request.workers
        kept = 1.0
        if cost.decode:
            size = self.experiment.student.preprocess.size
            own = self.train / workers * self.request.recipe.train.views * size * size * 3
            kept = min(1.0, DECODED_BYTES / own) if self.reader == "memory" else 0.0
        first = cost.epoch + cost.decode
        later = cost.epoch + (1 - kept) * cost.decode
        training = self.train / workers * (first + (epochs - 1) * later)
        held_out = self.held_out["val"] or self.held_out["test"]
        evaluating = points / workers * held_out * cost.evaluate + 2 * self.held_out["test"] * cost.evaluate
        reading = cost.read * self.train * (1 if self.reader == "memory" else epochs)
        memory = cost.memory * workers
        if self.reader == "memory":
            more = self.shape.in_memory(workers) - self.sampled.in_memory(workers)
        else:
            # a window, the next one, its copy while it is shuffled, and the batches in flight, in float32
            more = workers * 3 * (WINDOW_ROWS + 2 * self.batch) * self.shape.numbers() * 4
        return Step(name, cost.fixed + training + evaluating + reading, memory + max(0.0, more))

    def _picture_bytes(self) -> float:
        """Of a picture, encoded."""
        table = Pairs.open(self.sample).table(["uri", "image"]).slice(0, 32).to_pylist()
        sizes = [
            len(row["image"]) if row["image"] is not None else storage.as_path(row["uri"]).stat().st_size
            for row in table
        ]
        return sum(sizes) / max(1, len(sizes))

    def _network(self, recipe: Recipe, learning: int) -> float:
        """Vectors of the other workers, the student's and what it is held to, and gradients around a ring."""
        workers = self.request.workers
        width = self.experiment.student.dim + self.experiment.base.dim
        vectors = recipe.train.batch_size * (1 + recipe.train.captions) * width * 4
        return (workers - 1) / workers * (vectors + 2 * learning * 4)


def _short(recipe: Recipe) -> Recipe:
    """The recipe with as few epochs as can be timed."""
    teacher = recipe.teacher and recipe.teacher.model_copy(update={"epochs": probe.EPOCHS})
    train = recipe.train.model_copy(update={"epochs": probe.EPOCHS, "phases": ()})
    return recipe.model_copy(update={"train": train, "teacher": teacher})


def _measured(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) in a process of its own."""
    import ray
    from ray.exceptions import RayError

    @ray.remote(num_cpus=1, num_gpus=1 if cluster.gpus() else 0, max_calls=1)
    def task() -> Any:
        cluster.log_to_stdout()
        logging.getLogger("dclip_qdrant").setLevel(logging.WARNING)
        return function(*args)

    try:
        return ray.get(task.remote())
    except RayError as e:
        own = cluster.own_error(e)
        if own is None:
            raise
        raise own from None


def _free(out: str) -> float | None:
    """Bytes on the disk that `out` is on, or will be."""
    if storage.is_uri(out):
        return None
    folder = storage.as_path(out)
    while not folder.exists():
        folder = folder.parent
    return float(shutil.disk_usage(str(folder)).free)
