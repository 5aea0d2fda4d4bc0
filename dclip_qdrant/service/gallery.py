"""What the search page asks: collections that a loaded student filled, hits, thumbnails."""

import io
import time
import uuid
from pathlib import Path
from typing import Any

from PIL import Image

from dclip_qdrant.errors import DclipError, ImageError, calling_parameters
from dclip_qdrant.pictures import images
from dclip_qdrant.service.engine import Engine
from dclip_qdrant.service.inputs import image_input, picture, text_input
from dclip_qdrant.service.limits import Refused
from dclip_qdrant.serving.collection import META
from dclip_qdrant.serving.search import MODES, search
from dclip_qdrant.serving.stores import Place, Store
from dclip_qdrant.serving.student import Student

THUMBNAIL = 480  # pixels of the longer side
SHOWN = 100  # hits at most


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
        """{"collection", "text" or "image" (base64), "mode", "filters": [...], "limit"} -> hits with the
        region that matched."""
        if not isinstance(body, dict) or not isinstance(body.get("collection"), str):
            raise Refused(400, "collection: missing")
        store = self._store(body["collection"])
        student = self._student(store)
        mode, limit, filters = body.get("mode", "dense"), body.get("limit", 24), body.get("filters", [])
        if mode not in MODES:
            raise Refused(400, f"mode: expected one of {', '.join(MODES)}")
        if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= SHOWN:
            raise Refused(400, f"limit: expected 1 to {SHOWN}")
        if not isinstance(filters, list) or not all(isinstance(f, str) for f in filters):
            raise Refused(400, "filters: expected a list of conditions, e.g. labels=dog")
        asks_text = body.get("text") is not None
        if asks_text == (body.get("image") is not None):
            raise Refused(400, "expected a text or an image")
        began, limits = time.perf_counter(), self._engine.limits
        query: dict[str, Any]
        if asks_text:
            query = {"text": text_input(body["text"], "", "text", limits).data}
        else:
            query = {"image": picture(image_input(body["image"], "", "image", limits), limits)}
        with calling_parameters({"where": "filters"}):
            hits = search(store, student, mode=mode, where=filters, limit=limit, **query)
        return {
            "student": student.model_name,
            "milliseconds": round((time.perf_counter() - began) * 1000, 1),
            # a server's payload may be somebody else's: the page gets what it shows
            "hits": [{k: v for k, v in h.row().items() if k != "payload"} for h in hits],
        }

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
        payload = store.payloads([point], ["uri", "content_hash"]).get(point)
        uri = (payload or {}).get("uri") or ""
        if not payload or not uri or "://" in uri:
            raise Refused(404, "no picture that can be shown")
        path = Path(uri)
        if self._roots is not None and not any(path.resolve().is_relative_to(r) for r in self._roots):
            raise Refused(404, "outside the folders of --pictures")
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

    def close(self) -> None:
        for store in self._stores.values():
            store.close()
        self._place.close()
