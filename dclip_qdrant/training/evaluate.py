"""Figures of a TwoTower while it is in memory. The same figures of an exported student come from
`evaluation.py`, through onnxruntime."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image

from dclip_qdrant import metrics
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.pairs.labelled import Labelled
from dclip_qdrant.pictures.preprocess import Preprocess
from dclip_qdrant.training.data import TEXT_COLUMNS, Decoded, Pictures, load_cache
from dclip_qdrant.training.models.bottom import FORWARD, Bottom
from dclip_qdrant.training.models.two_tower import TwoTower

BATCH = 64  # pictures that are decoded together
KEPT_BYTES = 512 << 20  # decoded pictures of an evaluation set stay in memory up to this


class PictureSet:
    """Pictures 0..n-1 as a model's pixels; a small set is decoded once and kept (WiSE-FT evaluates it for
    every alpha)."""

    def __init__(self, load: Callable[[int], Image.Image], n: int) -> None:
        self._load, self.n = load, n
        self._decoded = Decoded(KEPT_BYTES, ThreadPoolExecutor(max(2, os.cpu_count() or 2)))
        self._below: tuple[str, np.ndarray] | None = None  # what whose resting part saw

    def batches(self, preprocess: Preprocess) -> Iterator[np.ndarray]:
        """[B, S, S, 3] uint8, in order; the next batch is decoded while this one is used."""
        with ThreadPoolExecutor(1) as ahead:
            todo = [range(s, min(s + BATCH, self.n)) for s in range(0, self.n, BATCH)]
            if not todo:
                return
            read = lambda some: self._decoded(
                [(preprocess, i) for i in some], lambda j: preprocess.pixels(self._load(some[j]))
            )
            coming = ahead.submit(read, todo[0])
            for following in [*todo[1:], None]:
                batch = coming.result()
                if following is not None:
                    coming = ahead.submit(read, following)
                yield batch

    def below(self, bottom: Bottom, preprocess: Preprocess, device: str) -> Iterator[np.ndarray]:
        """[B, C, h, w] of what a resting part of a trunk sees of them, in order; kept, as pixels are, for the
        next weights above it."""
        mark = bottom.mark()
        if self._below is None or self._below[0] != mark:
            self._below = None
            seen: list[np.ndarray] = []
            for pixels in self.batches(preprocess):
                maps = bottom.of_pixels(pixels, device)
                if sum(m.nbytes for m in seen) + maps.nbytes <= KEPT_BYTES:
                    seen.append(maps)
                yield maps
            if sum(map(len, seen)) == self.n and seen:
                self._below = (mark, np.concatenate(seen))
            return
        for start in range(0, self.n, BATCH):
            yield self._below[1][start : start + BATCH]


def spread(count: int, most: int | None = None) -> np.ndarray:
    """Positions of no more than `most` of `count` pictures, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(most or count, count)).astype(int))


class EvalSet:
    """A split of pairs, ready to be evaluated again and again: what the towers' frozen parts say of it is
    computed once."""

    def __init__(
        self,
        pairs: Pairs,
        split: str,
        features: Any | None,
        device: str = "cpu",
        *,
        most: int | None = None,
        half: int | None = None,
    ) -> None:
        """`most`: no more pictures than these, evenly spread over the split. `half`: 0 for every other
        picture from the first on, 1 for the rest."""
        rows = spread(pairs.splits().get(split, 0), most)
        if half is not None:
            rows = rows[half::2]
        pictures = Pictures(pairs, split, rows)
        captions = pairs.table(["captions"], (split,), rows=rows)
        self.captions: list[list[str]] = captions["captions"].to_pylist()
        self.owner = np.repeat(np.arange(len(self.captions)), [len(c) for c in self.captions])
        self.cache = (
            load_cache(pictures.keys, [len(c) for c in self.captions], features, need=TEXT_COLUMNS)
            if features is not None
            else None
        )
        self.decoded = PictureSet(pictures.load, len(rows))
        self.device = device

    def vectors(
        self,
        model: TwoTower,
        *,
        cached_text: bool = False,
        text_map: np.ndarray | None = None,
        cached_trunks: bool = True,
    ) -> tuple[np.ndarray, np.ndarray]:
        """image [N, D] and text [M, D], unit rows.

        `cached_text`: the text tower is as the base's was when features were made, but for `text_map` [D, D]
        behind it. `cached_trunks`: the cached trunk features are this model's (where its trunks rest).
        """
        cache = self.cache if cached_trunks else None
        if model.trunk_frozen and cache is not None and cache.trunk.shape[-1]:
            image = batched(model.head, cache.trunk[:, 0], self.device)
        else:
            image = encode_images(model, self.decoded, self.device)
        if cached_text and self.cache is not None:
            text = self.cache.texts.astype(np.float32)
            text = text if text_map is None else text @ text_map
        elif model.text_trunk_frozen and cache is not None and cache.text_trunk.shape[-1]:
            text = batched(model.text_head, cache.text_trunk, self.device)
        else:
            text = encode_texts(model, [c for cs in self.captions for c in cs], self.device)
        return metrics.normalise(image), metrics.normalise(text)

    def ranks(
        self,
        model: TwoTower,
        *,
        cached_text: bool = False,
        text_map: np.ndarray | None = None,
        cached_trunks: bool = True,
    ) -> metrics.Ranks:
        image, text = self.vectors(
            model, cached_text=cached_text, text_map=text_map, cached_trunks=cached_trunks
        )
        return metrics.ranks(image, text, self.owner)

    def teacher_ranks(self) -> metrics.Ranks:
        """What the model that teaches finds by its own vectors of whole pictures, from the cache."""
        if self.cache is None:
            raise ValueError("no cached features to take the teacher's vectors from")
        image, text = (x.astype(np.float32) for x in (self.cache.image[:, 0], self.cache.texts))
        return metrics.ranks(metrics.normalise(image), metrics.normalise(text), self.owner)


class LabelledSet:
    """Labelled pictures; a trunk that rests sees them once."""

    def __init__(self, path: str, device: str = "cpu") -> None:
        self.data, self.device = Labelled.open(path), device
        self.decoded = PictureSet(self.data.load, len(self.data))
        self.choosing, self.reported = self.data.halves()
        self._trunk: tuple[str, np.ndarray] | None = None  # whose features, and they

    def right(self, model: TwoTower) -> np.ndarray:
        """Which pictures [N] the model puts into their own class, zero-shot."""
        return self.right_by(*self.vectors(model))

    def right_by(self, image: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """The same by vectors of pictures [N, D] and of the classes' prompts [C, D]."""
        labels = np.array(self.data.labels)
        return metrics.zero_shot_right(metrics.normalise(image), labels, metrics.normalise(classes))

    def vectors(self, model: TwoTower) -> tuple[np.ndarray, np.ndarray]:
        """Of the pictures [N, D] and of the classes' prompts [C, D], not normalised."""
        if model.trunk_frozen:
            # not "the trunk's" alone: another model, or updates merged into the weights, see other things
            whose = model.trunk_mark()
            if self._trunk is None or self._trunk[0] != whose:
                self._trunk = (whose, encode_images(model, self.decoded, self.device, trunk=True))
            image = batched(model.head, self._trunk[1], self.device)
        else:
            image = encode_images(model, self.decoded, self.device)
        return image, encode_texts(model, self.data.prompts, self.device)


@torch.no_grad()
def batched(f: Any, x: np.ndarray, device: str) -> np.ndarray:
    """f of x [N, ...], N above 0, a few hundred rows at a time."""
    return np.concatenate(
        [
            f(torch.from_numpy(x[i : i + 512].astype(np.float32)).to(device)).float().cpu().numpy()
            for i in range(0, len(x), 512)
        ]
    )


@torch.no_grad()
def encode_images(
    model: TwoTower, pictures: PictureSet, device: str = "cpu", *, trunk: bool = False
) -> np.ndarray:
    """[N, D] (or trunk features [N, F]), decoded on threads ahead of the model."""
    out = []
    bottom = None if trunk else Bottom.of(model)
    if bottom is not None:
        for batch in pictures.below(bottom, model.preprocess, device):
            for maps in torch.from_numpy(batch).split(FORWARD[device]):
                out.append(bottom.above(maps.float().to(device)).float().cpu().numpy())
        return np.concatenate(out)
    for batch in pictures.batches(model.preprocess):
        for pixels in torch.from_numpy(batch).split(FORWARD[device]):
            x = model.normalised(pixels.to(device))
            out.append((model.trunk(x) if trunk else model.encode_image(x)).float().cpu().numpy())
    return np.concatenate(out)


@torch.no_grad()
def encode_texts(
    model: TwoTower, texts: list[str], device: str = "cpu", *, trunk: bool = False
) -> np.ndarray:
    """[M, D] (or features below the projection [M, W]); texts of like length go together, so that little is
    padded."""
    encode = model.text_trunk if trunk else model.encode_text
    order = np.argsort([len(t) for t in texts], kind="stable")
    out: np.ndarray | None = None
    for start in range(0, len(texts), 256):
        at = order[start : start + 256]
        v = encode(model.tokens([texts[i] for i in at]).to(device)).float().cpu().numpy()
        out = np.zeros((len(texts), v.shape[1]), np.float32) if out is None else out
        out[at] = v
    return out if out is not None else np.zeros((0, model.dim), np.float32)
