"""Ingestion as a Ray Data pipeline: a pool of embedders and our own Datasink. What happens to a picture is `ingest.Embedder`'s, the same as in the CLI."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data.block import BlockAccessor
from ray.data.datasource import Datasink

from dclip_qdrant.cluster import gpus, pool_size, threads_for
from dclip_qdrant.collection import CollectionSpec
from dclip_qdrant.contracts import EMBEDDINGS
from dclip_qdrant.ingest import CHECKED, Embedder, Rejects, Report, point_id, prepare_collection, write
from dclip_qdrant.pairs.readers import Found, read_any
from dclip_qdrant.stores import Point, open_store
from dclip_qdrant.student import Student

FILES = ("parquet", "tar")  # kinds that hold their pictures: read on the workers, file by file


def _row(f: Found) -> dict[str, Any]:
    return {
        "key": f.key,
        "uri": f.uri,
        "captions": list(f.captions),
        "image": f.image,
        "split": f.split or "",
        "extra": json.dumps(f.extra),
    }


def _found(row: dict[str, Any]) -> Found:
    return Found(
        row["key"], row["uri"], list(row["captions"]), image=row["image"], split=row["split"] or None, extra=json.loads(row["extra"])
    )


class Embed:
    """Actor: pictures in, rows of the embeddings contract out; what is there already is not decoded."""

    def __init__(
        self,
        student: str,
        detector: tuple[str, dict[str, Any]] | None,
        regions: dict | None,
        top_k: int,
        store: dict[str, Any],
        known: Any,
        prefix: str,
        replace: bool,
        threads: int,
    ) -> None:
        from dclip_qdrant.detectors import build

        self.embedder = Embedder(
            Student.load(student, threads=threads),
            detector=build(*detector) if detector else None,
            regions=regions,
            top_k=top_k,
            threads=max(2, threads),
        )
        self.prefix, self.replace = prefix, replace
        self.known = ray.get(known) if known is not None else None
        self.store = open_store(**store) if known is None else None

    def __call__(self, table: pa.Table) -> pa.Table:
        items = list(self.embedder.pool.map(lambda row: self.embedder.read(_found(row), self.prefix), table.to_pylist()))
        ids = [i.id for i in items if i.error is None]
        stored = self.store.payloads(ids, CHECKED) if self.store else {i: self.known[i] for i in ids if i in self.known}
        there = {id(i) for i in items if self.embedder.is_there(i, stored.get(i.id), replace=self.replace)}
        points = {p.payload["key"]: p for p in self.embedder.embed([i for i in items if id(i) not in there and i.error is None])}
        rows = []
        for i in items:
            point = points.get(i.key) if i.error is None and id(i) not in there else None
            status = "rejected" if i.error is not None else "unchanged" if id(i) in there else "embedded"
            rows.append({"key": i.key, "uri": i.found.uri, "image": point.image if point else [], "regions": list(point.regions) if point else [],
                         "payload": json.dumps(point.payload) if point else "{}", "status": status, "reason": str(i.error) if i.error else None})  # fmt: skip
        return EMBEDDINGS.table(rows)


class CollectionSink(Datasink):
    """Writes rows of the embeddings contract. Ids follow from keys and writes are upserts, so a task that is tried again changes nothing."""

    def __init__(self, store: dict[str, Any]) -> None:
        self.store = store
        self.returns: list[dict[str, Any]] = []

    def write(self, blocks: Iterable[Any], ctx: Any) -> dict[str, Any]:
        report, rejected = Report(), []
        store = open_store(**self.store)
        try:
            for block in blocks:
                table = BlockAccessor.for_block(block).to_arrow()
                if table.num_rows == 0:  # an empty block may have no columns at all
                    continue
                EMBEDDINGS.check(table.schema, "the embeddings on their way to the collection")
                rows = table.to_pylist()
                report.seen += len(rows)
                report.unchanged += sum(r["status"] == "unchanged" for r in rows)
                rejected += [{"key": r["key"], "path": r["uri"], "reason": r["reason"]} for r in rows if r["status"] == "rejected"]
                points = [
                    Point(point_id(r["key"]), np.asarray(r["image"], np.float32), np.asarray(r["regions"], np.float32), json.loads(r["payload"]))
                    for r in rows
                    if r["status"] == "embedded"
                ]  # fmt: skip
                bin_ = _List()
                report.embedded += len(points) - write(store, points, bin_, Report())
                rejected += bin_.rows
        finally:
            store.close()
        return {"seen": report.seen, "embedded": report.embedded, "unchanged": report.unchanged, "rejected": rejected}

    def on_write_complete(self, result: Any) -> None:
        self.returns = [r for r in result.write_returns if r]


class _List(Rejects):
    """Rejects kept as rows, to travel back to the driver."""

    def __init__(self) -> None:
        super().__init__(None)
        self.rows: list[dict[str, str]] = []

    def add_row(self, row: dict[str, str], report: Report) -> None:
        self.rows.append(row)


def ingest(
    source: str,
    student: str,
    store: dict[str, Any],
    *,
    detector: tuple[str, dict[str, Any]] | None = None,
    regions: dict | None = None,
    top_k: int = 4,
    spec: CollectionSpec | None = None,
    images_root: str | None = None,
    prefix: str = "",
    replace: bool = False,
    rejects: str | None = None,
    actors: int | None = None,
    say: Callable[[str], None] = print,
) -> Report:
    """The cluster's `ingest.ingest`; `store` holds open_store's arguments. An embedded collection is written by one task (one process may open it)."""
    kind, found = read_any(source, images=images_root, captions=False)
    opened = open_store(**store)
    prepare_collection(opened, Student.load(student), spec or CollectionSpec.load())
    known = None
    if store.get("edge"):
        known = ray.put({p.id: {k: p.payload.get(k) for k in CHECKED} for p in opened.scroll()})
    opened.close()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    if kind in FILES:
        from upath import UPath

        path = UPath(source)
        files = sorted(str(f) for f in path.glob(f"*.{kind}")) if path.is_dir() else [str(path)]

        def read(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
            yield from (_row(f) for f in read_any(row["file"], captions=False)[1])

        ds = ray.data.from_items([{"file": f} for f in files]).flat_map(read)
    else:
        ds = ray.data.from_items([_row(f) for f in found])
    size = pool_size(actors)
    kwargs = {
        "student": student,
        "detector": detector,
        "regions": regions,
        "top_k": top_k,
        "store": store,
        "known": known,
        "prefix": prefix,
        "replace": replace,
        "threads": threads_for(size),
    }
    ds = ds.map_batches(
        Embed,
        fn_constructor_kwargs=kwargs,
        batch_format="pyarrow",
        batch_size=64,
        num_cpus=1,
        num_gpus=1 if gpus() else None,
        compute=ray.data.ActorPoolStrategy(size=size),
    )
    sink = CollectionSink(store)
    ds.write_datasink(sink, concurrency=1 if store.get("edge") else None)
    report = Report(
        sum(r["seen"] for r in sink.returns), sum(r["embedded"] for r in sink.returns), sum(r["unchanged"] for r in sink.returns)
    )
    with Rejects(rejects) as bin_:
        for r in sink.returns:
            for row in r["rejected"]:
                bin_.add_row(row, report)
    if report.embedded:
        opened = open_store(**store)
        opened.finish()
        opened.close()
    say(report.line())
    return report
