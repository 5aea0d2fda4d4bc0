"""Changing the student of a live collection: a gate, one alias swap, a way back. (`reindex.py` makes the new
collection.)

compare   -> both collections answer the golden queries; the result stands in the new one's metadata
promote   -> the alias moves in one call, if nothing is missing and the gate holds
rollback  -> the alias moves back
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from dclip_qdrant.errors import GateError, MismatchError, StoreError, UsageError
from dclip_qdrant.metrics import paired_difference
from dclip_qdrant.serving.collection import META, CollectionSpec
from dclip_qdrant.serving.golden import Golden, Scores, by_picture
from dclip_qdrant.serving.reindex import now
from dclip_qdrant.serving.search import search
from dclip_qdrant.serving.stores import Place, Store
from dclip_qdrant.serving.student import Student

PUSHED_TOGETHER = 64  # points a request
LEARNED = ("search", "relevance")  # what `tune` left in a collection's metadata


@dataclass(frozen=True)
class Promotion:
    """An alias, the collection that it means now, and the one that it meant before."""

    alias: str
    collection: str
    before: str | None

    def row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class CollectionVersion:
    """A collection of a place: its student, its points, what points at it.

    `points` is None for an embedded collection that another process has open; `golden` is what `compare`
    found.
    """

    collection: str
    aliases: list[str]
    points: int | None
    student: str | None
    created: str | None
    replaces: str | None
    golden: dict[str, Any] | None

    def row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class GoldenComparison:
    """What the students of two collections reach on the same queries; `difference` is new minus old in the
    mean of recall at 1, 5 and 10, `ci` its 95% interval."""

    old: str
    mode: str
    queries: int
    golden: str  # fingerprint of the queries
    before: dict[str, float]
    after: dict[str, float]
    at: str
    difference: float
    ci: tuple[float, float]

    def row(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    old: Store, old_student: Student, new: Store, new_student: Student, golden: Golden, *, mode: str = "dense"
) -> GoldenComparison:
    """Both collections answer the golden queries with their own students; the result, which the new one's
    metadata keeps for `promote`.

    Raises:
        MismatchError: a student that didn't fill its collection.
    """

    def scores(store: Store, student: Student) -> Scores:
        return Scores.of(
            golden, lambda text: [h.id for h in search(store, student, text=text, mode=mode, limit=10)]
        )

    before, after = scores(old, old_student), scores(new, new_student)
    gain = paired_difference(by_picture(before.together, golden), by_picture(after.together, golden))
    low, high = gain["ci"]
    result = GoldenComparison(
        old=old.name,
        mode=mode,
        queries=len(golden),
        golden=golden.fingerprint,
        before=before.row(),
        after=after.row(),
        at=now(),
        difference=gain["difference"],
        ci=(low, high),
    )
    metadata = new.metadata()
    new.set_metadata(metadata | {META: metadata[META] | {"golden": result.row()}})
    return result


def promote(
    place: Place, alias: str, to: str, *, tolerance: float = 0.0, missing: int = 0, force: bool = False
) -> Promotion:
    """Points the alias at `to`, in one call.

    Args:
        tolerance: How many points of the golden score (mean of R@1, 5, 10; 0.01 is one point) the new
            collection may lose.
        missing: How many points of the old collection the new one may lack (rejected pictures).
        force: Promote without the gate. A first promotion, with nothing behind the alias, has no gate.

    Raises:
        GateError: below the gate, or never compared. UsageError: `to` is itself an alias, or a collection
            bears the alias's name. StoreError.
    """
    store = place.open(to)
    store.describe()
    if to in place.aliases():
        raise UsageError("`to`", f"{to} is an alias", "a collection")
    if alias in place.collections():
        do = f"{alias}-live, say; then let the apps query that"
        raise UsageError("`alias`", f"{alias} is a collection", "a name of its own that apps query", do)
    metadata, current = store.metadata(), place.aliases().get(alias)
    remembered = metadata.get(META)
    if remembered is None:
        came = "a collection that dclip-qdrant didn't make"
        raise MismatchError(to, came, "one that ingest or reindex filled")
    if current == to:
        return Promotion(alias, to, to)
    if current is not None and not force:
        lacking = place.open(current).count() - store.count()
        _check_gate(to, current, lacking, remembered.get("golden"), tolerance=tolerance, missing=missing)
    if current is not None:
        store.set_metadata(metadata | {META: remembered | {"before": current}})
    place.point(alias, to)
    return Promotion(alias, to, current)


def _check_gate(
    to: str, current: str, lacking: int, golden: dict[str, Any] | None, *, tolerance: float, missing: int
) -> None:
    if lacking > missing:
        came = f"{lacking:,} points fewer than {current}"
        do = "run reindex again, or allow them with `missing`"
        raise GateError(to, came, f"at most {missing:,}", do)
    if golden is None or golden["old"] != current:
        came = f"never compared with {current}"
        do = "reindex with `golden`, or `force`"
        raise GateError(to, came, "a comparison on golden queries", do)
    if golden["difference"] < -tolerance:
        came = f"golden score {golden['difference'] * 100:+.1f} points against {current}"
        do = f"{current} goes on serving; `tolerance` or `force` if you mean it"
        raise GateError(to, came, f"at least {-tolerance * 100:+.1f}", do)


def rollback(place: Place, alias: str) -> Promotion:
    """Points the alias back at what it meant before the last promotion.

    Raises:
        UsageError: no such alias, nothing before it, or that collection is gone.
    """
    current = place.aliases().get(alias)
    if current is None:
        raise UsageError("`alias`", f"no alias {alias!r}", ", ".join(place.aliases()) or "none here")
    before = place.open(current).metadata().get(META, {}).get("before")
    if before is None:
        raise UsageError("rollback", f"nothing was before {current}", "a promoted collection")
    if before not in place.collections():
        raise UsageError("rollback", f"{before} is gone", "the collection that served before")
    place.point(alias, before)
    return Promotion(alias, before, current)


def push(
    source: Place,
    target: Place,
    collection: str,
    *,
    to: str | None = None,
    progress: Callable[[int, int], None] = lambda done, new: None,
) -> tuple[int, int]:
    """Copies a collection to another place, vectors, payload and metadata; points that are there already with
    the same payload are left alone. How many it has, how many were new or had changed.

    Raises:
        MismatchError: the collection there was filled by another student. StoreError.
    """
    here, there = source.open(collection), target.open(to or collection)
    facts, metadata = here.describe(), here.metadata()
    if there.exists():
        theirs = there.metadata().get(META, {})
        if theirs.get("fingerprint") != metadata[META]["fingerprint"]:
            came = f"filled by {theirs.get('student', 'something else')}"
            raise MismatchError(
                f"{target.where}/{there.name}", came, metadata[META]["student"], "another `to`"
            )
    else:
        there.create(CollectionSpec.of(facts), facts["dim"], metadata)
    done = new = 0
    points = iter(here.scroll(with_vectors=True))
    while batch := list(islice(points, PUSHED_TOGETHER)):
        stored = there.payloads([p.id for p in batch], None)
        fresh = [p for p in batch if stored.get(p.id) != p.payload]
        if fresh:
            there.upsert(fresh)
        done, new = done + len(batch), new + len(fresh)
        progress(done, new)
    there.finish()
    learned = {name: metadata[META][name] for name in LEARNED if metadata[META].get(name)}
    theirs = there.metadata()
    if any(theirs[META].get(name) != value for name, value in learned.items()):
        there.set_metadata(theirs | {META: theirs[META] | learned})
    return done, new


def versions(place: Place) -> list[CollectionVersion]:
    """Every collection of the place."""
    aliases_of: dict[str, list[str]] = {}
    for alias, collection in place.aliases().items():
        aliases_of.setdefault(collection, []).append(alias)
    out = []
    for name in place.collections():
        store = place.open(name)
        remembered = store.metadata().get(META, {})
        golden = remembered.get("golden")
        try:
            points = store.count()
        except StoreError:  # an embedded collection that another process has open
            points = None
        out.append(
            CollectionVersion(
                collection=name,
                aliases=sorted(aliases_of.get(name, [])),
                points=points,
                student=remembered.get("student"),
                created=remembered.get("created"),
                replaces=remembered.get("replaces"),
                golden=golden and {k: golden[k] for k in ("old", "difference", "ci", "queries")},
            )
        )
        store.close()
    return out
