"""Changing the student of a live collection: a new collection beside the old one, a gate, one alias swap, a way back.

reindex   -> new collection from the old one's payload and pictures; the old one keeps serving
compare   -> both answer the golden queries; the result stands in the new one's metadata
promote   -> the alias moves in one call, if nothing is missing and the gate holds
rollback  -> the alias moves back
"""

import datetime
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from dclip_qdrant import images
from dclip_qdrant.collection import META, CollectionSpec, check_student, metadata_of
from dclip_qdrant.errors import GateError, ImageError, InputError, MismatchError, StoreError, UsageError
from dclip_qdrant.golden import Golden, Scores, by_picture
from dclip_qdrant.ingest import WINDOW, Embedder, Item, Rejects, Report, point_id, write
from dclip_qdrant.metrics import paired_difference
from dclip_qdrant.pairs.readers import Found, read_any
from dclip_qdrant.regions import Regions
from dclip_qdrant.search import search
from dclip_qdrant.stores import Place, Point, Store
from dclip_qdrant.student import Student


def version_name(collection: str, student: Student) -> str:
    """`pictures` -> `pictures-8219ca3f`; a version of a version replaces the mark."""
    stem, dash, mark = collection.rpartition("-")
    is_mark = dash and len(mark) == 8 and all(c in "0123456789abcdef" for c in mark)
    return f"{stem if is_mark else collection}-{student.fingerprint[:8]}"


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
    context: float = 0.1,
    threads: int | None = None,
    rejects: str | None = None,
    progress: Callable[[Report], None] = lambda report: None,
) -> tuple[Store, Report]:
    """Fills `to` (default: `version_name`) with every point of `old`, embedded by `student`; run it again after a kill, it goes on.

    Payload is carried over whole, also what isn't ours; regions are the old one's boxes, so no detector is needed. Pictures are read again from where
    they were ingested from, or from `source` (tars and Parquet files hold pictures that no path of their own leads to).

    Raises:
        MismatchError: `to` was filled by another student. UsageError: `to` is `old`. StoreError.
    """
    old = place.aliases().get(old, old)
    old_store = place.open(old)
    old_store.describe()  # raises where there is none
    name = to or version_name(old, student)
    if old_store.metadata().get(META, {}).get("mark"):
        raise UsageError("reindex", f"{old} belongs to somebody else too: their vectors would be left behind", "a collection of dclip-qdrant's own",
                         "ingest --into-existing into a copy of it")  # fmt: skip
    if name == old:
        raise UsageError("reindex", f"{name} would be filled from itself", "another --to")
    new = place.open(name)
    if new.exists():
        check_student(new.metadata(), student, name)
    else:
        said = old_store.metadata().get(META, {})
        new.create(
            spec or CollectionSpec.load(),
            student.dim,
            metadata_of(student, replaces=old, created=_now(), carried=said.get("student")),
        )
    embedder, report = Embedder(student, context=context, threads=threads), Report()
    rows = _from_source(old_store, source, images_root, prefix) if source else ((p.id, p.payload, None) for p in old_store.scroll())
    with Rejects(rejects) as bin_:
        while some := list(islice(rows, WINDOW)):
            there = new.payloads([i for i, _, _ in some], ["content_hash"])
            missing = [row for row in some if row[0] not in there]  # what is there came from the same payload and picture
            report.unchanged += len(some) - len(missing)
            items = list(embedder.pool.map(lambda row: _item(*row), missing))
            payload_of = {id(item): row for item, row in zip(items, missing, strict=True)}
            good = embedder.decode(items)
            points = []
            for (item, _), own in zip(good, embedder.vectors(good), strict=True):
                point, payload, _ = payload_of[id(item)]
                points.append(Point(point, own[0], own, payload | {"student": student.model_name}))
            report.embedded += len(points) - write(new, points, bin_, report)
            for item in items:
                if item.error is not None:
                    bin_.add(item.key, item.found.uri, item.error, report)
            report.seen += len(some)
            progress(report)
    if report.embedded:
        new.finish()
    return new, report


Row = tuple[str, dict[str, Any], Found | None]  # point, payload, the source's picture


def _from_source(store: Store, source: str, root: str | None, prefix: str) -> Iterator[Row]:
    """The old points in the order of the source, each with the source's picture; then those that the source doesn't have."""
    _, found = read_any(source, images=root, captions=False)
    seen: set[str] = set()
    while some := list(islice(found, WINDOW)):
        ids = {point_id(prefix + f.key): f for f in some}
        payloads = store.payloads(list(ids), None)
        seen |= set(payloads)
        yield from ((i, payloads[i], f) for i, f in ids.items() if i in payloads)
    yield from ((p.id, p.payload, None) for p in store.scroll() if p.id not in seen)


def _item(point: str, payload: dict[str, Any], found: Found | None) -> Item:
    """The old point's picture, to be embedded; an `error` where it can't be."""
    key, uri = str(payload.get("key") or point), str(payload.get("uri") or "")
    item = Item(found or Found(key, uri, []), key)
    if not uri or "content_hash" not in payload:
        item.error = InputError(
            f"point {point}", "no uri or content_hash in its payload", "a point that dclip-qdrant ingested", "ingest its picture"
        )
        return item
    try:
        item.data = found.image if found is not None and found.image is not None else images.read(found.uri if found is not None else uri)
    except ImageError as e:
        item.error = ImageError(e.where, e.came, e.expected, "where did the pictures go? --source names them")
        return item
    item.content_hash = images.content_hash(item.data)
    if item.content_hash != payload["content_hash"]:
        item.error = InputError(
            uri, "changed since it was ingested: its boxes and caption may no longer be true", "the same picture", "ingest it again first"
        )
    elif payload.get("labels"):
        item.regions = Regions.of_row(payload)
    return item


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def compare(old: Store, old_student: Student, new: Store, new_student: Student, golden: Golden, *, mode: str = "dense") -> dict[str, Any]:
    """Both collections answer the golden queries with their own students; the result, which the new one's metadata keeps for `promote`.

    Raises:
        MismatchError: a student that didn't fill its collection.
    """
    scores = [
        Scores.of(golden, lambda text, s=s, st=st: [h.id for h in search(s, st, text=text, mode=mode, limit=10)])
        for s, st in ((old, old_student), (new, new_student))
    ]
    before, after = (by_picture(s.together, golden) for s in scores)
    result = {
        "old": old.name,
        "mode": mode,
        "queries": len(golden),
        "golden": golden.fingerprint,
        "before": scores[0].row(),
        "after": scores[1].row(),
        "at": _now(),
    }
    result |= paired_difference(before, after)
    metadata = new.metadata()
    new.set_metadata(metadata | {META: metadata[META] | {"golden": result}})
    return result


def promote(place: Place, alias: str, to: str, *, tolerance: float = 0.0, missing: int = 0, force: bool = False) -> dict[str, Any]:
    """Points the alias at `to`, in one call.

    Args:
        tolerance: How many points of the golden score (mean of R@1, 5, 10; 0.01 is one point) the new collection may lose.
        missing: How many points of the old collection the new one may lack (rejected pictures).
        force: Promote without the gate. A first promotion, with nothing behind the alias, has no gate.

    Raises:
        GateError: below the gate, or never compared. UsageError: `to` is itself an alias, or a collection bears the alias's name. StoreError.
    """
    store = place.open(to)
    store.describe()
    if to in place.aliases():
        raise UsageError("--to", f"{to} is an alias", "a collection")
    if alias in place.collections():
        raise UsageError(
            "--alias", f"{alias} is a collection", "a name of its own that apps query", f"{alias}-live, say; then let the apps query that"
        )
    metadata, current = store.metadata(), place.aliases().get(alias)
    said = metadata.get(META)
    if said is None:
        raise MismatchError(to, "a collection that dclip-qdrant didn't make", "one that ingest or reindex filled")
    if current == to:
        return {"alias": alias, "collection": to, "before": to}
    if current is not None and not force:
        lacking = place.open(current).count() - store.count()
        if lacking > missing:
            raise GateError(
                to, f"{lacking:,} points fewer than {current}", f"at most {missing:,}", "run reindex again, or allow them with --missing"
            )
        golden = said.get("golden")
        if golden is None or golden["old"] != current:
            raise GateError(
                to, f"never compared with {current}", "a comparison on golden queries", "dclip-qdrant reindex --golden ..., or --force"
            )
        if golden["difference"] < -tolerance:
            raise GateError(
                to,
                f"golden score {golden['difference'] * 100:+.1f} points against {current}",
                f"at least {-tolerance * 100:+.1f}",
                f"{current} goes on serving; --tolerance or --force if you mean it",
            )
    if current is not None:
        store.set_metadata(metadata | {META: said | {"before": current}})
    place.point(alias, to)
    return {"alias": alias, "collection": to, "before": current}


def rollback(place: Place, alias: str) -> dict[str, Any]:
    """Points the alias back at what it meant before the last promotion.

    Raises:
        UsageError: no such alias, nothing before it, or that collection is gone.
    """
    current = place.aliases().get(alias)
    if current is None:
        raise UsageError("--alias", f"no alias {alias!r}", ", ".join(place.aliases()) or "none here")
    before = place.open(current).metadata().get(META, {}).get("before")
    if before is None:
        raise UsageError("rollback", f"nothing was before {current}", "a promoted collection")
    if before not in place.collections():
        raise UsageError("rollback", f"{before} is gone", "the collection that served before")
    place.point(alias, before)
    return {"alias": alias, "collection": before, "before": current}


def push(
    source: Place, target: Place, collection: str, *, to: str | None = None, progress: Callable[[int, int], None] = lambda done, new: None
) -> tuple[int, int]:
    """Copies a collection to another place, vectors, payload and metadata; points that are there already are left alone. How many it has, how many were new.

    Raises:
        MismatchError: the collection there was filled by another student. StoreError.
    """
    here = source.open(collection)
    facts, metadata = here.describe(), here.metadata()
    there = target.open(to or collection)
    if there.exists():
        theirs = there.metadata().get(META, {})
        if theirs.get("fingerprint") != metadata[META]["fingerprint"]:
            raise MismatchError(
                f"{target.where}/{there.name}",
                f"filled by {theirs.get('student', 'something else')}",
                f"{metadata[META]['student']}",
                "another --to",
            )
    else:
        there.create(CollectionSpec(vectors=facts["vectors"], payload_indexes=facts["payload_indexes"]), facts["dim"], metadata)
    done = new = 0
    points = here.scroll(with_vectors=True)
    while some := list(islice(points, 64)):
        known = there.payloads([p.id for p in some], ["content_hash"])
        fresh = [p for p in some if known.get(p.id, {}).get("content_hash", "") != p.payload.get("content_hash")]
        if fresh:
            there.upsert(fresh)
        done, new = done + len(some), new + len(fresh)
        progress(done, new)
    there.finish()
    return done, new


def versions(place: Place) -> list[dict[str, Any]]:
    """Every collection: its student, its points, what points at it."""
    aliases: dict[str, list[str]] = {}
    for alias, collection in place.aliases().items():
        aliases.setdefault(collection, []).append(alias)
    out = []
    for name in place.collections():
        store = place.open(name)
        said = store.metadata().get(META, {})
        golden = said.get("golden")
        try:
            points = store.count()
        except StoreError:  # an embedded collection that another process has open
            points = None
        out.append({"collection": name, "aliases": sorted(aliases.get(name, [])), "points": points, "student": said.get("student"), "created": said.get("created"),
                    "replaces": said.get("replaces"), "golden": golden and {k: golden[k] for k in ("old", "difference", "ci", "queries")}})  # fmt: skip
        store.close()
    return out
