"""Batches of a student's run: which view and captions of each picture, and everything that doesn't learn."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from dclip_qdrant.pictures.preprocess import Preprocess
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.training.data import Cache, Decoded, Pictures, apply_view, draw, in_view
from dclip_qdrant.training.loop import Vectors
from dclip_qdrant.training.models.two_tower import TwoTower
from dclip_qdrant.training.phrase_bank import PhraseBank
from dclip_qdrant.training.reading import Drawn, Loads, Rows

DECODED_BYTES = 2 << 30  # a worker; 14,000 pictures of 224 x 224


@dataclass
class StudentBatch:
    """N pictures, C captions each. `images`: pixels [N, S, S, 3] uint8, what the resting part of the trunk
    gives [N, C, h, w] float16 (models/bottom.py), or trunk features [N, F]; `texts`:
    token ids [N * C, L], features below the projection [N * C, W], or vectors [N * C, D].

    `fixed`: what doesn't learn, by the name it has in `Encoded` ("image" and "text" are the teacher's,
    "image.0" the first other teacher's).
    """

    images: Tensor
    texts: Tensor
    fixed: Vectors
    crops: Tensor | None = None  # R crops, as `images`
    spans: Tensor | None = None  # token ids [P, L]
    pictures: Tensor | None = None  # E pictures without captions, as `images`


@dataclass(frozen=True)
class Uncaptioned:
    """Pictures without captions, and what the teacher's model says of them."""

    pictures: Pictures
    cache: Cache


@dataclass(frozen=True)
class Resting:
    """Which towers never run, since what they say is cached: the image trunk; the text tower, that is the
    teacher's own (`text`); the text trunk below a projection of its own."""

    image: bool
    text: bool
    text_trunk: bool


class KeptPictures:
    """What pictures were decoded to, from one run of a worker to the next one that reads the same."""

    def __init__(self) -> None:
        self._mark: object = None
        self._decoded: Decoded | None = None

    def of(self, mark: object, then: Callable[[np.ndarray], np.ndarray] | None) -> Decoded:
        """Those of an earlier run of this mark, else none yet. `mark`: all that what is kept follows from."""
        if self._decoded is None or mark != self._mark:
            pool = ThreadPoolExecutor(max(2, os.cpu_count() or 2))
            self._mark, self._decoded = mark, Decoded(DECODED_BYTES, pool)
        self._decoded.then = then
        return self._decoded


class Batches:
    """Makes batches from the pictures of `rows`, or from a streamed batch's own.

    Every draw follows from (seed, epoch, picture). `reads`: what the objectives need (see `Encoded`).
    """

    def __init__(
        self,
        model: TwoTower,
        recipe: Recipe,
        rows: Rows,
        *,
        reads: set[str],
        resting: Resting,
        seed: int,
        bank: PhraseBank | None,
        uncaptioned: Uncaptioned | None,
        decoded: Decoded,
    ) -> None:
        self._model, self._recipe, self._rows, self._seed = model, recipe, rows, seed
        self._reads, self._resting, self._bank, self._uncaptioned = reads, resting, bank, uncaptioned
        self._ids: dict[int, Tensor] = {}  # token ids [C, L] of the pictures of `rows`, once they are drawn
        self._decoded = decoded

    def make(self, read: Drawn, epoch: int, device: str) -> StudentBatch:
        rows, index = (read, np.arange(len(read))) if isinstance(read, Rows) else (self._rows, read)
        t, c, numbers = self._recipe.train, rows.cache, rows.numbers[index]
        views = min(t.views, c.views)
        draws = [
            draw(self._seed, epoch, int(number), views, len(rows.captions[i]), t.captions)
            for number, i in zip(numbers, index.tolist(), strict=True)
        ]
        view, chosen = np.array([v for v, _ in draws]), [captions for _, captions in draws]
        if self._resting.image:
            images = torch.from_numpy(c.trunk[index, view])
        else:
            images = torch.from_numpy(
                self._decoded(
                    list(zip(numbers.tolist(), view.tolist(), strict=True)),
                    lambda j: _view_pixels(
                        rows.pictures, c, int(index[j]), int(view[j]), self._model.preprocess
                    ),
                )
            )
        flat = np.concatenate([c.first[i] + own for i, own in zip(index, chosen, strict=True)])
        if self._resting.text or self._resting.text_trunk:
            cached = c.texts if self._resting.text else c.text_trunk
            texts = torch.from_numpy(cached[flat].astype(np.float32))
        else:
            texts = self._tokens(rows, index, chosen)
        fixed = {
            "image": _teacher_image(c, index, view, chosen),
            "text": c.texts[flat],
        }
        for k, other in enumerate(c.others):
            fixed |= {f"image.{k}": other.image[index, view], f"text.{k}": other.texts[flat]}
        if "noise" in self._reads:
            fixed["noise"] = np.concatenate(
                [self._rng(epoch, i, 2).standard_normal((t.captions, self._model.dim)) for i in numbers]
            )
        batch = StudentBatch(
            images, texts, {k: torch.from_numpy(np.asarray(v, np.float32)) for k, v in fixed.items()}
        )
        if t.mixup:
            self._mix(batch, numbers, epoch)
        self._add_regions(batch, rows, index, epoch)
        self._add_uncaptioned(batch, numbers, epoch)
        if "rois" in self._reads:
            _add_rois(batch, c, index, view)
        if self._bank:
            some = self._rng(epoch, int(numbers[0]), 3).integers(
                len(self._bank), size=round(len(index) * t.span_share)
            )
            batch.spans, batch.fixed["spans"] = self._bank.ids[some], self._bank.vectors[some]
        return StudentBatch(
            batch.images.to(device),
            texts.to(device),
            {k: v.to(device) for k, v in batch.fixed.items()},
            None if batch.crops is None else batch.crops.to(device),
            None if batch.spans is None else batch.spans.to(device),
            None if batch.pictures is None else batch.pictures.to(device),
        )

    def _mix(self, batch: StudentBatch, numbers: np.ndarray, epoch: int) -> None:
        """Blends every picture with another one of the batch (the larger share is its own)."""
        alpha = self._recipe.train.mixup
        draws = np.array([self._rng(epoch, int(number), 5).beta(alpha, alpha) for number in numbers])
        share = torch.from_numpy(np.maximum(draws, 1 - draws).astype(np.float32))
        partner = torch.from_numpy(self._rng(epoch, int(numbers[0]), 6).permutation(len(numbers)))
        blend(batch, partner, share)

    def _tokens(self, rows: Rows, index: np.ndarray, chosen: Sequence[np.ndarray]) -> Tensor:
        """[N * C, L] ids of the captions drawn for each picture; those of `rows` are made once."""
        if rows is not self._rows:
            return self._model.tokens([rows.captions[i][k] for i, own in enumerate(chosen) for k in own])
        for i in index.tolist():
            if i not in self._ids:
                self._ids[i] = self._model.tokens(rows.captions[i]).to(torch.int32)
        ids = [self._ids[i][k] for i, own in zip(index.tolist(), chosen, strict=True) for k in own]
        return nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self._model.pad_id)

    def _rng(self, epoch: int, picture: int, stream: int) -> np.random.Generator:
        """Draws of one kind follow from (seed, epoch, picture) alone."""
        return np.random.default_rng([self._seed, epoch, int(picture), stream])

    def _pick(self, mask: np.ndarray, numbers: np.ndarray, epoch: int) -> np.ndarray:
        """One of each picture's regions, where `mask` [N, R] has any, else -1."""
        draws = [self._rng(epoch, number, 1) for number in numbers]
        return np.array(
            [
                rng.choice(np.flatnonzero(own)) if own.any() else -1
                for rng, own in zip(draws, mask, strict=True)
            ]
        )

    def _add_regions(self, batch: StudentBatch, of: Rows, index: np.ndarray, epoch: int) -> None:
        """Crops of the batch's first pictures (their pixels or trunk features), and what the base made of
        them."""
        c, count = of.cache, round(len(index) * self._recipe.train.region_share)
        if count == 0:
            return
        rows = index[:count]
        pick = self._pick(c.region_mask[rows], of.numbers[rows], epoch)
        there = (pick >= 0)[:, None]
        batch.fixed["regions"] = torch.from_numpy(
            np.where(there, c.regions[rows, pick], c.image[rows, 0]).astype(np.float32)
        )
        if self._resting.image:
            batch.crops = torch.from_numpy(np.where(there, c.region_trunk[rows, pick], c.trunk[rows, 0]))
            return
        boxes = np.where(there, c.region_boxes[rows, pick], np.array([0, 0, 1, 1], np.float32))
        squash = replace(self._model.preprocess, resize_mode="squash")
        batch.crops = torch.from_numpy(
            self._decoded(
                [(i, "region", r) for i, r in zip(of.numbers[rows].tolist(), pick.tolist(), strict=True)],
                lambda j: _pixels(of.pictures, int(rows[j]), boxes[j], False, squash),
            )
        )

    def _add_uncaptioned(self, batch: StudentBatch, numbers: np.ndarray, epoch: int) -> None:
        """Pictures without captions, and the teacher's vectors of the same views."""
        count = round(len(numbers) * self._recipe.train.picture_share)
        if self._uncaptioned is None or count == 0:
            return
        cache, pictures = self._uncaptioned.cache, self._uncaptioned.pictures
        rng = self._rng(epoch, int(numbers[0]), 4)
        rows = rng.integers(len(cache.keys), size=count)
        view = rng.integers(min(self._recipe.train.views, cache.views), size=count)
        batch.fixed["pictures"] = torch.from_numpy(cache.image[rows, view].astype(np.float32))
        if self._resting.image:
            batch.pictures = torch.from_numpy(cache.trunk[rows, view])
            return
        keys = [("uncaptioned", row, v) for row, v in zip(rows.tolist(), view.tolist(), strict=True)]
        batch.pictures = torch.from_numpy(
            self._decoded(
                keys,
                lambda j: _view_pixels(pictures, cache, int(rows[j]), int(view[j]), self._model.preprocess),
            )
        )


def blend(batch: StudentBatch, partner: Tensor, share: Tensor) -> None:
    """x_i <- share_i x_i + (1 - share_i) x_partner(i), of what the student sees and of every teacher's unit
    vectors of it (mixup, Zhang et al. 2018, eq. 1). partner, share [N]."""
    own = batch.images.float()
    mixed = torch.lerp(own[partner], own, share.reshape(-1, *[1] * (own.ndim - 1)))
    batch.images = (mixed if batch.images.is_floating_point() else mixed.round()).to(batch.images.dtype)
    for name in [n for n in batch.fixed if n == "image" or n.startswith("image.")]:
        target = nn.functional.normalize(batch.fixed[name], dim=-1)
        batch.fixed[name] = torch.lerp(target[partner], target, share[:, None])
    # how far the partner stands stays true where the batches of several workers are put together
    batch.fixed["blend"] = torch.stack([partner - torch.arange(len(partner)), share], 1)


def _view_pixels(pictures: Loads, c: Cache, picture: int, view: int, preprocess: Preprocess) -> np.ndarray:
    """[S, S, 3] of one of a picture's stored views."""
    return _pixels(pictures, picture, c.crop[picture, view], bool(c.flip[picture, view]), preprocess)


def _pixels(
    pictures: Loads, picture: int, crop: np.ndarray, flip: bool, preprocess: Preprocess
) -> np.ndarray:
    return preprocess.pixels(apply_view(pictures.load(picture), crop, flip))


def _teacher_image(c: Cache, index: np.ndarray, view: np.ndarray, chosen: list[np.ndarray]) -> np.ndarray:
    """[N, D] the teacher's vector of each picture: the mean over the drawn captions' where it hangs on
    them, else the base's own feature."""
    if c.teacher is None:
        return c.image[index, view]
    wide = c.teacher.shape[2] > 1
    return np.stack(
        [
            c.teacher[i, v][caps if wide else [0]].astype(np.float32).mean(0)
            for i, v, caps in zip(index, view, chosen, strict=True)
        ]
    )


def _add_rois(batch: StudentBatch, c: Cache, index: np.ndarray, view: np.ndarray) -> None:
    """Every region of each picture as the student's input shows it ("boxes" [N, R, 4], parts of the
    input), and what the base made of its crop.

    A box that the view cuts off for more than half is masked.
    """
    most = c.region_boxes.shape[1]
    crop, flip = np.repeat(c.crop[index, view], most, 0), np.repeat(c.flip[index, view], most)
    shown, part = in_view(c.region_boxes[index].reshape(-1, 4), crop, flip)
    batch.fixed["boxes"] = torch.from_numpy(shown.reshape(-1, most, 4))
    batch.fixed["roi_mask"] = torch.from_numpy(c.region_mask[index] & (part.reshape(-1, most) >= 0.5))
    batch.fixed["rois"] = torch.from_numpy(c.regions[index].astype(np.float32))
