"""Training data in one worker: captions and cached vectors in memory, pictures memory-mapped or read from where they are.

Ray Data makes the caches (regions, features, teacher vectors); training then reads them by index, not as a stream. That is what makes a resumed run
exact and any number of workers see the same batches (`training/loop.py`).
Memory: vectors are held as float16, 2 bytes x width x (captions + views) a picture: 0.35 GB for 67,500 pictures of 5 captions at width 512.
"""

import os
import tempfile
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from upath import UPath

from dclip_qdrant import images
from dclip_qdrant.contracts import FEATURES, TEACHER_CACHE
from dclip_qdrant.errors import InputError
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.stages import matrix, nested, parts


class Pictures:
    """The pictures of one split by index. Those inside Parquet are copied once a node into an uncompressed Arrow file and memory-mapped."""

    def __init__(self, pairs: Pairs, split: str) -> None:
        table = pairs.table(["key", "uri"], (split,))
        self.keys: list[str] = table["key"].to_pylist()
        self.uris: list[str] = table["uri"].to_pylist()
        self._mapped = self._map(pairs, split)

    def _map(self, pairs: Pairs, split: str) -> pa.ChunkedArray | None:
        path = Path(tempfile.gettempdir()) / f"dclip-{pairs.fingerprint[:16]}-{split}.arrow"
        if not path.exists():
            schema, inside = pa.schema([("image", pa.large_binary())]), 0
            part = path.with_suffix(f".{os.getpid()}.partial")
            with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                for rows in pairs.rows(["image"], (split,), batch=256):
                    inside += sum(r["image"] is not None for r in rows)
                    writer.write_batch(pa.record_batch([pa.array([r["image"] for r in rows], pa.large_binary())], schema=schema))
            part.rename(path) if inside else part.unlink()
            if not inside:
                return None
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()["image"]

    def __len__(self) -> int:
        return len(self.keys)

    def load(self, i: int) -> Image.Image:
        value = self._mapped[i].as_py() if self._mapped is not None else None
        return images.open_rgb(value if value is not None else images.read(self.uris[i]), self.uris[i])


@dataclass
class Cache:
    """Cached vectors of one split in the order of `keys`: V views, D the teacher's width, F the trunk's."""

    keys: list[str]
    crop: np.ndarray  # [N, V, 4]
    flip: np.ndarray  # [N, V]
    trunk: np.ndarray  # [N, V, F] float16, F = 0 when the trunk learns
    image: np.ndarray | None = None  # [N, V, D] the base model's feature
    regions: np.ndarray | None = None  # [N, R, D] float16, zero where there is none
    region_mask: np.ndarray | None = None  # [N, R]
    region_boxes: np.ndarray | None = None  # [N, R, 4]
    region_trunk: np.ndarray | None = None  # [N, R, F]
    texts: np.ndarray | None = None  # [T, D] float16, all captions in order
    first: np.ndarray | None = None  # [N + 1] where each picture's captions begin in `texts`
    teacher: np.ndarray | None = None  # [N, V, C, D] float16 (C = 1: the same for all captions), zero beyond a picture's captions
    others: tuple["Cache", ...] = ()  # further teachers' image and texts, of the same views

    @property
    def views(self) -> int:
        return self.crop.shape[1]


def load_cache(
    keys: list[str], captions: list[int], features: UPath, teacher: UPath | None = None, *, need: tuple[str, ...] = ("regions", "texts")
) -> Cache:
    """Reads the features stage (and the teacher's) for these pictures; `captions` is how many each has.

    Raises:
        InputError: a picture that the cache doesn't have.
    """
    at = {k: i for i, k in enumerate(keys)}
    first = np.concatenate([[0], np.cumsum(captions)]).astype(np.int64)
    out: dict[str, np.ndarray] = {}
    filled = np.zeros(len(keys), bool)
    view_count = 0
    tables = list(parts(features, FEATURES, ["key", "view", "crop", "flip", "trunk", "image", *need]))
    for table in tables:
        view_count = max(view_count, max(table["view"].to_pylist(), default=0) + 1)
    for table in tables:
        mine = [i for i, k in enumerate(table["key"].to_pylist()) if k in at]
        if not mine:
            continue
        table = table.take(mine)
        n = np.array([at[k] for k in table["key"].to_pylist()])
        v = np.asarray(table["view"])
        for name in ("crop", "trunk", "image"):
            values = matrix(table[name])
            if name not in out:
                out[name] = np.zeros((len(keys), view_count, values.shape[1]), np.float32 if name == "crop" else np.float16)
            out[name][n, v] = values
        out.setdefault("flip", np.zeros((len(keys), view_count), bool))[n, v] = np.asarray(table["flip"])
        filled[n[v == 0]] = True
        for name in need:
            values, counts = nested(table[name])
            starts = np.concatenate([[0], np.cumsum(counts)])
            for j in np.flatnonzero(v == 0):
                rows = values[starts[j] : starts[j + 1]]
                if name == "texts":
                    out.setdefault("texts", np.zeros((first[-1], values.shape[1]), np.float16))[first[n[j]] : first[n[j] + 1]] = rows
                else:
                    out.setdefault(name, np.empty(len(keys), object))[n[j]] = rows.astype(
                        np.float32 if name == "region_boxes" else np.float16
                    )
    if not filled.all():
        raise InputError(
            features, f"no features of {keys[int(np.argmin(filled))]!r}", "every picture of the split", "submit again with --from-scratch"
        )
    cache = Cache(keys, out["crop"], out["flip"], out["trunk"], out["image"], texts=out.get("texts"), first=first)
    for name in ("regions", "region_boxes", "region_trunk"):
        if name in out:
            most, width = max(max(len(r) for r in out[name]), 1), max(r.shape[-1] for r in out[name])
            padded = np.zeros((len(keys), most, width), out[name][0].dtype)
            mask = np.zeros((len(keys), most), bool)
            for i, rows in enumerate(out[name]):
                if len(rows):
                    padded[i, : len(rows)], mask[i, : len(rows)] = rows, True
            setattr(cache, name, padded)
            if name == "regions":
                cache.region_mask = mask
    if teacher is not None:
        for table in parts(teacher, TEACHER_CACHE, ["key", "view", "teacher_image"]):
            values, counts = nested(table["teacher_image"])
            starts = np.concatenate([[0], np.cumsum(counts)])
            for j, (key, view) in enumerate(zip(table["key"].to_pylist(), table["view"].to_pylist(), strict=True)):
                if key not in at:
                    continue
                if cache.teacher is None:
                    width = 1 if counts.max() == 1 else max(captions)
                    cache.teacher = np.zeros((len(keys), view_count, width, values.shape[1]), np.float16)
                rows = values[starts[j] : starts[j + 1]]
                cache.teacher[at[key], view, : len(rows)] = rows
    return cache


def draw(seed: int, epoch: int, picture: int, views: int, captions: int, wanted: int) -> tuple[int, np.ndarray]:
    """The view and the captions [wanted] of a picture in an epoch; a picture with fewer captions repeats some."""
    rng = np.random.default_rng([seed, epoch, picture])
    view = int(rng.integers(views))
    return view, rng.choice(captions, wanted, replace=captions < wanted)


def view_box(rng: np.random.Generator, scale: float) -> tuple[float, float, float, float]:
    """A random crop as parts of width and height: area in scale..1, the picture's own shape up to a factor 4:5."""
    area, ratio = rng.uniform(scale, 1.0), np.exp(rng.uniform(np.log(0.8), np.log(1.25)))
    w, h = min(1.0, (area * ratio) ** 0.5), min(1.0, (area / ratio) ** 0.5)
    x, y = rng.uniform(0, 1 - w), rng.uniform(0, 1 - h)
    return x, y, x + w, y + h


def apply_view(image: Image.Image, crop: np.ndarray, flip: bool) -> Image.Image:
    x0, y0, x1, y1 = (float(v) for v in crop)
    if (x0, y0, x1, y1) != (0.0, 0.0, 1.0, 1.0):
        left, top = int(x0 * image.width), int(y0 * image.height)
        image = image.crop((left, top, max(left + 1, round(x1 * image.width)), max(top + 1, round(y1 * image.height))))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


def in_view(boxes: np.ndarray, crop: np.ndarray, flip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [N, 4] of whole pictures as parts of their views `crop` [N, 4] (mirrored where `flip` [N]) and how much of each box the view shows [N].

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
    """Pixels [S, S, 3] uint8 that were decoded before; they stay in memory up to `limit` bytes, beyond it pictures are decoded each time anew."""

    def __init__(self, limit: int, pool: ThreadPoolExecutor) -> None:
        self._left, self._pool = limit, pool
        self._kept: dict[Hashable, np.ndarray] = {}

    def __call__(self, keys: Sequence[Hashable], make: Callable[[int], np.ndarray]) -> np.ndarray:
        """[len(keys), S, S, 3]; `make(j)` decodes what `keys[j]` stands for, on threads."""
        missing = [j for j, k in enumerate(keys) if k not in self._kept]
        made = dict(zip(missing, self._pool.map(make, missing), strict=True))
        out = np.stack([made[j] if j in made else self._kept[k] for j, k in enumerate(keys)])
        for j, pixels in made.items():
            if pixels.nbytes <= self._left and keys[j] not in self._kept:
                self._kept[keys[j]], self._left = pixels, self._left - pixels.nbytes
        return out
