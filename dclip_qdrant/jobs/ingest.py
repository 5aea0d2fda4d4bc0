"""Ingestion on a cluster: the same loop as `serving/ingest.py`, cut at its two joints. A pool of actors
reads, judges and embeds; a Datasink writes."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data.block import BlockAccessor
from ray.data.datasource import Datasink

from dclip_qdrant import errors
from dclip_qdrant.detectors import build
from dclip_qdrant.jobs.cluster import gpus, log_to_stdout, pool_size, quiet_data_context, threads_for
from dclip_qdrant.pairs.readers import Account, Layout, SourcePicture, open_source
from dclip_qdrant.pairs.readers.layout import ARCHIVES
from dclip_qdrant.pairs.region_files import load_regions
from dclip_qdrant.serving.collection import CollectionSpec
from dclip_qdrant.serving.embedder import Embedder
from dclip_qdrant.serving.ingest import (
    LocalKeys,
    PictureJudge,
    judge_and_prepare,
    prepare_collection,
    write_points,
)
from dclip_qdrant.serving.items import Item, Payload, RejectsFile, Report, point_id
from dclip_qdrant.serving.prune import local_root, note_gone
from dclip_qdrant.serving.stores import Point, open_store
from dclip_qdrant.serving.student import TOP_K, Student
from dclip_qdrant.tables import storage
from dclip_qdrant.tables.contracts import EMBEDDINGS

BATCH = 64


@dataclass(frozen=True)
class IngestRequest:
    """What goes where. `store` holds `open_store`'s arguments; paths are absolute or URIs."""

    source: str
    student: str
    store: dict[str, Any]
    detector: tuple[str, dict[str, Any]] | None = None
    regions: str | None = None
    top_k: int = TOP_K
    images_root: str | None = None
    prefix: str = ""
    replace: bool = False
    rejects: str | None = None
    actors: int | None = None
    spec: CollectionSpec | None = None
    splits: tuple[str, ...] = field(default=())
    captions: int | None = None
    read_as: str | None = None
    prune: bool = False
    verify: bool = False
    max_pixels: int | None = None


class SharedKeys:
    """The keys of all actors, kept by one of their own. A task that is tried again claims from the same
    places."""

    def __init__(self, keeper: Any) -> None:
        self.keeper = keeper

    def claim(self, keys: Sequence[str], places: Sequence[str]) -> list[bool]:
        return ray.get(self.keeper.claim.remote(keys, places))


class Snapshot:
    """What an embedded collection held when the job began; its folder can be open in one process only."""

    def __init__(self, payload_of: dict[str, Payload]) -> None:
        self.payload_of = payload_of

    def payloads(self, ids: list[str], keys: list[str] | None) -> dict[str, Payload]:
        return {i: self.payload_of[i] for i in ids if i in self.payload_of}

    def upsert(self, points: list[Point]) -> None:
        raise NotImplementedError("the sink writes")

    def set_payloads(self, payloads: dict[str, Payload]) -> None:
        raise NotImplementedError("the sink writes")

    def finish(self) -> None: ...


class Embed:
    """Actor: pictures in, rows of the embeddings contract out; what is there already is not decoded."""

    def __init__(self, request: IngestRequest, keeper: Any, snapshot: Any, threads: int) -> None:
        log_to_stdout()
        self.embedder = Embedder(
            Student.load(request.student, threads=threads),
            detector=build(*request.detector) if request.detector else None,
            regions=load_regions(request.regions) if request.regions else None,
            top_k=request.top_k,
            threads=max(2, threads),
            max_pixels=request.max_pixels,
            verify=request.verify,
        )
        self.prefix, self.captions = request.prefix, request.captions
        self.judge = PictureJudge(self.embedder, replace=request.replace, keys=SharedKeys(keeper))
        self.stored = open_store(**request.store) if snapshot is None else Snapshot(ray.get(snapshot))

    def __call__(self, table: pa.Table) -> pa.Table:
        items = [Item.of(_picture(row), self.prefix, self.captions) for row in table.to_pylist()]
        points = iter(self.embedder.forward(judge_and_prepare(items, self.judge, self.embedder, self.stored)))
        # embedding keeps the order of the items that got a point
        return EMBEDDINGS.table([_row(item, next(points) if item.pending else None) for item in items])


class CollectionSink(Datasink):
    """Writes rows of the embeddings contract. Ids follow from keys and writes are upserts, so a task that is
    tried again changes nothing."""

    def __init__(self, store: dict[str, Any]) -> None:
        self.store = store
        self.returns: list[tuple[Report, list[dict[str, str]]]] = []

    def write(self, blocks: Iterable[Any], ctx: Any) -> tuple[Report, list[dict[str, str]]]:
        report, rejected = Report(), []
        store = open_store(**self.store)
        try:
            for block in blocks:
                table = BlockAccessor.for_block(block).to_arrow()
                if table.num_rows == 0:  # an empty block may have no columns at all
                    continue
                EMBEDDINGS.check(table.schema, "the embeddings on their way to the collection")
                rows = table.to_pylist()
                points = [_point(row) for row in rows if row["status"] == "embedded"]
                refused = write_points(store, points)
                renewed = {
                    point_id(row["key"]): json.loads(row["payload"])
                    for row in rows
                    if row["status"] == "updated"
                }
                if renewed:
                    store.set_payloads(renewed)
                report.updated += len(renewed)
                report.seen += len(rows)
                report.unchanged += sum(row["status"] == "unchanged" for row in rows)
                report.embedded += len(points) - len(refused)
                rejected += refused
                rejected += [
                    {"key": row["key"], "path": row["uri"], "reason": row["reason"]}
                    for row in rows
                    if row["status"] == "rejected"
                ]
        finally:
            store.close()
        return report, rejected

    def on_write_complete(self, result: Any) -> None:
        self.returns = [r for r in result.write_returns if r]


def ingest(request: IngestRequest) -> Report:
    """Creates the collection where there is none and fills it. An embedded collection is written by one task
    (one process may open it).

    Raises:
        MismatchError: another student filled the collection. UsageError: nothing to read. StoreError.
    """
    layout = open_source(
        request.source, images_root=request.images_root, captions=False, read_as=request.read_as
    )
    root = local_root(layout.top, request.images_root, must=request.prune)
    snapshot = None
    store = open_store(**request.store)
    try:
        prepare_collection(store, Student.load(request.student), request.spec or CollectionSpec.load())
        if request.store.get("edge"):
            held = {p.id: p.payload for p in store.scroll()}
            snapshot = ray.put(held)
    finally:
        store.close()
    quiet_data_context()
    size = pool_size(request.actors)
    keeper = ray.remote(num_cpus=0)(LocalKeys).remote()
    account = Account(layout)
    dataset = _dataset(layout, account)
    if request.splits:
        dataset = dataset.filter(lambda row: row["error"] or row["split"] in request.splits)
    dataset = dataset.map_batches(
        Embed,
        fn_constructor_args=(request, keeper, snapshot, threads_for(size)),
        batch_format="pyarrow",
        batch_size=BATCH,
        num_cpus=1,
        num_gpus=1 if gpus() else None,
        compute=ray.data.ActorPoolStrategy(size=size),
    )
    sink = CollectionSink(request.store)
    dataset.write_datasink(sink, concurrency=1 if request.store.get("edge") else None)
    ray.kill(keeper)  # pyright: ignore[reportArgumentType]  (Ray types actors as their class)
    total = Report()
    with RejectsFile(request.rejects) as rejects:
        for report, rejected in sink.returns:
            total.seen += report.seen
            total.embedded += report.embedded
            total.updated += report.updated
            total.unchanged += report.unchanged
            total.add_rejects(rejected)
            rejects.write(rejected)
    total.note_left_out(layout.kind, account.left_out())
    store = open_store(**request.store)
    try:
        if total.embedded:
            store.finish()
        if root is not None:
            note_gone(total, store, root, delete=request.prune)
    finally:
        store.close()
    return total


def _dataset(layout: Layout, account: Account) -> Any:
    """The source's pictures as rows; archives are read where they are embedded."""
    if layout.kind not in ARCHIVES:
        return ray.data.from_items([_source_row(picture) for picture in account.pictures()])

    def read(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from (_source_row(picture) for picture in layout.pictures_of(storage.as_path(row["file"])))

    return ray.data.from_items([{"file": str(file)} for file in layout.files]).flat_map(read)


def _source_row(picture: SourcePicture) -> dict[str, Any]:
    error = picture.error
    return {
        "key": picture.key,
        "uri": picture.uri,
        "captions": list(picture.captions),
        "image": picture.image,
        "split": picture.split or "",
        "extra": json.dumps(picture.extra),
        "place": picture.place,
        "error": error.as_json() if error else "",
    }


def _picture(row: dict[str, Any]) -> SourcePicture:
    return SourcePicture(
        row["key"],
        row["uri"],
        list(row["captions"]),
        image=row["image"],
        split=row["split"] or None,
        extra=json.loads(row["extra"]),
        place=row["place"],
        error=errors.of_json(row["error"]) if row["error"] else None,
    )


def _row(item: Item, point: Point | None) -> dict[str, Any]:
    """An item's row of the embeddings contract."""
    status = "embedded"
    payload = point.payload if point else item.renewed or {}
    if item.error is not None:
        status = "rejected"
    elif not item.pending:
        status = "unchanged" if item.unchanged else "updated"
    return {
        "key": item.key,
        "uri": item.picture.uri,
        "image": point.image if point else [],
        "regions": list(point.regions) if point and point.regions is not None else [],
        "payload": json.dumps(payload),
        "status": status,
        "reason": str(item.error) if item.error is not None else None,
    }


def _point(row: dict[str, Any]) -> Point:
    image, regions = np.asarray(row["image"], np.float32), np.asarray(row["regions"], np.float32)
    return Point(point_id(row["key"]), image, regions, json.loads(row["payload"]))
