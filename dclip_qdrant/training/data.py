"""Training data in one worker: captions and cached vectors as arrays, pictures memory-mapped or read from
where they are.

A `Cache` holds a whole split (the exact reader, `training/reading.py`) or one batch (the streamed reader,
`training/streaming.py`).
Memory: vectors are held as float16, 2 bytes x width x (captions + views) a picture: 0.35 GB for 67,500
pictures of 5 captions at width 512; once a node where there are several workers (node_cache.py).
"""

import tempfile
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from upath import UPath

from dclip_qdrant.errors import InputError
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.pictures import images
from dclip_qdrant.tables import storage
from dclip_qdrant.tables.contracts import FEATURES, TEACHER_CACHE
from dclip_qdrant.tables.stages import matrix, nested, parts


class Pictures:
    """The pictures of one split by index.

    Those inside Parquet are copied once a node into an uncompressed Arrow file and memory-mapped.
    """

    def __init__(self, pairs: Pairs, split: str, rows: np.ndarray | None = None) -> None:
        """`rows`: positions within the split, ascending; None for all."""
        self._pairs, self._split = pairs, split
        table = pairs.table(["key", "uri"], (split,), rows=rows)
        self.keys: list[str] = table["key"].to_pylist()
        self.uris: list[str] = table["uri"].to_pylist()
        self._rows = list(range(len(self.keys))) if rows is None else rows.tolist()  # of the mapped column

    @cached_property
    def _mapped(self) -> pa.ChunkedArray | None:
        """Pictures that stand in the pairs themselves; made when the first one is asked for."""
        return _map_pictures(self._pairs, self._split) if self._pairs.hold_pictures() else None

    def keep(self, rows: list[int]) -> None:
        """Leaves out all but these rows."""
        self.keys = [self.keys[i] for i in rows]
        self.uris = [self.uris[i] for i in rows]
        self._rows = [self._rows[i] for i in rows]

    def __len__(self) -> int:
        return len(self.keys)

    def load(self, i: int) -> Image.Image:
        value = self._mapped[self._rows[i]].as_py() if self._mapped is not None else None
        data = value if value is not None else images.read(self.uris[i])
        return images.open_rgb(data, self.uris[i])


def _map_pictures(pairs: Pairs, split: str) -> pa.ChunkedArray:
    """The `image` column of a split, memory-mapped."""
    path = Path(tempfile.gettempdir()) / f"dclip-{pairs.fingerprint[:16]}-{split}.arrow"
    if not path.exists():
        schema = pa.schema([("image", pa.large_binary())])
        with storage.writing(path) as sink, pa.ipc.new_file(sink, schema) as writer:
            for rows in pairs.rows(["image"], (split,), batch=256):
                column = pa.array([r["image"] for r in rows], pa.large_binary())
                writer.write_batch(pa.record_batch([column], schema=schema))
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()["image"]


MaybeArray = Any  # an array, or None where the run doesn't read it


@dataclass
class Cache:
    """Cached vectors of one split in the order of `keys`: V views, D the teacher's width, F the trunk's."""

    keys: list[str]
    crop: np.ndarray  # [N, V, 4]
    flip: np.ndarray  # [N, V]
    trunk: np.ndarray  # [N, V, F] float16, F = 0 when the trunk learns
    image: MaybeArray = None  # [N, V, D] the base model's feature
    regions: MaybeArray = None  # [N, R, D] float16, zero where there is none
    region_mask: MaybeArray = None  # [N, R]
    region_boxes: MaybeArray = None  # [N, R, 4]
    region_trunk: MaybeArray = None  # [N, R, F]
    texts: MaybeArray = None  # [T, D] float16, all captions in order
    text_trunk: MaybeArray = None  # [T, W] the student's features of them below its projection; W = 0: none
    first: MaybeArray = None  # [N + 1] where each picture's captions begin in `texts`
    # [N, V, C, D] float16 (C = 1: the same for all captions), zero beyond a picture's captions
    teacher: MaybeArray = None
    others: tuple["Cache", ...] = ()  # further teachers' image and texts, of the same views

    @property
    def views(self) -> int:
        return self.crop.shape[1]


REGION_COLUMNS = ("regions", "region_boxes", "region_trunk")
TEXT_COLUMNS = ("texts", "text_trunk")
Allocate = Callable[[str, tuple[int, ...], Any], np.ndarray]  # name, shape, dtype -> zeros


def in_memory(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros of this process alone."""
    return np.zeros(shape, dtype)


def load_cache(
    keys: list[str],
    captions: list[int],
    features: UPath,
    teacher: UPath | None = None,
    *,
    need: tuple[str, ...] = ("regions", "texts"),
    allocate: Allocate = in_memory,
) -> Cache:
    """Reads the features stage (and the teacher's) for these pictures, part by part into arrays that
    `allocate` gives; `captions` is how many each has.

    Raises:
        InputError: a picture that the cache doesn't have.
    """
    return build_cache(
        keys,
        captions,
        lambda columns: parts(features, FEATURES, columns),
        None if teacher is None else (lambda columns: parts(teacher, TEACHER_CACHE, columns)),
        where=features,
        need=need,
        allocate=allocate,
    )


Tables = Callable[[list[str]], Iterable[pa.Table]]  # columns -> tables of these columns, read anew each time


def build_cache(
    keys: list[str],
    captions: list[int],
    features: Tables,
    teacher: Tables | None,
    *,
    where: object,
    need: tuple[str, ...],
    regions: int = 0,
    allocate: Allocate = in_memory,
) -> Cache:
    """The cache of these pictures from tables in the features contract (and in the teacher's), with room for
    at least `regions` regions a picture.

    Raises:
        InputError: a picture that the tables don't have.
    """
    row_of = {key: i for i, key in enumerate(keys)}
    first = np.concatenate([[0], np.cumsum(captions)]).astype(np.int64)
    sizes = _sizes(features, row_of, regions=bool(set(need) & set(REGION_COLUMNS)))
    n = len(keys)
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("crop", "trunk", "image"), (n, sizes.views)),
        **dict.fromkeys(TEXT_COLUMNS, (int(first[-1]),)),
        **dict.fromkeys(REGION_COLUMNS, (n, max(sizes.regions, regions, 1))),
    }
    arrays: dict[str, Any] = {}

    def array(name: str, width: int) -> np.ndarray:
        """The column's array [..., width], made when its width is known; 0 wide until a part has any."""
        have = arrays.get(name)
        if have is None or have.shape[-1] < width:
            kind = np.float32 if name in ("crop", "region_boxes") else np.float16
            make = allocate if width else in_memory
            arrays[name] = make(name, (*shapes[name], width), kind)
        return arrays[name]

    flip = allocate("flip", (n, sizes.views), bool)
    region_mask = allocate("region_mask", shapes["regions"], bool) if "regions" in need else None
    filled = np.zeros(n, bool)
    for table in features(["key", "view", "crop", "flip", "trunk", "image", *need]):
        own = [i for i, key in enumerate(table["key"].to_pylist()) if key in row_of]
        if not own:
            continue
        table = table.take(own)
        rows = np.array([row_of[key] for key in table["key"].to_pylist()])
        view = np.asarray(table["view"])
        for name in ("crop", "trunk", "image"):
            values = matrix(table[name])
            array(name, values.shape[1])[rows, view] = values
        flip[rows, view] = np.asarray(table["flip"])
        filled[rows[view == 0]] = True
        for name in need:
            values, counts = nested(table[name])
            target = array(name, values.shape[1])
            if not values.shape[1]:
                continue
            starts = np.concatenate([[0], np.cumsum(counts)])
            for j in np.flatnonzero(view == 0):
                vectors, row = values[starts[j] : starts[j + 1]], rows[j]
                if name in TEXT_COLUMNS:
                    target[first[row] : first[row + 1]] = vectors
                elif len(vectors):
                    target[row, : len(vectors)] = vectors
                    if name == "regions" and region_mask is not None:
                        region_mask[row, : len(vectors)] = True
    if not filled.all():
        lost = keys[int(np.argmin(filled))]
        do = "run it again with `from_scratch`"
        raise InputError(where, f"no features of {lost!r}", "every picture of the split", do)
    for name, like in (("regions", "image"), ("region_trunk", "trunk")):
        if regions and name in arrays and not arrays[name].shape[-1]:  # no picture of this batch has any
            array(name, arrays[like].shape[-1])
    return Cache(
        keys=keys,
        flip=flip,
        first=first,
        region_mask=region_mask,
        teacher=_load_teacher(teacher, row_of, sizes.views, max(captions), allocate) if teacher else None,
        **arrays,
    )


@dataclass(frozen=True)
class Sizes:
    views: int
    regions: int  # of the picture that has most


def _sizes(features: Tables, row_of: dict[str, int], *, regions: bool) -> Sizes:
    """How large the arrays must be, from two narrow columns."""
    views = most = 0
    for table in features(["key", "view", *(("region_boxes",) if regions else ())]):
        views = max(views, 1 + max(table["view"].to_pylist(), default=-1))
        if regions:
            own = np.array([key in row_of for key in table["key"].to_pylist()], bool)
            _, counts = nested(table["region_boxes"])
            most = max(most, int(counts[own].max(initial=0)))
    return Sizes(views, most)


def _load_teacher(
    teacher: Tables, row_of: dict[str, int], views: int, most_captions: int, allocate: Allocate
) -> np.ndarray | None:
    """[N, V, C, D] float16 from the teacher cache, zero beyond a picture's captions; None where it has
    none."""
    out: np.ndarray | None = None
    for table in teacher(["key", "view", "teacher_image"]):
        values, counts = nested(table["teacher_image"])
        starts = np.concatenate([[0], np.cumsum(counts)])
        keys, view_numbers = table["key"].to_pylist(), table["view"].to_pylist()
        for j, (key, view) in enumerate(zip(keys, view_numbers, strict=True)):
            if key not in row_of:
                continue
            if out is None:
                width = 1 if counts.max() == 1 else most_captions
                out = allocate("teacher", (len(row_of), views, width, values.shape[1]), np.float16)
            vectors = values[starts[j] : starts[j + 1]]
            out[row_of[key], view, : len(vectors)] = vectors
    return out


def draw(
    seed: int, epoch: int, picture: int, views: int, captions: int, wanted: int
) -> tuple[int, np.ndarray]:
    """The view and the captions [wanted] of a picture in an epoch; a picture with fewer captions repeats
    some."""
    rng = np.random.default_rng([seed, epoch, picture])
    view = int(rng.integers(views))
    return view, rng.choice(captions, wanted, replace=captions < wanted)


def view_box(rng: np.random.Generator, scale: float) -> tuple[float, float, float, float]:
    """A random crop as parts of width and height: area in scale..1, the picture's own shape up to a factor
    4:5."""
    area, ratio = rng.uniform(scale, 1.0), np.exp(rng.uniform(np.log(0.8), np.log(1.25)))
    w, h = min(1.0, (area * ratio) ** 0.5), min(1.0, (area / ratio) ** 0.5)
    x, y = rng.uniform(0, 1 - w), rng.uniform(0, 1 - h)
    return x, y, x + w, y + h


def apply_view(image: Image.Image, crop: np.ndarray, flip: bool) -> Image.Image:
    x0, y0, x1, y1 = (float(v) for v in crop)
    if (x0, y0, x1, y1) != (0.0, 0.0, 1.0, 1.0):
        left, top = int(x0 * image.width), int(y0 * image.height)
        image = image.crop(
            (left, top, max(left + 1, round(x1 * image.width)), max(top + 1, round(y1 * image.height)))
        )
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


def in_view(boxes: np.ndarray, crop: np.ndarray, flip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [N, 4] of whole pictures as parts of their views `crop` [N, 4] (mirrored where `flip` [N]) and
    how much of each box the view shows [N].

    All are x0, y0, x1, y1 as parts of width and height.
    """
    origin, size = np.tile(crop[:, :2], 2), np.tile(crop[:, 2:] - crop[:, :2], 2)
    free = (boxes - origin) / np.maximum(size, 1e-6)
    cut = free.clip(0, 1)
    area = lambda b: np.maximum(b[:, 2] - b[:, 0], 0) * np.maximum(b[:, 3] - b[:, 1], 0)
    part = area(cut) / np.maximum(area(free), 1e-9)
    mirrored = np.stack([1 - cut[:, 2], cut[:, 1], 1 - cut[:, 0], cut[:, 3]], 1)
    return np.where(np.asarray(flip, bool)[:, None], mirrored, cut).astype(np.float32), part


class Decoded:
    """Pictures that were decoded before, as pixels [S, S, 3] uint8 or as what a resting part of a model made
    of those; they stay in memory up to `limit` bytes, beyond it they are made each time anew."""

    def __init__(
        self, limit: int, pool: ThreadPoolExecutor, then: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> None:
        """`then`: pixels [B, S, S, 3] -> what is kept of them [B, ...]."""
        self._left, self._pool, self.then = limit, pool, then
        self._kept: dict[Hashable, np.ndarray] = {}

    def __call__(self, keys: Sequence[Hashable], make: Callable[[int], np.ndarray]) -> np.ndarray:
        """[len(keys), ...]; `make(j)` decodes what `keys[j]` stands for, on threads."""
        missing = [j for j, k in enumerate(keys) if k not in self._kept]
        made = self._made(missing, make)
        out = np.stack([made[j] if j in made else self._kept[k] for j, k in enumerate(keys)])
        for j, value in made.items():
            if value.nbytes <= self._left and keys[j] not in self._kept:
                self._kept[keys[j]], self._left = value, self._left - value.nbytes
        return out

    def _made(self, missing: list[int], make: Callable[[int], np.ndarray]) -> dict[int, np.ndarray]:
        pixels = list(self._pool.map(make, missing))
        if self.then is None or not pixels:
            return dict(zip(missing, pixels, strict=True))
        # copies: a row of the whole would keep all of it in memory
        return {j: row.copy() for j, row in zip(missing, self.then(np.stack(pixels)), strict=True)}
