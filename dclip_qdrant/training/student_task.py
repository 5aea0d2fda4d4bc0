"""What a student's run trains: towers of a TwoTower under the objectives that the recipe names."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dclip_qdrant.errors import RecipeError
from dclip_qdrant.recipe import ObjectiveSettings, Recipe
from dclip_qdrant.training.data import Cache
from dclip_qdrant.training.encoded import Blend, Encoded
from dclip_qdrant.training.loop import Vectors
from dclip_qdrant.training.models.bottom import Bottom
from dclip_qdrant.training.models.two_tower import TwoTower
from dclip_qdrant.training.objectives import build
from dclip_qdrant.training.phrase_bank import PhraseBank
from dclip_qdrant.training.reading import Drawn, Loads, Rows
from dclip_qdrant.training.student_batch import Batches, KeptPictures, Resting, StudentBatch, Uncaptioned


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


WIDTH = 1024  # any that no objective's option exceeds: what objectives read doesn't hang on it


def reads_regions(recipe: Recipe) -> bool:
    """Whether a student's run needs the cached regions."""
    return recipe.train.region_share > 0 or bool(
        Weighted(recipe.objectives, WIDTH, WIDTH).reads & {"regions", "rois"}
    )


class StudentTask:
    """See `loop.Task`. A frozen trunk is never run (its features come from the cache), nor is a frozen text
    tower that is the teacher's own.

    `pictures`, `captions` and `cache` are all that is trained on; of a streamed run a few of it, which show
    what the rest is like, and `all_captions` gives those that phrases are taken from. `base` gives the frozen
    model that phrases and words are held to, for objectives that read them. `kept` are pictures that an
    earlier run of the same worker decoded, of the same `source`.
    """

    def __init__(
        self,
        model: TwoTower,
        recipe: Recipe,
        pictures: Loads,
        captions: Sequence[list[str]],
        cache: Cache,
        *,
        seed: int,
        same_base: bool,
        base: Callable[[], TwoTower] | None = None,
        uncaptioned: Uncaptioned | None = None,
        device: str = "cpu",
        all_captions: Callable[[], Sequence[list[str]]] | None = None,
        kept: KeptPictures | None = None,
        source: str = "",
    ) -> None:
        self.model, self.recipe, self.cache, self.device = model.to(device), recipe, cache, device
        self.size = len(captions)
        torch.manual_seed(seed)  # low-rank starts and projections
        self.image_names, self.text_names = model.choose_towers(recipe.student)
        if not self.image_names + self.text_names:
            raise RecipeError(recipe.name, "nothing learns: student.train and student.text are both frozen")
        self.modules = model
        teacher_dim = cache.texts.shape[-1] if cache.texts is not None else model.dim
        self.objectives = Weighted(recipe.objectives, model.dim, teacher_dim).to(device)
        self.reads = self.objectives.reads
        boxes = cache.regions is not None and (all_captions is not None or cache.region_mask.any())
        if (recipe.train.region_share or "rois" in self.reads) and not boxes:
            raise RecipeError(
                recipe.name,
                "objectives of regions without any region",
                "a teacher with regions, or train.region_share = 0",
            )
        wants_pictures = bool(recipe.train.picture_share) or "pictures" in self.reads
        if wants_pictures and not (uncaptioned and recipe.train.picture_share and "pictures" in self.reads):
            raise RecipeError(
                recipe.name,
                "pictures without captions are asked for, but not given, drawn and learned from",
                "pictures, train.picture_share above 0 and an objective of pictures",
            )
        needs_words = "words" in self.reads
        self.cached_text = not self.text_names and same_base and not needs_words
        text_trunk = cache.text_trunk is not None and cache.text_trunk.shape[-1] > 0 and not needs_words
        self.resting = Resting(
            # a cached trunk has one vector a picture: regions inside of it can't be pooled any more
            image=model.trunk_frozen and cache.trunk.shape[-1] > 0 and "rois" not in self.reads,
            text=self.cached_text,
            text_trunk=not self.cached_text and model.text_trunk_frozen and text_trunk,
        )
        # regions inside of a picture are pooled from a map that only a whole pass gives
        self.bottom = None if self.resting.image or "rois" in self.reads else Bottom.of(model)
        self.base: Any = base().to(device) if base is not None and self.reads & {"spans", "words"} else None
        self.bank = None
        if "spans" in self.reads:
            sentences = all_captions() if all_captions else captions
            self.bank = PhraseBank(self.base, sentences, seed=seed, device=device)
        if self.bank and not (recipe.train.span_share and self.text_names):
            raise RecipeError(
                recipe.name, "an objective of spans", "train.span_share above 0 and a text tower that learns"
            )
        self._batches = Batches(
            model,
            recipe,
            Rows(cache, captions, pictures, np.arange(len(captions))),
            reads=self.reads,
            resting=self.resting,
            seed=seed,
            bank=self.bank,
            uncaptioned=uncaptioned,
            decoded=(kept or KeptPictures()).of(self._mark(source), self._below),
        )

    def _mark(self, source: str) -> tuple[str, ...]:
        """What decoded pictures follow from."""
        mark = "" if self.bottom is None else self.bottom.mark()
        return (source, repr(self.model.preprocess), mark)

    @property
    def _below(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """What is kept of pixels: what the resting part makes of them, where there is one."""
        bottom = self.bottom
        return None if bottom is None else lambda pixels: bottom.of_pixels(pixels, self.device)

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

    def batch(self, drawn: Drawn, epoch: int) -> StudentBatch:
        return self._batches.make(drawn, epoch, self.device)

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
        if self.resting.image:
            return self.model.head(images.float())
        if self.bottom is not None:
            return self.bottom.above(images.float())
        return self.model.encode_image(self.model.normalised(images))

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
                    self.model.encode_captions(part.spans.long()) if len(part.spans) else out["text"][:0]
                )
        return out

    def _text(self, texts: Tensor) -> Tensor:
        if self.cached_text:
            return texts
        if self.resting.text_trunk:
            return self.model.text_head(texts)
        return self.model.encode_captions(texts.long())

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
        blend = None
        if "blend" in fixed:
            offset, own = fixed["blend"].unbind(1)
            blend = Blend(torch.arange(n, device=own.device) + offset.long(), own)
        student = Encoded(
            live["image"],
            live["text"],
            owner,
            scale,
            noise=fixed.get("noise"),
            blend=blend,
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
