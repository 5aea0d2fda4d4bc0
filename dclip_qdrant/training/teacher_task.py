"""What a teacher's run trains: cross-attention on frozen features, InfoNCE between the fused vector and
frozen sentence vectors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dclip_qdrant.recipe import TeacherSettings
from dclip_qdrant.training.data import Cache, draw
from dclip_qdrant.training.encoded import Encoded
from dclip_qdrant.training.loop import Vectors
from dclip_qdrant.training.models.region_teacher import RegionTeacher
from dclip_qdrant.training.models.two_tower import TwoTower
from dclip_qdrant.training.objectives.info_nce import InfoNce
from dclip_qdrant.training.phrases import phrases
from dclip_qdrant.training.reading import Drawn, Nothing, Rows


class Spans:
    """Span vectors of captions from the frozen text tower: word tokens or phrases."""

    def __init__(self, base: TwoTower, kind: str, device: str = "cpu") -> None:
        self.base, self.kind, self.device = base, kind, device

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """B captions -> vectors [B, S, D], zero where the mask [B, S] is False."""
        if self.kind == "tokens":
            ids = self.base.tokens(captions).to(self.device)
            vectors, mask = self.base.text_tokens(ids)
            width = max(int(mask.sum(1).max()), 1)
            words = torch.argsort((~mask).int(), dim=1, stable=True)[
                :, :width
            ]  # begin, end and padding go behind
            vectors, mask = vectors.take_along_dim(words[..., None], 1), mask.gather(1, words)
            return vectors * mask[..., None], mask
        pieces = [phrases(c) for c in captions]
        flat = self.base.encode_text(self.base.tokens([p for ps in pieces for p in ps]).to(self.device))
        rows = list(flat.split([len(p) for p in pieces]))
        vectors = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = nn.utils.rnn.pad_sequence(
            [torch.ones(len(r), dtype=torch.bool, device=flat.device) for r in rows], batch_first=True
        )
        return vectors, mask


@dataclass
class TeacherBatch:
    image: Tensor  # [B, D]
    regions: Tensor  # [B, R, D]
    region_mask: Tensor  # [B, R]
    inside: list[str]  # the caption that is fused (unused by regions_only)
    target: Tensor  # [B, D] frozen sentence vector


class TeacherTask:
    """See `loop.Task`. With caption = "other", a picture's fused caption is never the one it is scored
    against; a picture that has but one is fused with none.

    `captions` and `cache` are all that is trained on; of a streamed run a few of it."""

    def __init__(
        self,
        cfg: TeacherSettings,
        base: TwoTower,
        captions: Sequence[list[str]],
        cache: Cache,
        *,
        seed: int,
        device: str = "cpu",
    ) -> None:
        self.cfg, self.seed, self.device = cfg, seed, device
        self.rows = Rows(cache, captions, Nothing(), np.arange(len(captions)))
        self.size = len(captions)
        torch.manual_seed(seed)
        self.modules = RegionTeacher(cache.image.shape[-1], cfg).to(device)
        self.objectives: nn.Module = InfoNce(student_dim=0, teacher_dim=0, temperature=cfg.temperature)
        self.spans = Spans(base.to(device), cfg.spans, device)
        self.unit_scale = torch.ones((), device=device)

    def groups(self) -> list[dict[str, Any]]:
        return [
            {
                "params": list(self.modules.parameters()),
                "lr": self.cfg.lr,
                "weight_decay": self.cfg.weight_decay,
            }
        ]

    def begin(self, epoch: int) -> None:
        """Everything learns from the first epoch to the last."""

    def batch(self, drawn: Drawn, epoch: int) -> TeacherBatch:
        rows, index = (drawn, np.arange(len(drawn))) if isinstance(drawn, Rows) else (self.rows, drawn)
        c = rows.cache
        inside, target, view = [], [], []
        for i in index.tolist():
            n = len(rows.captions[i])
            v, chosen = draw(self.seed, epoch, int(rows.numbers[i]), c.views, n, min(2, n))
            a, b = (
                (chosen[0], chosen[0])
                if self.cfg.caption == "same"
                else (chosen[-1] if n > 1 else None, chosen[0])
            )
            inside.append("" if a is None else rows.captions[i][a])
            target.append(c.first[i] + b)
            view.append(v)
        floats = (c.image[index, view], c.regions[index], c.texts[target])
        image, regions, texts = (torch.from_numpy(x.astype(np.float32)).to(self.device) for x in floats)
        return TeacherBatch(
            image, regions, torch.from_numpy(c.region_mask[index]).to(self.device), inside, texts
        )

    def part(self, batch: TeacherBatch, start: int, stop: int) -> TeacherBatch:
        at = slice(start, stop)
        return TeacherBatch(
            batch.image[at], batch.regions[at], batch.region_mask[at], batch.inside[at], batch.target[at]
        )

    def encode(self, part: TeacherBatch) -> Vectors:
        return {
            "image": fuse(self.modules, self.spans, part.image, part.regions, part.region_mask, part.inside)
        }

    def fixed(self, batch: TeacherBatch) -> Vectors:
        return {"text": batch.target}

    def loss(self, live: Vectors, fixed: Vectors) -> tuple[Tensor, dict[str, float]]:
        owner = torch.arange(len(live["image"]), device=live["image"].device)
        encoded = Encoded(live["image"], fixed["text"], owner, self.unit_scale)
        return self.objectives(encoded, encoded), {}


def fuse(
    teacher: RegionTeacher,
    spans: Spans,
    image: Tensor,
    regions: Tensor,
    region_mask: Tensor,
    captions: list[str],
) -> Tensor:
    """The teacher's vectors [B, D] with these captions inside; an empty caption is fused as no span at
    all."""
    if teacher.cfg.fusion == "regions_only":
        none = torch.zeros(len(image), 0, image.shape[-1], device=image.device)
        return teacher(image, regions, region_mask, none, none[..., 0].bool())
    vectors, mask = spans([c or "a" for c in captions])
    texts = torch.tensor([bool(c) for c in captions], device=image.device)
    return teacher(image, regions, region_mask, vectors * texts[:, None, None], mask & texts[:, None])
