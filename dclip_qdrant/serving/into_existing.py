"""Moving in with a collection that was there before us: our vectors and payload are added to its points under
a mark, what its owner put there stays.

A picture of the source finds its points by a payload field that holds the picture's key (the file's path
within the source, as `ingest` names it). Run again after a kill it goes on; pictures that no point asks for
are rejected, points without a picture are counted.
"""

from collections.abc import Sequence

from dclip_qdrant.errors import DclipError, InputError, UsageError
from dclip_qdrant.serving.collection import META, CollectionSpec, check_student, metadata_of
from dclip_qdrant.serving.embedder import Embedder
from dclip_qdrant.serving.ingest import LocalKeys, PictureJudge, Progress, SourceItems, run
from dclip_qdrant.serving.items import Item, Payload, Report, point_id
from dclip_qdrant.serving.stores import Point
from dclip_qdrant.serving.stores.qdrant import Qdrant

MARK = "dclip"


class Guest:
    """A sink: points by our ids, which are those of the collection's own points with the same key."""

    def __init__(self, store: Qdrant, field: str, prefix: str = "") -> None:
        self.store = store
        self.field = field
        self.hosts: dict[str, list[str]] = {}  # our id -> the ids of their points
        self.points = self.without_field = 0
        for host, value in store.field_values(field):
            self.points += 1
            if isinstance(value, str) and value:
                self.hosts.setdefault(point_id(prefix + value), []).append(host)
            else:
                self.without_field += 1
        self.met: set[str] = set()

    def refuse(self, item: Item) -> DclipError | None:
        """Why a picture has no place here."""
        self.met.add(item.id)
        if item.id in self.hosts:
            return None
        came = f"no point has {self.field} = {item.picture.key!r}"
        return InputError(item.picture.uri, came, "a picture that the collection knows")

    @property
    def without_picture(self) -> int:
        """Points that the source had no picture for."""
        missed = sum(len(hosts) for ours, hosts in self.hosts.items() if ours not in self.met)
        return self.without_field + missed

    def payloads(self, ids: list[str], keys: list[str] | None) -> dict[str, Payload]:
        """Of points that all their copies have been given already; a half-written picture counts as not
        there."""
        every_host = [host for ours in ids for host in self.hosts.get(ours, [])]
        payload_of = self.store.payloads(every_host, keys)
        out: dict[str, Payload] = {}
        for ours in ids:
            payloads = [payload_of.get(host) for host in self.hosts.get(ours, [])]
            if payloads and payloads[0] and all(p and p.get("content_hash") for p in payloads):
                out[ours] = payloads[0]
        return out

    def upsert(self, points: list[Point]) -> None:
        self.store.update(
            [Point(host, p.image, p.regions, p.payload) for p in points for host in self.hosts[p.id]]
        )

    def set_payloads(self, payloads: dict[str, Payload]) -> None:
        self.store.set_payloads({host: own for ours, own in payloads.items() for host in self.hosts[ours]})

    def finish(self) -> None:
        self.store.finish()


def ingest_into(
    source: str,
    embedder: Embedder,
    store: Qdrant,
    *,
    field: str,
    spec: CollectionSpec | None = None,
    images_root: str | None = None,
    read_as: str | None = None,
    prefix: str = "",
    splits: Sequence[str] = (),
    captions: int | None = None,
    replace: bool = False,
    rejects: str | None = None,
    limit: int | None = None,
    progress: Progress = lambda report: None,
) -> tuple[Report, Guest]:
    """Gives the collection's points the vectors of the source's pictures; arguments as in `ingest.ingest`.

    Raises:
        UsageError: no such collection, one that dclip-qdrant made itself, or a field that no point has.
        MismatchError: another student moved in before. StoreError.
    """
    store.describe()  # raises where there is none
    metadata = store.metadata()
    ours = metadata.get(META)
    if ours is not None and not ours.get("mark"):
        came = f"{store.name} is a collection of dclip-qdrant's own"
        raise UsageError("`into_existing`", came, "somebody else's", "ingest without `into_existing`")
    if ours is not None:
        check_student(metadata, embedder.student, store.name)
    guest = Guest(store, field, prefix)
    if not guest.hosts:
        came = f"no point of {store.name} has text in {field!r}"
        raise UsageError("`into_existing`", came, "the payload field that holds each picture's key")
    remembered = metadata_of(embedder.student, field=field)
    store.move_in(spec or CollectionSpec.load(), embedder.student.dim, remembered, MARK)
    items = SourceItems(
        source,
        images_root=images_root,
        prefix=prefix,
        splits=splits,
        captions=captions,
        limit=limit,
        read_as=read_as,
    )
    judge = PictureJudge(embedder, replace=replace, keys=LocalKeys(), refuse=guest.refuse, shared=True)
    report = run(iter(items), judge, embedder, guest, rejects=rejects, progress=progress)
    return items.note_left_out(report), guest
