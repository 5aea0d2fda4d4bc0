"""What the search page asks: collections that a loaded student filled, what is in them, hits, thumbnails."""

import io
import time
import uuid
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from dclip_qdrant.errors import DclipError, ImageError, calling_parameters
from dclip_qdrant.pictures import images
from dclip_qdrant.service.engine import Engine
from dclip_qdrant.service.inputs import image_input, picture, text_input
from dclip_qdrant.service.limits import Refused
from dclip_qdrant.serving.collection import META
from dclip_qdrant.serving.relevance import CUTOFF
from dclip_qdrant.serving.search import MODES, REMEMBERED, Hit, search
from dclip_qdrant.serving.stores import Place, Store
from dclip_qdrant.serving.student import Student

THUMBNAIL = 480  # pixels of the longer side
SHOWN = 100  # hits at most
EXAMPLES = 16  # that are liked, and that are not
STARTING, TRIED, LONGEST_EXAMPLE = 24, 6, 60  # pictures, texts and their characters, before a search


class Gallery:
    """`roots`: folders whose pictures may be shown; None shows whatever was ingested."""

    def __init__(self, engine: Engine, place: Place, *, roots: list[Path] | None = None) -> None:
        self._engine, self._place = engine, place
        self._roots = None if roots is None else [r.resolve() for r in roots]
        self._stores: dict[str, Store] = {}
        self._by_print = {s.fingerprint: s for s in engine.students.values()}

    def collections(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Those that one of the students filled, and why others can't be looked at now (open in another
        process, a server that is away); what other students filled is left out."""
        out, unavailable = [], []
        for name in self._names():
            try:
                store = self._store(name)
                student = self._by_print.get(store.metadata().get(META, {}).get("fingerprint", ""))
                if student is not None:
                    out.append({"name": name, "student": student.model_name, "points": store.count()})
            except DclipError as e:
                unavailable.append(f"{name}: {e.came}")
        return out, unavailable

    def _names(self) -> list[str]:
        return [*self._place.collections(), *self._place.aliases()]

    def _store(self, name: str) -> Store:
        """An alias is looked up each time: it may have been promoted meanwhile."""
        name = self._place.aliases().get(name, name)
        if name not in self._stores:
            if name not in self._place.collections():
                raise Refused(404, f"no collection {name[:80]!r}")
            self._stores[name] = self._place.open(name)
        return self._stores[name]

    def _student(self, store: Store) -> Student:
        remembered = store.metadata().get(META, {})
        student = self._by_print.get(remembered.get("fingerprint", ""))
        if student is None:
            loaded = ", ".join(self._engine.students)
            raise Refused(
                409,
                f"{store.name}: filled by {remembered.get('student', 'something else')}; this "
                f"service has {loaded} -> serve --student with that one, or reindex the "
                "collection",
            )
        return student

    def search(self, body: Any) -> dict[str, Any]:
        """{"collection", "text", "image" (base64), "like" and "unlike" (ids of points), "minus" (a text),
        "mode", "filters": [...], "limit"} -> hits with the region that matched. One of text, image and like
        at least."""
        if not isinstance(body, dict) or not isinstance(body.get("collection"), str):
            raise Refused(400, "collection: missing")
        store = self._store(body["collection"])
        student = self._student(store)
        mode, limit, filters = body.get("mode", "dense"), body.get("limit", 24), body.get("filters", [])
        if mode not in MODES:
            raise Refused(400, f"mode: expected one of {', '.join(MODES)}")
        if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= SHOWN:
            raise Refused(400, f"limit: expected 1 to {SHOWN}")
        _check_texts("filters", filters, "conditions, e.g. labels=dog")
        wanted = self._wanted(body)
        began = time.perf_counter()
        with calling_parameters({"where": "filters"}):
            hits = search(store, student, mode=mode, where=filters, limit=limit, **wanted)
        return {
            "student": student.model_name,
            "milliseconds": round((time.perf_counter() - began) * 1000, 1),
            # below it the page says that nothing fits
            "cutoff": CUTOFF,
            "hits": [_shown(h.row()) for h in hits],
        }

    def _wanted(self, body: dict[str, Any]) -> dict[str, Any]:
        """The parts of a query, checked, as `search` takes them."""
        limits = self._engine.limits
        wanted: dict[str, Any] = {}
        for name in ("text", "minus"):
            if body.get(name) is not None:
                wanted[name] = text_input(body[name], "", name, limits).data
        if body.get("image") is not None:
            wanted["image"] = picture(image_input(body["image"], "", "image", limits), limits)
        for name in ("like", "unlike"):
            ids = body.get(name) or []
            _check_texts(name, ids, "ids of points")
            if len(ids) > EXAMPLES:
                raise Refused(400, f"{name}: {len(ids)} examples; at most {EXAMPLES}")
            wanted[name] = ids
        if "text" not in wanted and "image" not in wanted and not wanted["like"]:
            raise Refused(400, "expected a text, an image or an example that is liked")
        return wanted

    def start(self, collection: str) -> dict[str, Any]:
        """Some of the collection's pictures, and captions or labels of theirs to search for."""
        store = self._store(collection)
        student = self._student(store)
        points = list(islice(store.scroll(), STARTING))
        hits = [_shown(Hit(point.id, 0.0, point.payload).row()) for point in points]
        captions = [(point.payload.get("caption") or "").split("\n")[0] for point in points]
        texts = [text for text in dict.fromkeys(captions) if 8 <= len(text) <= LONGEST_EXAMPLE]
        if not texts:
            labels = [label for point in points for label in point.payload.get("labels") or []]
            texts = [f"a photo of a {label}" for label in dict.fromkeys(map(str, labels))]
        tuned = bool(store.metadata(max_age=REMEMBERED).get(META, {}).get("relevance"))
        return {"student": student.model_name, "hits": hits, "examples": texts[:TRIED], "tuned": tuned}

    def labels(self, collection: str) -> list[dict[str, Any]]:
        """What detectors found, the most frequent first."""
        store = self._store(collection)
        self._student(store)
        return [{"label": k, "count": n} for k, n in store.facet("labels", 50)]

    def thumbnail(self, collection: str, point: str) -> bytes:
        """A picture of the collection as a small JPEG. The path comes from the collection, never from the
        request, and is only ever opened as a picture."""
        store = self._store(collection)
        self._student(store)
        try:
            uuid.UUID(point)
        except ValueError:
            raise Refused(404, f"no point {point[:60]!r}") from None
        payload = store.payloads([point], ["uri", "key", "content_hash"]).get(point)
        if not payload or not payload.get("uri") or not payload.get("content_hash"):
            raise Refused(404, "no picture that can be shown")
        try:
            path = self._path_of(str(payload["uri"]), str(payload.get("key") or ""))
        except (OSError, ValueError):  # a name that no disk holds
            raise Refused(404, "no picture that can be shown") from None
        try:
            data = images.read(path)
            if images.content_hash(data) != payload["content_hash"]:
                raise Refused(404, "changed since it was ingested")
            image = images.open_rgb(data, path, max_pixels=self._engine.limits.picture_pixels)
        except ImageError:
            raise Refused(404, "the picture isn't where it was ingested from") from None
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=85)
        return out.getvalue()

    def _path_of(self, uri: str, key: str) -> Path:
        """Where a picture lies: at its uri, or at its uri or key below a folder of --pictures, for relative
        uris and folders that moved. Whether it is the same picture, its hash tells."""
        remote = "://" in uri
        if self._roots is None:
            if remote:
                raise Refused(404, "no picture that can be shown")
            return Path(uri)
        places = [] if remote else [Path(uri)]
        for root in self._roots:
            names = [key] if remote or Path(uri).is_absolute() else [uri, key]
            places += [root / name for name in names if name and not Path(name).is_absolute()]
        allowed = [p for p in places if any(p.resolve().is_relative_to(root) for root in self._roots)]
        if not allowed:
            raise Refused(404, "outside the folders of --pictures")
        return next((p for p in allowed if p.is_file()), allowed[0])

    def close(self) -> None:
        for store in self._stores.values():
            store.close()
        self._place.close()


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A hit without its whole payload: a server's may be somebody else's."""
    return {key: value for key, value in row.items() if key != "payload"}


def _check_texts(name: str, value: Any, expected: str) -> None:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise Refused(400, f"{name}: expected a list of {expected}")
