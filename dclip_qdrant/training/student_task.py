"""What a student's run trains: towers of a TwoTower under the objectives that the recipe names."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dclip_qdrant.data import Cache, Decoded, Pictures, apply_view, draw
from dclip_qdrant.encoded import Encoded
from dclip_qdrant.errors import RecipeError
from dclip_qdrant.models.two_tower import TwoTower
from dclip_qdrant.objectives import build
from dclip_qdrant.preprocess import Preprocess
from dclip_qdrant.recipe import Objective, Recipe
from dclip_qdrant.training.loop import Vectors

DECODED_BYTES = 2 << 30  # a worker; 14,000 pictures of 224 x 224


@dataclass
class Batch:
    """N pictures, C captions each. `seen`: pixels [N, S, S, 3] uint8, or trunk features [N, F]; `said`: token ids [N * C, L], or vectors [N * C, D]."""

    seen: Tensor
    said: Tensor
    teacher_image: Tensor  # [N, D]
    teacher_text: Tensor  # [N * C, D]
    crops: Tensor | None = None  # R crops, as `seen`
    teacher_crops: Tensor | None = None  # [R, D] the frozen base's features of them


class Weighted(nn.Module):
    """Objectives and their weighted sum."""

    def __init__(self, objectives: Sequence[Objective], student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.terms = nn.ModuleList(build(o.name, student_dim=student_dim, teacher_dim=teacher_dim, **o.options) for o in objectives)
        self.weights = [o.weight for o in objectives]
        self.names = [o.name + (f".{o.options['of']}" if "of" in o.options else "") for o in objectives]

    def forward(self, student: Encoded, teacher: Encoded) -> tuple[Tensor, dict[str, float]]:
        values = [term(student, teacher) for term in self.terms]
        total = sum(w * v for w, v in zip(self.weights, values, strict=True))
        return total, {n: v.item() for n, v in zip(self.names, values, strict=True)}


class StudentTask:
    """See `loop.Task`. A frozen trunk is never run (its features come from the cache), nor is a frozen text tower that is the teacher's own."""

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
        how = {"last_n": s.last_n, "rank": s.lora_rank, "alpha": s.lora_alpha}
        self.image_names = model.choose("image", s.train, **how)
        self.text_names = model.choose("text", s.text, **how)
        if not self.image_names + self.text_names:
            raise RecipeError(recipe.name, "nothing learns: student.train and student.text are both frozen")
        self.modules = model
        self.use_trunk = model.trunk_frozen and cache.trunk.shape[-1] > 0
        if recipe.train.region_share and (cache.regions is None or not cache.region_mask.any()):
            raise RecipeError(recipe.name, "train.region_share without any region", "a teacher with regions, or region_share = 0")
        self.cached_text = not self.text_names and same_base
        teacher_dim = cache.texts.shape[-1] if cache.texts is not None else model.dim
        self.objectives = Weighted(recipe.objectives, model.dim, teacher_dim).to(device)
        self.ids = None if self.cached_text else [model.tokens(c).to(torch.int32) for c in captions]
        self.decoded = Decoded(DECODED_BYTES, ThreadPoolExecutor(max(2, os.cpu_count() or 2)))

    def groups(self) -> list[dict[str, Any]]:
        """Optimizer groups: learning rate by tower and layer; weight decay on matrices alone."""
        t = self.recipe.train
        params = {n: p for n, p in self.model.model.named_parameters() if p.requires_grad}
        out: dict[tuple[float, float], list[Tensor]] = {}
        for tower, names, lr in (("image", self.image_names, t.lr), ("text", self.text_names, t.text_lr or t.lr)):
            layers = self.model.layers(tower)
            depth = {n: len(layers) - 1 - i for i, layer in enumerate(layers) for n in layer}
            for name in names:
                plain = name.replace(".parametrizations", "").rsplit(".0.", 1)[0] if "parametrizations" in name else name
                below = depth.get(plain, next((d for n, d in depth.items() if plain in n), 0))
                p = params[name]
                rate = t.projection_lr if t.projection_lr and self.model.is_projection(plain) else lr * t.layer_decay**below
                out.setdefault((rate, t.weight_decay if p.ndim >= 2 else 0.0), []).append(p)
        return [{"params": ps, "lr": lr, "weight_decay": wd} for (lr, wd), ps in out.items()]

    def batch(self, index: np.ndarray, epoch: int) -> Batch:
        t, c = self.recipe.train, self.cache
        views = min(t.views, c.views)
        drawn = [draw(self.seed, epoch, int(i), views, len(self.captions[i]), t.captions) for i in index]
        view = np.array([v for v, _ in drawn])
        if self.use_trunk:
            seen = torch.from_numpy(c.trunk[index, view])
        else:
            seen = torch.from_numpy(
                self.decoded(
                    list(zip(index.tolist(), view.tolist(), strict=True)),
                    lambda j: self._pixels(index[j], c.crop[index[j], view[j]], bool(c.flip[index[j], view[j]]), self.model.preprocess),
                )
            )
        flat = np.concatenate([c.first[i] + caps for i, (_, caps) in zip(index, drawn, strict=True)])
        teacher_text = torch.from_numpy(c.texts[flat].astype(np.float32))
        if self.cached_text:
            said = teacher_text
        else:
            ids = [self.ids[i][k] for i, (_, caps) in zip(index, drawn, strict=True) for k in caps]
            said = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        if c.teacher is not None:
            wide = c.teacher.shape[2] > 1
            rows = [c.teacher[i, v][caps if wide else [0]].astype(np.float32).mean(0) for i, (v, caps) in zip(index, drawn, strict=True)]
            teacher_image = torch.from_numpy(np.stack(rows))
        else:
            teacher_image = torch.from_numpy(c.image[index, view].astype(np.float32))
        tensors = [seen, said, teacher_image, teacher_text, *self._crops(index, epoch)]
        return Batch(*(x.to(self.device) for x in tensors))

    def _crops(self, index: np.ndarray, epoch: int) -> list[Tensor]:
        """Crops of the batch's first pictures: their pixels or trunk features, and what the base made of them."""
        c, count = self.cache, round(len(index) * self.recipe.train.region_share)
        if count == 0:
            return []
        rows = index[:count]
        pick = np.array(
            [
                np.random.default_rng([self.seed, epoch, int(i), 1]).choice(np.flatnonzero(c.region_mask[i]))
                if c.region_mask[i].any()
                else -1
                for i in rows
            ]
        )
        target = torch.from_numpy(np.where((pick >= 0)[:, None], c.regions[rows, pick], c.image[rows, 0]).astype(np.float32))
        if self.use_trunk:
            return [torch.from_numpy(np.where((pick >= 0)[:, None], c.region_trunk[rows, pick], c.trunk[rows, 0])), target]
        whole = np.array([0, 0, 1, 1], np.float32)
        boxes = np.where((pick >= 0)[:, None], c.region_boxes[rows, pick], whole)
        squash = replace(self.model.preprocess, resize_mode="squash")
        pixels = self.decoded(
            [(i, "region", r) for i, r in zip(rows.tolist(), pick.tolist(), strict=True)],
            lambda j: self._pixels(rows[j], boxes[j], False, squash),
        )
        return [torch.from_numpy(pixels), target]

    def _pixels(self, picture: int, crop: np.ndarray, flip: bool, preprocess: Preprocess) -> np.ndarray:
        return preprocess.pixels(apply_view(self.pictures.load(int(picture)), crop, flip))

    def part(self, batch: Batch, start: int, stop: int) -> Batch:
        c, n = self.recipe.train.captions, len(batch.seen)
        out = Batch(
            batch.seen[start:stop],
            batch.said[start * c : stop * c],
            batch.teacher_image[start:stop],
            batch.teacher_text[start * c : stop * c],
        )
        if batch.crops is None:
            return out
        r = len(batch.crops)
        at = slice(start * r // n, stop * r // n)  # each chunk takes its share of the crops, in order
        return replace(out, crops=batch.crops[at], teacher_crops=batch.teacher_crops[at])

    def _image(self, seen: Tensor) -> Tensor:
        return self.model.head(seen.float()) if self.use_trunk else self.model.encode_image(normalised(seen, self.model))

    def encode(self, part: Batch) -> Vectors:
        r = 0 if part.crops is None else len(part.crops)
        image = self._image(torch.cat([part.seen, part.crops]) if r else part.seen)
        image, regions = (image[:-r], image[-r:]) if r else (image, image[:0])
        if self.cached_text:
            text = part.said
        elif self.text_names:
            text = self.model.encode_text(part.said.long())
        else:
            with torch.no_grad():
                text = self.model.encode_text(part.said.long())
        return {"image": image, "text": text} | ({"regions": regions} if part.crops is not None else {})

    def fixed(self, batch: Batch) -> Vectors:
        return {"image": batch.teacher_image, "text": batch.teacher_text} | (
            {"regions": batch.teacher_crops} if batch.crops is not None else {}
        )

    def loss(self, live: Vectors, fixed: Vectors) -> tuple[Tensor, dict[str, float]]:
        n = len(live["image"])
        owner = torch.arange(n, device=live["image"].device).repeat_interleave(len(live["text"]) // n)
        scale = self.model.logit_scale.detach()
        student = Encoded(live["image"], live["text"], owner, scale, live.get("regions"))
        return self.objectives(student, student.with_vectors(fixed["image"], fixed["text"], fixed.get("regions")))


def normalised(pixels: Tensor, model: TwoTower) -> Tensor:
    """[B, S, S, 3] uint8 -> [B, 3, S, S] float, on the tensor's own device (a quarter of the bytes to copy there)."""
    mean = torch.tensor(model.preprocess.mean, device=pixels.device)
    std = torch.tensor(model.preprocess.std, device=pixels.device)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
