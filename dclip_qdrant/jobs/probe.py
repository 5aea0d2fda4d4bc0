"""What a stage costs on a sample of the pairs: the stage's own code on a few batches, in a process of its
own, so that the most memory it ever held is the stage's."""

import itertools
import resource
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from upath import UPath

from dclip_qdrant.jobs.cluster import READ_COLUMNS
from dclip_qdrant.jobs.export import export
from dclip_qdrant.jobs.extract_regions import BATCH as DETECT_BATCH
from dclip_qdrant.jobs.extract_regions import Detect
from dclip_qdrant.jobs.features import BATCH as FEATURE_BATCH
from dclip_qdrant.jobs.features import Featurise
from dclip_qdrant.jobs.teacher_cache import TeachFiles
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.pairs.writer import PairsWriter
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.tables.contracts import PAIRS
from dclip_qdrant.tables.stages import part_files
from dclip_qdrant.tables.storage import write_json
from dclip_qdrant.training.data import Pictures, load_cache
from dclip_qdrant.training.distributed import Comm
from dclip_qdrant.training.evaluate import EvalSet
from dclip_qdrant.training.models import two_tower
from dclip_qdrant.training.run import Run, needs
from dclip_qdrant.training.worker import Worker

EPOCHS = 3  # of a run on the sample: the first one warms up
DECODED = 32  # pictures


@dataclass(frozen=True)
class Cost:
    """Of one process. `seconds` and `disk` (bytes) a picture."""

    seconds: float
    disk: float
    fixed: float  # seconds that don't hang on the number of pictures
    memory: int  # bytes, the most that the process held


@dataclass(frozen=True)
class RunCost:
    """Of a training run in one process, seconds a picture but for `fixed`."""

    epoch: float  # of one epoch, with the next batch decoded already
    decode: float
    read: float  # of the cached features
    evaluate: float  # one weighting of val or test
    fixed: float
    memory: int
    learning: int  # parameters


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _size(folder: UPath) -> int:
    return sum(file.stat().st_size for file in part_files(folder))


def _mapped(actor: type, arguments: dict[str, Any], sample: str, columns: list[str], batch: int) -> Cost:
    table = Pairs.open(sample).table(columns).combine_chunks()
    began = time.perf_counter()
    worker = actor(**arguments)
    blocks = [pa.table(table.slice(start, batch)) for start in range(0, table.num_rows, batch)]
    worker(blocks[0])  # warms up, and counts as part of the start
    fixed = time.perf_counter() - began
    began, timed = time.perf_counter(), blocks[1:] or blocks
    for block in timed:
        worker(block)
    seconds = (time.perf_counter() - began) / sum(block.num_rows for block in timed)
    return Cost(seconds, _size(worker.out) / table.num_rows, fixed, _memory())


def regions(sample: str, arguments: dict[str, Any]) -> Cost:
    """The regions stage's actor."""
    return _mapped(Detect, arguments, sample, ["key", "uri", "image"], DETECT_BATCH)


def features(sample: str, arguments: dict[str, Any]) -> Cost:
    """The features stage's actor."""
    return _mapped(Featurise, arguments, sample, READ_COLUMNS, FEATURE_BATCH)


def teacher_cache(features_of: str, arguments: dict[str, Any]) -> Cost:
    """The teacher cache's actor; a picture is one of train, with all its views."""
    began = time.perf_counter()
    actor = TeachFiles(**arguments)
    files = part_files(UPath(features_of))
    fixed = time.perf_counter() - began
    began = time.perf_counter()
    views = sum(actor.write(file) for file in files)
    seconds = time.perf_counter() - began
    return Cost(seconds / max(1, views), _size(actor.out) / max(1, views), fixed, _memory())


def run(raw: dict[str, Any], threads: int) -> RunCost:
    """A teacher's or a student's run on the sample."""
    import torch

    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    whole = Run(**raw)
    pairs = Pairs.open(whole.pairs)
    keys = pairs.table(["key", "captions"], ("train",))
    counts = [len(captions) for captions in keys["captions"].to_pylist()]
    began = time.perf_counter()
    load_cache(keys["key"].to_pylist(), counts, UPath(whole.features), need=needs(whole))
    read = (time.perf_counter() - began) / len(counts)

    worker = Worker(Comm(), device, lambda line: None)
    began = time.perf_counter()
    worker.do(whole)
    seconds = time.perf_counter() - began
    manifest = whole.stage.manifest()
    history = (manifest.get("metrics") or manifest)["history"]
    epoch = min(row["seconds"] for row in history[1:]) / len(counts)
    learning = (manifest.get("metrics") or {}).get("trained_parameters") or manifest.get("parameters", 0)
    decode = evaluate = 0.0
    if whole.kind == "student":
        recipe = Recipe(**whole.recipe)
        model = two_tower.load(whole.student).to(device)
        _, text_learns = model.choose_towers(recipe.student)
        if not model.trunk_frozen:
            decode = _decode(pairs, model) / threads
        # the split of the table: there may be no val
        held_out = EvalSet(pairs, whole.split, UPath(whole.features), device)
        began = time.perf_counter()
        held_out.ranks(model, cached_text=not text_learns and whole.student == whole.base)
        evaluate = (time.perf_counter() - began) / len(held_out.captions)
        points = recipe.sweep_points
        seconds -= points * pairs.splits().get("val", 0) * evaluate
    fixed = seconds - sum(row["seconds"] for row in history) - read * len(counts)
    return RunCost(epoch, decode, read, evaluate, max(0.0, fixed), _memory(), learning)


def export_seconds(model: str) -> float:
    """Of a student folder with its checks; the starting model and the student are one each."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        export(two_tower.load(model), UPath(folder) / "student", name="probe", metrics={}, recipe={})
        return time.perf_counter() - began


def _decode(pairs: Pairs, model: two_tower.TwoTower) -> float:
    """Seconds that one thread takes for a picture."""
    pictures = Pictures(pairs, "train", np.arange(min(DECODED, pairs.splits()["train"])))
    began = time.perf_counter()
    for i in range(len(pictures)):
        model.preprocess.pixels(pictures.load(i))
    return (time.perf_counter() - began) / len(pictures)


def write_sample(pairs: Pairs, folder: UPath, train: int, held_out: int) -> str:
    """The first pictures of each split as pairs of their own; the folder."""
    folder.mkdir(parents=True)
    captions = 0
    with PairsWriter(folder) as writer:
        for split, most in (("train", train), ("val", held_out), ("test", held_out)):
            batches = pairs.rows(list(PAIRS.columns), (split,))
            for row in itertools.islice(itertools.chain.from_iterable(batches), most):
                writer.add(row)
                captions += len(row["captions"])
    write_json(folder / "manifest.json", {"fingerprint": "sample", "captions": captions})
    return str(folder)
