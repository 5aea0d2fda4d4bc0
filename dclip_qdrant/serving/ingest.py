"""Pictures -> collection: the one loop that reads, judges, embeds and writes, whatever calls it.

    source -> judge -> prepare | forward | sink

A source gives items; a judge marks those that are there already or have no place there; the embedder decodes
the rest and makes points of them; a sink (a store, or a guest in somebody's collection) takes them. The three
parts between the bars overlap: while the student's tower runs on one window of pictures, the next one is read
and decoded and the last one is written.

Point ids follow from keys, so that ingesting twice updates. What is there already with the same content, text
and regions isn't decoded again: it is skipped, or its payload brought up to date where the source says
something else of it. A killed run therefore goes on where it was.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Protocol

from dclip_qdrant.detectors import Detector, as_detector
from dclip_qdrant.errors import DclipError, InputError, PointError
from dclip_qdrant.pairs.readers import Account, SourcePicture, open_source
from dclip_qdrant.pairs.region_files import load_regions
from dclip_qdrant.pictures.regions import Regions
from dclip_qdrant.serving.bridge import BRIDGED
from dclip_qdrant.serving.collection import CollectionSpec, check_student, metadata_of
from dclip_qdrant.serving.embedder import Embedder, Layout, Prepared
from dclip_qdrant.serving.items import Item, Payload, RejectsFile, Report
from dclip_qdrant.serving.prune import local_root, note_gone
from dclip_qdrant.serving.stores import Point, Store
from dclip_qdrant.serving.student import TOP_K, Student, as_student

WINDOW = 64  # pictures that go through together, and points a request; three windows are in flight

Progress = Callable[[Report], None]
Refuse = Callable[[Item], DclipError | None]
Judge = Callable[
    [Sequence[Item], dict[str, Payload]], None
]  # marks items, given what is stored under their ids


class Sink(Protocol):
    """Where points go; a `Store` is one."""

    def payloads(self, ids: list[str], keys: list[str] | None) -> dict[str, Payload]: ...

    def upsert(self, points: list[Point]) -> None: ...

    def set_payloads(self, payloads: dict[str, Payload]) -> None: ...

    def finish(self) -> None: ...


class Keys(Protocol):
    """Who came first with a key."""

    def claim(self, keys: Sequence[str], places: Sequence[str]) -> list[bool]:
        """Whether each key is free, or was claimed from this very place in the source before."""
        ...


class LocalKeys:
    """The keys of one process, as 64-bit hashes: 130 bytes a key, however long keys and places are. Two of
    ten million keys are taken for one with a probability of 3 in a million."""

    def __init__(self) -> None:
        self._place_of: dict[int, int] = {}

    def claim(self, keys: Sequence[str], places: Sequence[str]) -> list[bool]:
        pairs = [(hash(key), hash(place)) for key, place in zip(keys, places, strict=True)]
        return [self._place_of.setdefault(key, place) == place for key, place in pairs]


class PictureJudge:
    """Which pictures of a source are new, which are there already (and what is stored of them is still what
    the source says), and which have no place in the collection.

    `shared`: points have payload of somebody else's beside ours.
    """

    def __init__(
        self,
        embedder: Embedder,
        *,
        replace: bool,
        keys: Keys,
        refuse: Refuse | None = None,
        shared: bool = False,
    ) -> None:
        self.embedder = embedder
        self.replace = replace
        self.keys = keys
        self.refuse = refuse
        self.shared = shared

    def __call__(self, items: Sequence[Item], stored: dict[str, Payload]) -> None:
        usable = [item for item in items if item.error is None]
        free = self.keys.claim([i.key for i in usable], [i.picture.place for i in usable])
        for item, is_free in zip(usable, free, strict=True):
            if not is_free:
                came = f"a second picture named {item.key!r} in this source"
                item.error = InputError(item.picture.uri, came, "unique names")
            if item.error is None and self.refuse is not None:
                item.error = self.refuse(item)
            if item.error is None and item.id in stored:
                self._compare(item, stored[item.id])

    def _compare(self, item: Item, there: Payload) -> None:
        """Marks the item as unchanged, as one whose payload is to be renewed, or as a different picture of
        another place under the same key."""
        other_content = there.get("content_hash") != item.content_hash
        if other_content and there.get("uri") != item.picture.uri and not self.replace:
            came = f"the key {item.key!r} is taken by another picture ({there.get('uri')})"
            do = "`prefix` NAME/ keeps sources apart, `replace` takes the new one"
            item.error = InputError(item.picture.uri, came, "one key, one picture", do)
            return
        if there.get(BRIDGED):
            return  # its vectors are mapped ones: here is the picture
        # vectors follow from these: the words are a vector of their own in some engines
        was = (there.get("content_hash"), there.get("caption") or "", there.get("detector"))
        if was != (item.content_hash, item.caption, self.embedder.regions_from):
            return
        # as an engine gives it back: JSON has no tuples
        wanted = json.loads(json.dumps(self.embedder.payload_of(item, there)))
        have = {name: there.get(name) for name in wanted} if self.shared else there
        if _said(have) != _said(wanted):
            item.renewed = wanted
            return
        item.unchanged = True
        if item.file_state != have.get("file_state", ""):
            item.restated = wanted


def _said(payload: Payload) -> Payload:
    """What a payload says of a picture; its file's time is for us alone."""
    return {name: value for name, value in payload.items() if name != "file_state"}


def judge_and_prepare(items: Sequence[Item], judge: Judge, embedder: Embedder, sink: Sink) -> list[Prepared]:
    """Reads the items, as far as what is stored doesn't say that they are known, and judges them -> the
    pictures to embed."""
    stored = sink.payloads([i.id for i in items if i.error is None], None)
    embedder.read(items, stored)
    judge(items, stored)
    return embedder.prepare([i for i in items if i.pending])


def write_points(sink: Sink, points: list[Point]) -> list[dict[str, str]]:
    """Writes the points; when the engine refuses some, finds them by halving. The rows of those refused."""
    if not points:
        return []
    try:
        for start in range(0, len(points), WINDOW):
            sink.upsert(points[start : start + WINDOW])
        return []
    except PointError as e:
        if len(points) == 1:
            payload = points[0].payload
            key, uri = payload.get("key") or points[0].id, payload.get("uri") or ""
            return [{"key": str(key), "path": str(uri), "reason": str(e)}]
        half = len(points) // 2
        return write_points(sink, points[:half]) + write_points(sink, points[half:])


def run(
    items: Iterator[Item],
    judge: Judge,
    embedder: Embedder,
    sink: Sink,
    *,
    rejects: str | None = None,
    progress: Progress = lambda report: None,
) -> Report:
    """The loop. Rejected pictures go to the file `rejects` with path and reason.

    Raises:
        StoreError: the engine is away.
    """
    report = Report()

    def next_window() -> tuple[list[Item], list[Prepared]]:
        window = list(islice(items, WINDOW))
        return window, judge_and_prepare(window, judge, embedder, sink)

    def write(window: list[Item], points: list[Point]) -> None:
        refused = write_points(sink, points)
        renewed = {i.id: i.renewed for i in window if i.renewed is not None and i.error is None}
        restated = {i.id: i.restated for i in window if i.restated is not None}
        if renewed or restated:
            sink.set_payloads(renewed | restated)
        rejected = refused + [i.reject_row() for i in window if i.error is not None]
        rejects_file.write(rejected)
        report.seen += len(window)
        report.updated += len(renewed)
        report.unchanged += sum(i.unchanged for i in window)
        report.embedded += len(points) - len(refused)
        report.add_rejects(rejected)
        progress(report)

    with (
        RejectsFile(rejects) as rejects_file,
        ThreadPoolExecutor(1) as ahead,
        ThreadPoolExecutor(1) as behind,
    ):
        coming = ahead.submit(next_window)
        written = None
        while (window_and_pixels := coming.result())[0]:
            coming = ahead.submit(next_window)
            window, prepared = window_and_pixels
            points = embedder.forward(prepared)
            if written is not None:
                written.result()  # raises what the engine said
            written = behind.submit(write, window, points)
        if written is not None:
            written.result()
    if report.embedded:
        sink.finish()
    return report


class SourceItems:
    """The pictures of a folder, CSV, JSONL, tar or Parquet, on their way, each with its first `captions`; and
    afterwards what of the source was left out.

    Raises:
        UsageError: nothing to read.
    """

    def __init__(
        self,
        source: str,
        *,
        images_root: str | None = None,
        prefix: str = "",
        splits: Sequence[str] = (),
        captions: int | None = None,
        limit: int | None = None,
        read_as: str | None = None,
    ) -> None:
        self._layout = open_source(source, images_root=images_root, captions=False, read_as=read_as)
        self.top = self._layout.top
        self._account = Account(self._layout)
        self._prefix, self._splits, self._captions, self._limit = prefix, splits, captions, limit

    def __iter__(self) -> Iterator[Item]:
        wanted: Iterator[SourcePicture] = (
            p
            for p in self._account.pictures()
            if not self._splits or p.split in self._splits or p.error is not None
        )
        return (Item.of(p, self._prefix, self._captions) for p in islice(wanted, self._limit))

    def note_left_out(self, report: Report) -> Report:
        """The report with what was left out, once all pictures went through."""
        if self._limit is None:  # else the rest wasn't looked at
            report.note_left_out(self._layout.kind, self._account.left_out())
        return report


def prepare_collection(store: Store, student: Student, spec: CollectionSpec) -> None:
    """Creates the collection, or makes sure that this student filled it and that nothing of it is missing.
    Raises MismatchError."""
    if not store.exists():
        store.create(spec, student.dim, metadata_of(student))
    check_student(store.metadata(), student, store.name)
    store.complete()


def ingest(
    source: str | Path,
    student: Student | str | Path,
    store: Store,
    *,
    detector: Detector | str | None = None,
    regions: Mapping[str, Regions] | str | Path | None = None,
    top_k: int = TOP_K,
    spec: CollectionSpec | str | None = None,
    images_root: str | None = None,
    read_as: str | None = None,
    prefix: str = "",
    splits: Sequence[str] = (),
    captions: int | None = None,
    replace: bool = False,
    rejects: str | None = None,
    limit: int | None = None,
    prune: bool = False,
    threads: int | None = None,
    layout: Layout = "flat",
    max_pixels: int | None = None,
    verify: bool = False,
    progress: Progress = lambda report: None,
) -> Report:
    """Creates the collection where there is none and fills it.

    Args:
        source: A folder, CSV, JSONL, tar or Parquet of pictures, or pairs.
        detector: What finds regions: an instance, or a name in `detectors/`; or `regions` that were found
            before.
        read_as: What the source is (folder, csv, jsonl, json, token, tar, parquet); None: what is in it.
        prefix: Put before every key, to keep sources apart.
        splits: Only these, of a source that has splits.
        captions: How many of each picture's captions are indexed, the first ones; None: all. With 1, the
            others stay for `tune`: a caption that is indexed word for word can't be a test of search.
        replace: A key that another picture has is taken over.
        rejects: A file for the pictures that were rejected, with path and reason.
        prune: Delete points whose picture is gone from the source's folder; else they are counted, in
            collections of up to COUNT_GONE points.
        max_pixels: Of a picture; larger ones are rejected. None: 89 million.
        verify: Read every file. Else one with the size and the time that are stored is taken for the same.

    Raises:
        MismatchError: another student filled the collection. UsageError: nothing to read.
        StoreError: the engine is away.
    """
    loaded = as_student(student)
    wish = spec if isinstance(spec, CollectionSpec) else CollectionSpec.load(spec or "default")
    embedder = Embedder(
        loaded,
        detector=as_detector(detector),
        regions=load_regions(regions) if isinstance(regions, str | Path) else regions,
        top_k=top_k,
        threads=threads,
        layout=layout,
        max_pixels=max_pixels,
        verify=verify,
    )
    items = SourceItems(
        str(source),
        images_root=images_root,
        prefix=prefix,
        splits=splits,
        captions=captions,
        limit=limit,
        read_as=read_as,
    )
    root = local_root(items.top, images_root, must=prune)
    prepare_collection(store, loaded, wish)
    judge = PictureJudge(embedder, replace=replace, keys=LocalKeys())
    report = run(iter(items), judge, embedder, store, rejects=rejects, progress=progress)
    if root is not None:
        note_gone(report, store, root, delete=prune)
    return items.note_left_out(report)
