"""Moving in with a collection that was there before us: our vectors and payload are added to its points under a mark, what its owner put there stays.

A picture of the source finds its points by a payload field that holds the picture's key (the file's path within the source, as `ingest` names it). Run
again after a kill it goes on; pictures that no point asks for are rejected, points without a picture are counted.
"""

from collections.abc import Callable
from typing import Any

from dclip_qdrant.collection import META, CollectionSpec, check_student, metadata_of
from dclip_qdrant.errors import DclipError, InputError, UsageError
from dclip_qdrant.ingest import Embedder, Item, Report, fill, point_id
from dclip_qdrant.stores import Point
from dclip_qdrant.stores.qdrant import Qdrant

MARK = "dclip"


class Guest:
    """What `ingest.fill` writes to: points by our ids, which are those of the collection's own points with the same key."""

    def __init__(self, store: Qdrant, field: str, prefix: str = "") -> None:
        self.store, self.field = store, field
        self.homes: dict[str, list[str]] = {}  # our id -> theirs
        self.points = self.without_field = 0
        for id_, value in store.field_values(field):
            self.points += 1
            if isinstance(value, str) and value:
                self.homes.setdefault(point_id(prefix + value), []).append(id_)
            else:
                self.without_field += 1
        self.met: set[str] = set()

    def refuse(self, item: Item) -> DclipError | None:
        """Why a picture has no place here."""
        self.met.add(item.id)
        if item.id in self.homes:
            return None
        return InputError(item.found.uri, f"no point has {self.field} = {item.found.key!r}", "a picture that the collection knows")

    @property
    def alone(self) -> int:
        """Points that the source had no picture for."""
        return self.without_field + sum(len(ids) for ours, ids in self.homes.items() if ours not in self.met)

    def payloads(self, ids: list[str], keys: list[str] | None) -> dict[str, dict[str, Any]]:
        """Of points that all their copies have been given already; a half-written picture counts as not there."""
        theirs = self.store.payloads([t for i in ids for t in self.homes.get(i, [])], keys)
        out = {}
        for i in ids:
            found = [theirs.get(t) for t in self.homes.get(i, [])]
            if found and all(f and f.get("content_hash") for f in found):
                out[i] = found[0]
        return out

    def upsert(self, points: list[Point]) -> None:
        self.store.update([Point(t, p.image, p.regions, p.payload) for p in points for t in self.homes[p.id]])

    def finish(self) -> None:
        self.store.finish()


def ingest_into(
    source: str,
    embedder: Embedder,
    store: Qdrant,
    *,
    field: str,
    spec: CollectionSpec | None = None,
    prefix: str = "",
    progress: Callable[[Report], None] = lambda report: None,
    **how: Any,
) -> tuple[Report, Guest]:
    """Gives the collection's points the vectors of the source's pictures; `how` as in `ingest.fill`.

    Raises:
        UsageError: no such collection, one that dclip-qdrant made itself, or a field that no point has. MismatchError: another student moved in before.
        StoreError.
    """
    store.describe()  # raises where there is none
    metadata = store.metadata()
    said = metadata.get(META)
    if said is not None and not said.get("mark"):
        raise UsageError(
            "--into-existing", f"{store.name} is a collection of dclip-qdrant's own", "somebody else's", "ingest without --into-existing"
        )
    if said is not None:
        check_student(metadata, embedder.student, store.name)
    guest = Guest(store, field, prefix)
    if not guest.homes:
        raise UsageError(
            "--into-existing", f"no point of {store.name} has text in {field!r}", "the payload field that holds each picture's key"
        )
    store.move_in(spec or CollectionSpec.load(), embedder.student.dim, metadata_of(embedder.student, field=field), MARK)
    report = fill(source, embedder, guest, prefix=prefix, refuse=guest.refuse, progress=progress, **how)
    return report, guest
