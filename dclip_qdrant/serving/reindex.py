"""A new collection from an old one's payload and pictures, embedded by another student; the old one keeps
serving."""

import datetime
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice

from dclip_qdrant.errors import ImageError, InputError, UsageError
from dclip_qdrant.pairs.readers import SourcePicture, read_any
from dclip_qdrant.pictures.regions import CONTEXT, Regions
from dclip_qdrant.serving.bridge import BRIDGED, fill, learn_from
from dclip_qdrant.serving.collection import META, CollectionSpec, check_student, metadata_of
from dclip_qdrant.serving.embedder import Embedder
from dclip_qdrant.serving.ingest import WINDOW, Progress, run
from dclip_qdrant.serving.items import Item, Payload, Report, point_id
from dclip_qdrant.serving.stores import Place, Store
from dclip_qdrant.serving.student import Student

EMBEDDED = ("content_hash", "caption", "boxes")  # of a payload: what vectors follow from
VERSION_LENGTH = 8  # hex digits of a student's fingerprint behind a collection's name


def version_name(collection: str, student: Student) -> str:
    """`pictures` -> `pictures-8219ca3f`; a version of a version replaces the mark."""
    stem, dash, mark = collection.rpartition("-")
    is_mark = dash and len(mark) == VERSION_LENGTH and all(c in "0123456789abcdef" for c in mark)
    return f"{stem if is_mark else collection}-{student.fingerprint[:VERSION_LENGTH]}"


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def reindex(
    place: Place,
    old: str,
    student: Student,
    *,
    to: str | None = None,
    source: str | None = None,
    images_root: str | None = None,
    prefix: str = "",
    spec: CollectionSpec | None = None,
    context: float = CONTEXT,
    threads: int | None = None,
    rejects: str | None = None,
    bridge: int | None = None,
    bridged: Callable[[int, float], None] = lambda count, likeness: None,
    progress: Progress = lambda report: None,
) -> tuple[Store, Report]:
    """Fills `to` (default: `version_name`) with every point of `old`, embedded by `student`. Run it again
    after a kill, and before `promote`: it goes on, and brings over what was added, changed or deleted in
    `old` since.

    Payload is carried over whole, also what isn't ours; regions are the old one's boxes, so no detector is
    needed. Pictures are read again from where they were ingested from, or from `source` (tars and Parquet
    files hold pictures that no path of their own leads to).

    Args:
        bridge: Embed so many pictures, learn from them how the old student's vectors lie in the new one's
            space (`bridge.py`), fill `to` with mapped vectors, then embed the rest. Once `bridged` was called
            (with how many points, and the mean cosine of mapped and true vectors), `to` can be promoted: it
            is filled on while it serves, and what writers changed in it since is left alone.

    Raises:
        MismatchError: `to` was filled by another student. UsageError: `to` is `old`. StoreError.
    """
    old = place.aliases().get(old, old)
    old_store = place.open(old)
    old_store.describe()  # raises where there is none
    remembered = old_store.metadata().get(META, {})
    name = to or version_name(old, student)
    if remembered.get("mark"):
        came = f"{old} belongs to somebody else too: their vectors would be left behind"
        do = "ingest with `into_existing` into a copy of it"
        raise UsageError("reindex", came, "a collection of dclip-qdrant's own", do)
    if name == old:
        raise UsageError("reindex", f"{name} would be filled from itself", "another `to`")
    new_store = place.open(name)
    if new_store.exists():
        check_student(new_store.metadata(), student, name)
    else:
        metadata = metadata_of(student, replaces=old, created=now(), carried=remembered.get("student"))
        new_store.create(spec or CollectionSpec.load(), student.dim, metadata)
    points = _own_points(old_store)
    if source:
        points = _points_of_source(old_store, source, images_root, prefix)
    embedder = Embedder(student, context=context, threads=threads)

    def serves() -> bool:
        return name in place.aliases().values()

    if bridge:
        first = list(islice(points, bridge))
        items = _items(iter(first), new_store, student, serves)
        run(items, _judge, embedder, new_store, progress=progress)
        found = learn_from(old_store, new_store, [point for point, _, _ in first])
        bridged(fill(found, old_store, new_store, student), found.likeness)
        points = chain(first, points)
    items = _items(points, new_store, student, serves)
    report = run(items, _judge, embedder, new_store, rejects=rejects, progress=progress)
    if new_store.metadata()[META].get("replaces") == old and name not in place.aliases().values():
        report.deleted = _drop_deleted(old_store, new_store)
    return new_store, report


def _drop_deleted(old: Store, new: Store) -> int:
    """Deletes what the old collection no longer has from the new one, which came from it alone and which no
    alias means yet; how many there were."""
    ids = [point.id for point in new.scroll()]
    count = 0
    for start in range(0, len(ids), WINDOW):
        some = ids[start : start + WINDOW]
        there = old.payloads(some, ["key"])
        lost = [i for i in some if i not in there]
        if lost:
            new.delete(lost)
            count += len(lost)
    return count


OldPoint = tuple[str, Payload, SourcePicture | None]  # id, payload, the source's picture


def _own_points(store: Store) -> Iterator[OldPoint]:
    return ((p.id, p.payload, None) for p in store.scroll())


def _points_of_source(store: Store, source: str, images_root: str | None, prefix: str) -> Iterator[OldPoint]:
    """The old points in the order of the source, each with the source's picture; then those that the source
    doesn't have."""
    _, pictures = read_any(source, images_root=images_root, captions=False)
    met: set[str] = set()
    while window := list(islice(pictures, WINDOW)):
        picture_of = {point_id(prefix + p.key): p for p in window if p.error is None}
        payloads = store.payloads(list(picture_of), None)
        met |= set(payloads)
        yield from ((i, payloads[i], p) for i, p in picture_of.items() if i in payloads)
    yield from ((p.id, p.payload, None) for p in store.scroll() if p.id not in met)


def _items(
    points: Iterator[OldPoint], new_store: Store, student: Student, serves: Callable[[], bool]
) -> Iterator[Item]:
    """The old points on their way. Where the new collection `serves` already it is the newer one: only its
    mapped vectors are replaced, what it says of pictures and which it has is left alone."""
    while window := list(islice(points, WINDOW)):
        there = new_store.payloads([point for point, _, _ in window], None)
        leads = serves()
        for point, payload, picture in window:
            own = there.get(point)
            if leads and own is not None and own.get(BRIDGED):
                payload = {name: value for name, value in own.items() if name != BRIDGED}
            item = _item(point, payload, picture, own, student)
            if leads and not (own and own.get(BRIDGED)):
                item.unchanged, item.renewed, item.error = True, None, None
            yield item


def _item(
    point: str, payload: Payload, picture: SourcePicture | None, there: Payload | None, student: Student
) -> Item:
    """An old point; what the new collection has of it already (`there`) is brought up to date without
    embedding, unless its vectors follow from something else by now."""
    key, uri = str(payload.get("key") or point), str(payload.get("uri") or "")
    item = Item(picture or SourcePicture(key, uri, []), key, point, carried=payload)
    wanted = payload | {"student": student.model_name}
    if there == wanted:
        item.unchanged = True
    elif there is not None and not there.get(BRIDGED) and _same_vectors(there, payload):
        item.renewed = wanted
    if not uri or "content_hash" not in payload:
        came = "no uri or content_hash in its payload"
        item.error = InputError(
            f"point {point}", came, "a point that dclip-qdrant ingested", "ingest its picture"
        )
    elif payload.get("labels"):
        item.regions = Regions.of_row(payload)
    return item


def _same_vectors(there: Payload, payload: Payload) -> bool:
    return all(there.get(name) == payload.get(name) for name in EMBEDDED)


def _judge(items: Sequence[Item], stored: dict[str, Payload]) -> None:
    """Refuses pictures that changed since they were ingested."""
    for item in items:
        if isinstance(item.error, ImageError):
            e = item.error
            item.error = ImageError(
                e.where, e.came, e.expected, "where did the pictures go? `source` names them"
            )
        elif item.pending and item.carried and item.content_hash != item.carried["content_hash"]:
            came = "changed since it was ingested: its boxes and caption may no longer be true"
            item.error = InputError(
                str(item.carried["uri"]), came, "the same picture", "ingest it again first"
            )
