"""Pictures -> collection: read, skip what is there, decode, find regions, embed, write. Resumable, and nothing is lost without a line that says so.

Point ids are uuid5 of the picture's key, so that ingesting twice updates. What is there already with the same content, text and regions is
skipped without being decoded; a killed run therefore goes on where it was.
"""

import json
import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image
from upath import UPath

from dclip_qdrant import images
from dclip_qdrant.collection import CollectionSpec, check_student, metadata_of
from dclip_qdrant.errors import DclipError, ImageError, InputError, PointError
from dclip_qdrant.pairs.readers import Found, read_any
from dclip_qdrant.regions import Regions
from dclip_qdrant.stores import Point, Store
from dclip_qdrant.student import Student

NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://github.com/dclip-qdrant")
WINDOW = 128  # pictures in flight: bounds memory
CHECKED = ["content_hash", "caption", "detector", "uri", "key"]  # what decides whether a picture is there already


def point_id(key: str) -> str:
    """The point of a picture, the same in every run and on every machine."""
    return str(uuid.uuid5(NAMESPACE, key))


@dataclass
class Report:
    """What an ingestion did."""

    seen: int = 0
    embedded: int = 0
    unchanged: int = 0
    rejected: int = 0
    reasons: list[str] = field(default_factory=list)  # the first few

    def row(self) -> dict[str, int]:
        return {"seen": self.seen, "embedded": self.embedded, "unchanged": self.unchanged, "rejected": self.rejected}

    def line(self) -> str:
        out = f"{self.seen:,} pictures: {self.embedded:,} embedded, {self.unchanged:,} there already"
        return out + (f", {self.rejected:,} rejected" if self.rejected else "")


@dataclass
class Item:
    """One picture on its way: what the source said, its bytes, and what became of it."""

    found: Found
    key: str
    data: bytes = b""
    content_hash: str = ""
    error: DclipError | None = None
    regions: Regions = field(default_factory=Regions)
    pixels: list[Any] = field(default_factory=list)  # the whole picture, then each region
    size: tuple[int, int] = (0, 0)

    @property
    def id(self) -> str:
        return point_id(self.key)

    @property
    def caption(self) -> str:
        return "\n".join(self.found.captions)


class Embedder:
    """Items -> points: what the CLI and the Ray job do to a batch, the same in both."""

    def __init__(
        self,
        student: Student,
        *,
        detector: Any = None,
        regions: dict[str, Regions] | None = None,
        top_k: int = 4,
        context: float = 0.1,
        threads: int | None = None,
        layout: str = "flat",
    ) -> None:
        self.student, self.detector, self.regions, self.top_k, self.context, self.layout = (
            student,
            detector,
            regions,
            top_k,
            context,
            layout,
        )
        self.pool = ThreadPoolExecutor(threads or max(2, os.cpu_count() or 2))
        self.regions_from = (
            f"{detector.fingerprint}/{top_k}/{context}" if detector else f"file/{top_k}/{context}" if regions is not None else None
        )

    def read(self, found: Found, prefix: str) -> Item:
        """The bytes and their hash."""
        item = Item(found, prefix + found.key)
        try:
            item.data = found.image if found.image is not None else images.read(found.uri)
            item.content_hash = images.content_hash(item.data)
        except ImageError as e:
            item.error = e
        return item

    def is_there(self, item: Item, payload: dict[str, Any] | None, *, replace: bool = False) -> bool:
        """Whether the stored point needs nothing. Marks the item when its key belongs to a different picture of another place."""
        if payload is None or item.error is not None:
            return False
        if payload["content_hash"] != item.content_hash and payload["uri"] != item.found.uri and not replace:
            item.error = InputError(item.found.uri, f"the key {item.key!r} is taken by another picture ({payload['uri']})", "one key, one picture",
                                    "--prefix NAME/ keeps sources apart, --replace takes the new one")  # fmt: skip
            return False
        return (payload["content_hash"], payload["caption"] or "", payload["detector"]) == (
            item.content_hash,
            item.caption,
            self.regions_from,
        )

    def embed(self, items: list[Item]) -> list[Point]:
        """Decodes, finds regions, embeds. Items that fail get their `error` and no point."""
        good = self.decode(items)
        if self.detector is not None and good:
            for (item, _), found in zip(good, self.detector([p for _, p in good]), strict=True):
                item.regions = found.top(self.top_k)
        elif self.regions is not None:
            for item, _ in good:
                item.regions = self.regions.get(item.found.key, Regions()).top(self.top_k)
        return [Point(item.id, own[0], own, self.payload(item)) for (item, _), own in zip(good, self.vectors(good), strict=True)]

    def decode(self, items: list[Item]) -> list[tuple[Item, Image.Image]]:
        """The items that are pictures, with them; the others get their `error`."""
        return [(i, p) for i, p in zip(items, self.pool.map(self._decode, items), strict=True) if p is not None]

    def vectors(self, pictures: list[tuple[Item, Image.Image]]) -> list[np.ndarray]:
        """[1 + R, D] a picture: itself, then its `item.regions`."""
        cut = self.pool.map(lambda ip: self.student.region_pixels(ip[1], ip[0].regions, context=self.context), pictures)
        counts: list[int] = []

        def stream() -> Iterator[Any]:
            for pixels in cut:
                counts.append(len(pixels))
                yield from pixels

        found = self.student.embed_pixels(stream())
        return np.split(found, np.cumsum(counts)[:-1]) if counts else []

    def _decode(self, item: Item) -> Any:
        if item.error is not None:
            return None
        try:
            picture = images.open_rgb(item.data, item.found.uri)
        except ImageError as e:
            item.error = e
            return None
        item.size, item.data = picture.size, b""
        return picture

    def payload(self, item: Item) -> dict[str, Any]:
        ours = {
            "key": item.key, "uri": item.found.uri, "content_hash": item.content_hash, "caption": item.caption, "width": item.size[0], "height": item.size[1],
            **item.regions.row(), "detector": self.regions_from, "student": self.student.model_name,
        }  # fmt: skip
        if item.found.split:
            ours["split"] = item.found.split
        if self.layout == "langchain":  # what its QdrantVectorStore reads, beside what our own search reads
            ours |= {
                "page_content": item.caption,
                "metadata": {k: ours[k] for k in ("key", "uri", "labels", "width", "height")} | item.found.extra,
            }
        return {(f"source_{k}" if k in ours else k): v for k, v in item.found.extra.items()} | ours


def prepare_collection(store: Store, student: Student, spec: CollectionSpec) -> None:
    """Creates the collection, or makes sure that this student filled it. Raises MismatchError."""
    if store.exists():
        check_student(store.metadata(), student, store.name)
    else:
        store.create(spec, student.dim, metadata_of(student))


def ingest(source: str, embedder: Embedder, store: Store, *, spec: CollectionSpec | None = None, **how: Any) -> Report:
    """Creates the collection where there is none and fills it; `how` as in `fill`.

    Raises:
        MismatchError: another student filled the collection. UsageError: nothing to read. StoreError: the engine is away.
    """
    prepare_collection(store, embedder.student, spec or CollectionSpec.load())
    return fill(source, embedder, store, **how)


def fill(
    source: str,
    embedder: Embedder,
    store: Any,
    *,
    images_root: str | None = None,
    prefix: str = "",
    splits: tuple[str, ...] = (),
    replace: bool = False,
    rejects: str | None = None,
    limit: int | None = None,
    refuse: Callable[[Item], DclipError | None] = lambda item: None,
    progress: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Writes a folder, CSV, JSONL, tar or Parquet of pictures to a store (its `payloads`, `upsert` and `finish`); rejected ones go to `rejects` with path
    and reason. `refuse` says why a picture has no place there, before it is decoded.

    Raises:
        UsageError: nothing to read. StoreError: the engine is away.
    """
    _, found = read_any(source, images=images_root, captions=False)
    if splits:
        found = (f for f in found if f.split in splits)
    if limit is not None:
        found = islice(found, limit)
    report, seen = Report(), set()
    with Rejects(rejects) as bin_, ThreadPoolExecutor(1) as ahead:

        def window() -> list[Item]:
            return list(embedder.pool.map(lambda f: embedder.read(f, prefix), islice(found, WINDOW)))

        coming = ahead.submit(window)
        while items := coming.result():
            coming = ahead.submit(window)  # the next window is read while this one is embedded
            for item in items:
                if item.error is None and item.key in seen:
                    item.error = InputError(item.found.uri, f"a second picture named {item.key!r} in this source", "unique names")
                seen.add(item.key)
                item.error = item.error or refuse(item)
            stored = store.payloads([i.id for i in items if i.error is None], CHECKED)
            fresh = []
            for item in items:
                there = embedder.is_there(item, stored.get(item.id), replace=replace)
                report.unchanged += there
                if not there and item.error is None:
                    fresh.append(item)
            points = embedder.embed(fresh)
            report.embedded += len(points) - write(store, points, bin_, report)
            for item in items:
                if item.error is not None:
                    bin_.add(item.key, item.found.uri, item.error, report)
            report.seen += len(items)
            progress(report)
    if report.embedded:
        store.finish()
    return report


def write(store: Store, points: list[Point], bin_: "Rejects", report: Report) -> int:
    """Writes the points; when the engine refuses some, finds them by halving and rejects those alone. How many were refused."""
    if not points:
        return 0
    try:
        for start in range(0, len(points), 64):
            store.upsert(points[start : start + 64])
        return 0
    except PointError as e:
        if len(points) == 1:
            bin_.add(points[0].payload["key"], points[0].payload["uri"], e, report)
            return 1
        half = len(points) // 2
        return write(store, points[:half], bin_, report) + write(store, points[half:], bin_, report)


class Rejects:
    """A JSON line for each picture that didn't make it; the file appears with the first one."""

    def __init__(self, path: str | None) -> None:
        self.path, self._file = path, None

    def __enter__(self) -> "Rejects":
        if self.path and UPath(self.path).exists():
            UPath(self.path).unlink()  # of an earlier run: what is still wrong will be said again
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file:
            self._file.close()

    def add(self, key: str, path: str, error: DclipError, report: Report) -> None:
        self.add_row({"key": key, "path": path, "reason": str(error)}, report)

    def add_row(self, row: dict[str, str], report: Report) -> None:
        report.rejected += 1
        if len(report.reasons) < 5:
            report.reasons.append(row["reason"])
        if self.path:
            if self._file is None:
                UPath(self.path).parent.mkdir(parents=True, exist_ok=True)
                self._file = UPath(self.path).open("w")
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
