"""Items -> points: decode, find regions, embed. The same for the command line, Ray, reindexing and guests."""

import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
from PIL import Image

from dclip_qdrant.detectors import Detector
from dclip_qdrant.errors import ImageError
from dclip_qdrant.pictures import images
from dclip_qdrant.pictures.regions import CONTEXT, Regions
from dclip_qdrant.serving.items import Item, Payload
from dclip_qdrant.serving.stores import Point
from dclip_qdrant.serving.student import TOP_K, Student

Layout = Literal["flat", "langchain"]
Prepared = tuple[Item, list[np.ndarray]]  # a picture and its pixels: [S, S, 3] of itself and each region

SETTLED = 2.0  # seconds since a file was written; file systems keep times to two
PIXELS_TOGETHER = 64_000_000  # that are decoded at once: 192 MB, and what decoders need beside it
SEEN = ("width", "height", "boxes", "scores", "labels")  # of a payload: what the picture itself shows


class Embedder:
    """What happens to a batch of pictures between a source and a collection.

    `detector` finds regions, or `regions` has them already, by the picture's key; `top_k` of them are kept.
    """

    def __init__(
        self,
        student: Student,
        *,
        detector: Detector | None = None,
        regions: Mapping[str, Regions] | None = None,
        top_k: int = TOP_K,
        context: float = CONTEXT,
        threads: int | None = None,
        layout: Layout = "flat",
        max_pixels: int | None = None,
        verify: bool = False,
    ) -> None:
        """`max_pixels`: of a picture; larger ones are rejected. None: images.MAX_PIXELS. `verify`: reads also
        files whose size and time are those that are stored."""
        self.student = student
        self.verify = verify
        self.max_pixels = images.allow(max_pixels)
        self.detector = detector
        self.regions = regions
        self.top_k = top_k
        self.context = context
        self.layout = layout
        self.pool = ThreadPoolExecutor(threads or max(2, os.cpu_count() or 2))

    @property
    def regions_from(self) -> str | None:
        """Names where regions come from: a picture whose point says something else is embedded again."""
        if self.detector is not None:
            return f"{self.detector.fingerprint}/{self.top_k}/{self.context}"
        return f"file/{self.top_k}/{self.context}" if self.regions is not None else None

    def read(self, items: Sequence[Item], stored: Mapping[str, Payload] | None = None) -> list[Item]:
        """Fills in bytes and hashes, on threads; items that can't be read get their `error`. A file whose
        size and time are those that are `stored` (payloads by id) isn't read: its hash is the stored one."""
        known = {} if self.verify or stored is None else stored
        return list(self.pool.map(lambda item: _read(item, known.get(item.id)), items))

    def prepare(self, items: Sequence[Item]) -> list[Prepared]:
        """Everything that comes before the student's image tower: decodes, finds regions, resizes. Items
        that fail get their `error` and are left out."""
        unread = [item for item in items if not item.data]
        if unread:  # the same file with other words or another detector
            self.read(unread)
        there = [item for item in items if item.error is None]
        return [prepared for some in _by_pixels(there) for prepared in self._prepare(some)]

    def _prepare(self, items: Sequence[Item]) -> list[Prepared]:
        decoded = [
            (item, image)
            for item, image in zip(items, self.pool.map(self._decode, items), strict=True)
            if image is not None
        ]
        if self.detector is not None and decoded:
            every_region = self.detector([image for _, image in decoded])
            for (item, _), regions in zip(decoded, every_region, strict=True):
                item.regions = regions.top(self.top_k)
        elif self.regions is not None:
            for item, _ in decoded:
                item.regions = self.regions.get(item.picture.key, Regions()).top(self.top_k)

        def pixels(pair: tuple[Item, Image.Image]) -> Prepared:
            item, image = pair
            return item, self.student.region_pixels(image, item.regions, context=self.context)

        return list(self.pool.map(pixels, decoded))

    def forward(self, prepared: Sequence[Prepared]) -> list[Point]:
        """The points of pictures that are prepared."""
        if not prepared:
            return []
        vectors = self.student.embed_pixels(p for _, pixels in prepared for p in pixels)
        counts = [len(pixels) for _, pixels in prepared]
        of_picture = np.split(vectors, np.cumsum(counts)[:-1])
        return [
            Point(item.id, own[0], own, self._payload(item))
            for (item, _), own in zip(prepared, of_picture, strict=True)
        ]

    def _decode(self, item: Item) -> Image.Image | None:
        try:
            image = images.open_rgb(item.data, item.picture.uri, max_pixels=self.max_pixels)
        except ImageError as e:
            item.error = e
            return None
        item.size, item.data = image.size, b""
        return image

    def _payload(self, item: Item) -> Payload:
        if item.carried is not None:
            return item.carried | {"student": self.student.model_name}
        seen = {"width": item.size[0], "height": item.size[1], **item.regions.row()}
        return self.payload_of(item, seen)

    def payload_of(self, item: Item, seen: Payload) -> Payload:
        """What is stored beside the vectors: what the source says of a picture, and what was `seen` in it
        (SEEN), now or when it was embedded."""
        own: Payload = {
            "key": item.key,
            "uri": item.picture.uri,
            "content_hash": item.content_hash,
            "caption": item.caption,
            **{name: seen.get(name) for name in SEEN},
            "detector": self.regions_from,
            "student": self.student.model_name,
        }
        if item.picture.split:
            own["split"] = item.picture.split
        if item.file_state:
            own["file_state"] = item.file_state
        extra = item.picture.extra
        if self.layout == "langchain":  # what its QdrantVectorStore reads, beside what our own search reads
            metadata = {name: own[name] for name in ("key", "uri", "labels", "width", "height")}
            own |= {"page_content": item.caption, "metadata": metadata | extra}
        return {(f"source_{name}" if name in own else name): value for name, value in extra.items()} | own


def _read(item: Item, stored: Payload | None = None) -> Item:
    if not item.pending:
        return item
    picture = item.picture
    try:
        if picture.image is not None:
            item.data = picture.image
        else:
            item.file_state = file_state(picture.uri)
            if item.file_state and stored and _is_stored(item, stored):
                item.content_hash = stored["content_hash"]
                return item
            item.data = images.read(picture.uri)
        item.content_hash = images.content_hash(item.data)
    except ImageError as e:
        item.error = e
    return item


def _is_stored(item: Item, stored: Payload) -> bool:
    same_file = (stored.get("uri"), stored.get("file_state")) == (item.picture.uri, item.file_state)
    return same_file and bool(stored.get("content_hash"))


def file_state(uri: str) -> str:
    """Size and time of a file of this machine; "" for others, and for one that was written a moment ago: it
    could be written again without looking any different."""
    try:
        state = os.stat(uri)
    except (OSError, ValueError):
        return ""
    if not stat.S_ISREG(state.st_mode) or time.time() - state.st_mtime < SETTLED:
        return ""
    return f"{state.st_size}/{state.st_mtime_ns}"


def _by_pixels(items: Sequence[Item]) -> Iterator[list[Item]]:
    """The items in groups that may be decoded together: memory follows from PIXELS_TOGETHER, not from how
    many photos there are or how large."""
    group: list[Item] = []
    count = 0
    for item in items:
        own = images.pixels(item.data)
        if group and count + own > PIXELS_TOGETHER:
            yield group
            group, count = [], 0
        group.append(item)
        count += own
    if group:
        yield group
