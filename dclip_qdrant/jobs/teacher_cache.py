"""The teacher-cache stage: the trained teacher's vector of every view (and caption) of train, from cached
features."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch
from upath import UPath

from dclip_qdrant import metrics
from dclip_qdrant.errors import InputError
from dclip_qdrant.jobs.cluster import (
    Guarded,
    actor_threads,
    finished,
    gpus,
    pool_size,
    quiet_data_context,
    threads_for,
)
from dclip_qdrant.tables import contracts, storage
from dclip_qdrant.tables.stages import Stage, part_files, parts
from dclip_qdrant.training.models import two_tower
from dclip_qdrant.training.teacher_task import Spans, fuse
from dclip_qdrant.training.worker import load_teacher

logger = logging.getLogger(__name__)

COLUMNS = ["key", "view", "crop", "flip", "split", "captions", "image", "trunk", "regions"]
FUSED_TOGETHER = 256
PIECE = 256  # rows that are lists of Python numbers at a time
Row = dict[str, Any]


class TeachFiles:
    """Actor: parts of the features stage in, parts of the teacher cache written."""

    def __init__(self, base: str, teacher: str, out: str, threads: int) -> None:
        actor_threads(threads)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.teacher = load_teacher(UPath(teacher)).to(self.device)
        self.spans = Spans(two_tower.load(base).to(self.device), self.teacher.cfg.spans, self.device)
        self.out = UPath(out)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"done": np.array([self.write(UPath(str(name))) for name in batch["file"]])}

    def write(self, file: UPath) -> int:
        """One part of the features -> a part of the same name, row group for row group, so that both can be
        read side by side; how many views."""
        done = 0
        with storage.open_for_arrow(file) as f, storage.writing(self.out / file.name) as sink:
            features = pq.ParquetFile(f)
            writer = pq.ParquetWriter(sink, contracts.TEACHER_CACHE.schema, compression="zstd")
            for group in range(features.metadata.num_row_groups):
                table = features.read_row_group(group, columns=COLUMNS).filter(pc.field("split") == "train")
                taught: list[Row] = []
                for start, stop in pieces(table["view"].to_numpy()):
                    taught += self._teach(table.slice(start, stop - start).to_pylist())
                own = contracts.TEACHER_CACHE.table(taught)
                writer.write_table(own, row_group_size=max(1, own.num_rows))
                done += own.num_rows
            writer.close()
        return done

    def _teach(self, rows: list[Row]) -> list[Row]:
        plain_of = {row["key"]: row for row in rows if row["view"] == 0}
        lost = next((row["key"] for row in rows if row["key"] not in plain_of), None)
        if lost:
            came = "a view without its plain picture in the same part"
            raise InputError(lost, came, do="run it again with `from_scratch`")
        plain = [plain_of[row["key"]] for row in rows]
        inside = [self._inside(p["captions"]) for p in plain]
        jobs = []
        for row, own_plain, captions in zip(rows, plain, inside, strict=True):
            jobs += [(row, own_plain, caption) for caption in captions]
        vectors = self._fuse(jobs)
        out, start = [], 0
        for row, own_plain, captions in zip(rows, plain, inside, strict=True):
            own = vectors[start : start + len(captions)]
            start += len(captions)
            target = self._targets(own, len(own_plain["captions"]))
            view = {name: row[name] for name in ("key", "view", "crop", "flip", "trunk")}
            out.append(view | {"teacher_image": list(target)})
        return out

    def _inside(self, captions: list[str]) -> list[str]:
        """The captions that are fused, one after another: none of them by regions_only, nor where a picture
        has no other."""
        cfg = self.teacher.cfg
        fuses_some = cfg.fusion == "bidirectional" and (cfg.caption == "same" or len(captions) > 1)
        return captions if fuses_some else [""]

    def _targets(self, vectors: np.ndarray, captions: int) -> np.ndarray:
        """Vectors [I, D] with caption i inside -> the target for each caption [C, D], or [1, D] where
        captions don't matter."""
        cfg = self.teacher.cfg
        if cfg.fusion == "regions_only" or cfg.caption == "same":
            return vectors
        if len(vectors) == 1:
            return np.repeat(vectors, captions, 0)
        # the target of caption c never holds caption c
        others = (vectors.sum(0, keepdims=True) - vectors) / (len(vectors) - 1)
        return metrics.normalise(others)

    def _fuse(self, jobs: list[tuple[Row, Row, str]]) -> np.ndarray:
        """(view, its plain row, caption inside) -> unit vectors [J, D]."""
        width, out = len(jobs[0][0]["image"]), []
        for start in range(0, len(jobs), FUSED_TOGETHER):
            batch = jobs[start : start + FUSED_TOGETHER]
            most = max(1, *(len(plain["regions"]) for _, plain, _ in batch))
            regions = np.zeros((len(batch), most, width), np.float32)
            mask = np.zeros((len(batch), most), bool)
            for j, (_, plain, _) in enumerate(batch):
                count = len(plain["regions"])
                if count:
                    regions[j, :count], mask[j, :count] = plain["regions"], True
            image = np.array([view["image"] for view, _, _ in batch], np.float32)
            on_device = [torch.from_numpy(x).to(self.device) for x in (image, regions, mask)]
            vectors, boxes, there = on_device
            captions = [caption for _, _, caption in batch]
            with torch.no_grad():
                out.append(fuse(self.teacher, self.spans, vectors, boxes, there, captions).cpu().numpy())
        return np.concatenate(out)


def pieces(views: np.ndarray, size: int = PIECE) -> Iterator[tuple[int, int]]:
    """Where a part whose rows have these views [N] can be cut: pieces of at least `size` rows, never between
    the views of a picture, whose plain one (view 0) stands first."""
    start = 0
    for begin in np.flatnonzero(views == 0):
        if begin - start >= size:
            yield start, int(begin)
            start = int(begin)
    if start < len(views):
        yield start, len(views)


def cache_teacher(stage: Stage, features: Stage, *, base: str, teacher: UPath, actors: int | None) -> None:
    """The teacher-cache stage; resumes part by part."""
    if stage.done:
        logger.info("teacher cache: reused %s", stage.path.name)
        return
    stage.path.mkdir(parents=True, exist_ok=True)
    waiting = [file for file in part_files(features.path) if not (stage.path / file.name).exists()]
    if waiting:
        size = pool_size(actors)
        quiet_data_context()
        arguments = {
            "base": base,
            "teacher": str(teacher),
            "out": str(stage.path),
            "threads": threads_for(size),
        }
        dataset = ray.data.from_items([{"file": str(file)} for file in waiting])
        dataset = dataset.map_batches(
            Guarded,
            fn_constructor_args=(TeachFiles, arguments),
            batch_size=1,
            num_cpus=1,
            num_gpus=1 if gpus() else None,
            compute=ray.data.ActorPoolStrategy(size=size),
        )
        for _ in finished(dataset):
            pass
    wanted = sum(
        table["split"].to_pylist().count("train")
        for table in parts(features.path, contracts.FEATURES, ["split"])
    )
    rows = sum(table.num_rows for table in parts(stage.path, contracts.TEACHER_CACHE, ["key"]))
    if rows != wanted:
        came = f"{rows:,} of {wanted:,} views came out of this stage"
        raise InputError("teacher cache", came, "all of them", "run it again with `from_scratch`")
    stage.finish(rows=rows)
    logger.info("teacher cache: %s views", f"{rows:,}")
