"""What a student's run trains: towers of a TwoTower under the objectives that the recipe names."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dclip_qdrant.errors import RecipeError
from dclip_qdrant.pictures.preprocess import Preprocess
from dclip_qdrant.recipe import ObjectiveSettings, Recipe
from dclip_qdrant.training.data import Cache, Decoded, Pictures, apply_view, draw, in_view
from dclip_qdrant.training.encoded import Encoded
from dclip_qdrant.training.loop import Vectors
from dclip_qdrant.training.models.two_tower import TwoTower
from dclip_qdrant.training.objectives import build
from dclip_qdrant.training.phrase_bank import PhraseBank

DECODED_BYTES = 2 << 30  # a worker; 14,000 pictures of 224 x 224


@dataclass
class StudentBatch:
    """N pictures, C captions each. `images`: pixels [N, S, S, 3] uint8, or trunk features [N, F]; `texts`:
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


class Weighted(nn.Module):
    """Objectives and their weighted sum."""

    def __init__(self, objectives: Sequence[ObjectiveSettings], student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.terms = nn.ModuleList(
            build(o.name, student_dim=student_dim, teacher_dim=teacher_dim, **o.options) for o in objectives
        )
        self.weights = [o.weight for o in objectives]
        self.names = [o.name + (f".{o.options['of']}" if "of" in o.options else "") for o in objectives]

    @property
    def reads(self) -> set[str]:
        """What the terms need in a batch beside images and texts (see `Encoded`)."""
        return {name for term in self.terms for name in getattr(term, "reads", ())}

    def forward(self, student: Encoded, teacher: Encoded) -> tuple[Tensor, dict[str, float]]:
        values = [term(student, teacher) for term in self.terms]
        total = sum((w * v for w, v in zip(self.weights, values, strict=True)), torch.zeros(()))
        return total, {n: v.item() for n, v in zip(self.names, values, strict=True)}


@dataclass(frozen=True)
class Uncaptioned:
    """Pictures without captions, and what the teacher's model says of them."""

    pictures: Pictures
    cache: Cache


WIDTH = 1024  # any that no objective's option exceeds: what objectives read doesn't hang on it


def reads_regions(recipe: Recipe) -> bool:
    """Whether a student's run needs the cached regions."""
    return recipe.train.region_share > 0 or bool(
        Weighted(recipe.objectives, WIDTH, WIDTH).reads & {"regions", "rois"}
    )


class StudentTask:
    """See `loop.Task`. A frozen trunk is never run (its features come from the cache), nor is a frozen text
    tower that is the teacher's own.

    `base` gives the frozen model that phrases and words are held to, for objectives that read them.
    """

    def __init__(
        self,
        model: TwoTower,
        recipe: Recipe,
        pictures: Pictures,
        captions: list[list[str]],
        cache: Cache,
        *,
        seed: int,
        same_base: bool,
        base: Callable[[], TwoTower] | None = None,
        uncaptioned: Uncaptioned | None = None,
        device: str = "cpu",
    ) -> None:
        self.model, self.recipe, self.pictures, self.captions, self.cache, self.seed, self.device = (
            model.to(device),
            recipe,
            pictures,
            captions,
            cache,
            seed,
            device,
        )
        self.size = len(captions)
        s = recipe.student
        torch.manual_seed(seed)  # low-rank starts and projections
        options = {"last_n": s.last_n, "rank": s.lora_rank, "alpha": s.lora_alpha}
        self.image_names = model.choose("image", s.train, **options)
        self.text_names = model.choose("text", s.text, **options)
        if not self.image_names + self.text_names:
            raise RecipeError(recipe.name, "nothing learns: student.train and student.text are both frozen")
        self.modules = model
        teacher_dim = cache.texts.shape[-1] if cache.texts is not None else model.dim
        self.objectives = Weighted(recipe.objectives, model.dim, teacher_dim).to(device)
        self.reads = self.objectives.reads
        boxes = cache.regions is not None and cache.region_mask.any()
        if (recipe.train.region_share or "rois" in self.reads) and not boxes:
            raise RecipeError(
                recipe.name,
                "objectives of regions without any region",
                "a teacher with regions, or train.region_share = 0",
            )
        self.uncaptioned = uncaptioned
        wants_pictures = bool(recipe.train.picture_share) or "pictures" in self.reads
        if wants_pictures and not (uncaptioned and recipe.train.picture_share and "pictures" in self.reads):
            raise RecipeError(
                recipe.name,
                "pictures without captions are asked for, but not given, drawn and learned from",
                "pictures, train.picture_share above 0 and an objective of pictures",
            )
        # a cached trunk has one vector a picture: regions inside of it can't be pooled any more
        self.use_trunk = model.trunk_frozen and cache.trunk.shape[-1] > 0 and "rois" not in self.reads
        self.cached_text = not self.text_names and same_base and "words" not in self.reads
        self.text_trunk = (
            not self.cached_text
            and model.text_trunk_frozen
            and cache.text_trunk is not None
            and cache.text_trunk.shape[-1] > 0
            and "words" not in self.reads
        )
        self.base: Any = base().to(device) if base is not None and self.reads & {"spans", "words"} else None
        self.bank = (
            PhraseBank(self.base, captions, seed=seed, device=device) if "spans" in self.reads else None
        )
        if self.bank and not (recipe.train.span_share and self.text_names):
            raise RecipeError(
                recipe.name, "an objective of spans", "train.span_share above 0 and a text tower that learns"
            )
        ids_wanted = not (self.cached_text or self.text_trunk)
        self.ids = [] if not ids_wanted else [model.tokens(c).to(torch.int32) for c in captions]
        self.decoded = Decoded(DECODED_BYTES, ThreadPoolExecutor(max(2, os.cpu_count() or 2)))

    def groups(self) -> list[dict[str, Any]]:
        """Optimizer groups: learning rate by tower and layer; weight decay on matrices alone."""
        t = self.recipe.train
        params = {n: p for n, p in self.model.model.named_parameters() if p.requires_grad}
        out: dict[tuple[float, float], list[Tensor]] = {}
        for tower, names, lr in (
            ("image", self.image_names, t.lr),
            ("text", self.text_names, t.text_lr or t.lr),
        ):
            layers = self.model.layers(tower)
            depth = {n: len(layers) - 1 - i for i, layer in enumerate(layers) for n in layer}
            for name in names:
                plain = (
                    name.replace(".parametrizations", "").rsplit(".0.", 1)[0]
                    if "parametrizations" in name
                    else name
                )
                below = depth.get(plain, next((d for n, d in depth.items() if plain in n), 0))
                p = params[name]
                rate = (
                    t.projection_lr
                    if t.projection_lr and self.model.is_projection(plain)
                    else lr * t.layer_decay**below
                )
                out.setdefault((rate, t.weight_decay if p.ndim >= 2 else 0.0), []).append(p)
        return [{"params": ps, "lr": lr, "weight_decay": wd} for (lr, wd), ps in out.items()]

    def begin(self, epoch: int) -> None:
        """Lets the towers of this epoch's phase learn."""
        phases = self.recipe.train.phases
        if not phases:
            return
        phase = next(
            (p for p, end in zip(phases, np.cumsum([p.epochs for p in phases]), strict=True) if epoch < end),
            phases[-1],
        )
        params = dict(self.model.model.named_parameters())
        for tower, names in (("image", self.image_names), ("text", self.text_names)):
            for name in names:
                params[name].requires_grad_(phase.towers in (tower, "both"))
                params[name].grad = None

    def batch(self, index: np.ndarray, epoch: int) -> StudentBatch:
        t, c = self.recipe.train, self.cache
        views = min(t.views, c.views)
        drawn = [draw(self.seed, epoch, int(i), views, len(self.captions[i]), t.captions) for i in index]
        view = np.array([v for v, _ in drawn])
        if self.use_trunk:
            images = torch.from_numpy(c.trunk[index, view])
        else:
            images = torch.from_numpy(
                self.decoded(
                    list(zip(index.tolist(), view.tolist(), strict=True)),
                    lambda j: self._pixels(
                        index[j],
                        c.crop[index[j], view[j]],
                        bool(c.flip[index[j], view[j]]),
                        self.model.preprocess,
                    ),
                )
            )
        flat = np.concatenate([c.first[i] + caps for i, (_, caps) in zip(index, drawn, strict=True)])
        if self.cached_text or self.text_trunk:
            rows = c.texts if self.cached_text else c.text_trunk
            texts = torch.from_numpy(rows[flat].astype(np.float32))
        else:
            ids = [self.ids[i][k] for i, (_, caps) in zip(index, drawn, strict=True) for k in caps]
            texts = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        fixed = {"image": self._teacher_image(index, view, drawn), "text": c.texts[flat]}
        for k, other in enumerate(c.others):
            fixed |= {f"image.{k}": other.image[index, view], f"text.{k}": other.texts[flat]}
        if "noise" in self.reads:
            fixed["noise"] = np.concatenate(
                [self._rng(epoch, i, 2).standard_normal((t.captions, self.model.dim)) for i in index]
            )
        batch = StudentBatch(
            images, texts, {k: torch.from_numpy(np.asarray(v, np.float32)) for k, v in fixed.items()}
        )
        self._add_regions(batch, index, epoch)
        self._add_uncaptioned(batch, index, epoch)
        if "rois" in self.reads:
            self._add_rois(batch, index, view)
        if self.bank:
            some = self._rng(epoch, int(index[0]), 3).integers(
                len(self.bank), size=round(len(index) * t.span_share)
            )
            batch.spans, batch.fixed["spans"] = self.bank.ids[some], self.bank.vectors[some]
        return StudentBatch(
            images.to(self.device),
            texts.to(self.device),
            {k: v.to(self.device) for k, v in batch.fixed.items()},
            None if batch.crops is None else batch.crops.to(self.device),
            None if batch.spans is None else batch.spans.to(self.device),
            None if batch.pictures is None else batch.pictures.to(self.device),
        )

    def _rng(self, epoch: int, picture: int, stream: int) -> np.random.Generator:
        """Draws of one kind follow from (seed, epoch, picture) alone."""
        return np.random.default_rng([self.seed, epoch, int(picture), stream])

    def _teacher_image(
        self, index: np.ndarray, view: np.ndarray, drawn: list[tuple[int, np.ndarray]]
    ) -> np.ndarray:
        """[N, D] the teacher's vector of each picture: the mean over the drawn captions' where it hangs on
        them, else the base's own feature."""
        c = self.cache
        if c.teacher is None:
            return c.image[index, view]
        wide = c.teacher.shape[2] > 1
        return np.stack(
            [
                c.teacher[i, v][caps if wide else [0]].astype(np.float32).mean(0)
                for i, (v, caps) in zip(index, drawn, strict=True)
            ]
        )

    def _pick(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """One region of each picture, -1 where it has none."""
        mask = self.cache.region_mask
        return np.array(
            [self._rng(epoch, i, 1).choice(np.flatnonzero(mask[i])) if mask[i].any() else -1 for i in rows]
        )

    def _add_regions(self, batch: StudentBatch, index: np.ndarray, epoch: int) -> None:
        """Crops of the batch's first pictures (their pixels or trunk features), and what the base made of
        them."""
        c, count = self.cache, round(len(index) * self.recipe.train.region_share)
        if count == 0:
            return
        rows = index[:count]
        pick = self._pick(rows, epoch)
        there = (pick >= 0)[:, None]
        batch.fixed["regions"] = torch.from_numpy(
            np.where(there, c.regions[rows, pick], c.image[rows, 0]).astype(np.float32)
        )
        if self.use_trunk:
            batch.crops = torch.from_numpy(np.where(there, c.region_trunk[rows, pick], c.trunk[rows, 0]))
            return
        boxes = np.where(there, c.region_boxes[rows, pick], np.array([0, 0, 1, 1], np.float32))
        squash = replace(self.model.preprocess, resize_mode="squash")
        batch.crops = torch.from_numpy(
            self.decoded(
                [(i, "region", r) for i, r in zip(rows.tolist(), pick.tolist(), strict=True)],
                lambda j: self._pixels(rows[j], boxes[j], False, squash),
            )
        )

    def _add_uncaptioned(self, batch: StudentBatch, index: np.ndarray, epoch: int) -> None:
        """Pictures without captions, and the teacher's vectors of the same views."""
        count = round(len(index) * self.recipe.train.picture_share)
        if self.uncaptioned is None or count == 0:
            return
        cache, pictures = self.uncaptioned.cache, self.uncaptioned.pictures
        rng = self._rng(epoch, int(index[0]), 4)
        rows = rng.integers(len(cache.keys), size=count)
        view = rng.integers(min(self.recipe.train.views, cache.views), size=count)
        batch.fixed["pictures"] = torch.from_numpy(cache.image[rows, view].astype(np.float32))
        if self.use_trunk:
            batch.pictures = torch.from_numpy(cache.trunk[rows, view])
            return

        def pixels(j: int) -> np.ndarray:
            shown = apply_view(
                pictures.load(int(rows[j])), cache.crop[rows[j], view[j]], bool(cache.flip[rows[j], view[j]])
            )
            return self.model.preprocess.pixels(shown)

        keys = [("uncaptioned", row, v) for row, v in zip(rows.tolist(), view.tolist(), strict=True)]
        batch.pictures = torch.from_numpy(self.decoded(keys, pixels))

    def _add_rois(self, batch: StudentBatch, index: np.ndarray, view: np.ndarray) -> None:
        """Every region of each picture as the student's input shows it ("boxes" [N, R, 4], parts of the
        input), and what the base made of its crop.

        A box that the view cuts off for more than half is masked.
        """
        c, most = self.cache, self.cache.region_boxes.shape[1]
        crop, flip = np.repeat(c.crop[index, view], most, 0), np.repeat(c.flip[index, view], most)
        shown, part = in_view(c.region_boxes[index].reshape(-1, 4), crop, flip)
        batch.fixed["boxes"] = torch.from_numpy(shown.reshape(-1, most, 4))
        batch.fixed["roi_mask"] = torch.from_numpy(c.region_mask[index] & (part.reshape(-1, most) >= 0.5))
        batch.fixed["rois"] = torch.from_numpy(c.regions[index].astype(np.float32))

    def _pixels(self, picture: int, crop: np.ndarray, flip: bool, preprocess: Preprocess) -> np.ndarray:
        return preprocess.pixels(apply_view(self.pictures.load(int(picture)), crop, flip))

    def part(self, batch: StudentBatch, start: int, stop: int) -> StudentBatch:
        c, n = self.recipe.train.captions, len(batch.images)
        # crops and spans, in order
        share = lambda x: None if x is None else x[start * len(x) // n : stop * len(x) // n]
        boxes = {"boxes": batch.fixed["boxes"][start:stop]} if "boxes" in batch.fixed else {}
        return StudentBatch(
            batch.images[start:stop],
            batch.texts[start * c : stop * c],
            boxes,
            share(batch.crops),
            share(batch.spans),
            share(batch.pictures),
        )

    def _image(self, images: Tensor) -> Tensor:
        return (
            self.model.head(images.float())
            if self.use_trunk
            else self.model.encode_image(self.model.normalised(images))
        )

    def encode(self, part: StudentBatch) -> Vectors:
        out: Vectors = {}
        if "rois" in self.reads:
            out["image"], out["rois"] = self.model.encode_rois(
                self.model.normalised(part.images), part.fixed["boxes"]
            )
            if part.crops is not None:
                out["regions"] = self._image(part.crops) if len(part.crops) else out["image"][:0]
        else:
            pixels = part.images
            if part.crops is not None and len(part.crops):
                pixels = torch.cat([part.images, part.crops])
            image = self._image(pixels)
            out["image"] = image[: len(part.images)]
            if part.crops is not None:
                out["regions"] = image[len(part.images) :]
        if part.pictures is not None:
            out["pictures"] = self._image(part.pictures) if len(part.pictures) else out["image"][:0]
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(self.text_names)):
            if "words" in self.reads:
                out["text"], out["words"], _ = self._words(self.model, part.texts.long())
            else:
                out["text"] = self._text(part.texts)
            if part.spans is not None:
                out["spans"] = (
                    self.model.encode_text(part.spans.long()) if len(part.spans) else out["text"][:0]
                )
        return out

    def _text(self, texts: Tensor) -> Tensor:
        if self.cached_text:
            return texts
        if self.text_trunk:
            return self.model.text_head(texts)
        return self.model.encode_text(texts.long())

    def _words(self, model: TwoTower, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sentence vectors [M, D], token features [M, L, D] and which of them are words [M, L]; L is the
        context length, so that all workers' fit together."""
        text, words, mask = model.encode_words(ids)
        more = model.context_length - ids.shape[1]
        return text, nn.functional.pad(words, (0, 0, 0, more)), nn.functional.pad(mask, (0, more))

    def fixed(self, batch: StudentBatch) -> Vectors:
        out = {k: v for k, v in batch.fixed.items() if k != "boxes"}
        if "words" in self.reads:
            _, out["words"], out["word_mask"] = self._words(self.base, batch.texts.long())
        return out

    def loss(self, live: Vectors, fixed: Vectors) -> tuple[Tensor, dict[str, float]]:
        n = len(live["image"])
        owner = torch.arange(n, device=live["image"].device).repeat_interleave(len(live["text"]) // n)
        scale = self.model.logit_scale.detach()
        extra = ("regions", "rois", "spans", "words", "pictures")
        masks: dict[str, Any] = {k: fixed[k].bool() for k in ("roi_mask", "word_mask") if k in fixed}
        features: dict[str, Any] = {k: live.get(k) for k in extra}
        student = Encoded(
            live["image"],
            live["text"],
            owner,
            scale,
            noise=fixed.get("noise"),
            **masks,
            **features,
        )
        others = tuple(
            Encoded(fixed[f"image.{k}"], fixed[f"text.{k}"], owner, scale)
            for k in range(len(self.cache.others))
        )
        targets: dict[str, Any] = {k: fixed.get(k) for k in extra}
        teacher = Encoded(fixed["image"], fixed["text"], owner, scale, others=others, **targets)
        return self.objectives(student, teacher)
