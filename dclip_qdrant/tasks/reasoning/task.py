"""CLIP-TD's training (docs/papers.md 4.1): task loss plus distillation from the tokens that matter, weighted
by how sure CLIP is, in two steps.

    L = L_task + lambda sum_i w_i D_i / sum_i w_i

`naive` D: whole picture and whole sentence. `targeted` D adds the regions and words that fit the sentence
best. Distances are L1 between unit vectors; the student's states are mapped to CLIP's width (the paper's
sketch maps CLIP's to the student's, where a target could be learned away). Two steps (adaptive finetuning):
first distillation with the task at `adapt_task`, then the task with distillation at `finetune_distill`.
Distillation needs no answers, so the first step may also see the pictures and texts of unlabelled examples
(`unlabelled`, ours; off, where the paper's text could not be read).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torchvision.ops import roi_align

from dclip_qdrant.tasks.reasoning.examples import Example
from dclip_qdrant.tasks.reasoning.fused_encoder import Fused, FusedEncoder, Head
from dclip_qdrant.tasks.reasoning.teacher import Seen
from dclip_qdrant.training.loop import Vectors
from dclip_qdrant.training.models.two_tower import TwoTower
from dclip_qdrant.training.token_selection import select


class Config(BaseModel):
    """Sizes of the student, epochs of the two steps, and what is distilled."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    distill: str = Field(default="targeted", pattern="^(none|naive|targeted)$")
    weight: float = Field(default=0.2, ge=0, description="lambda")
    confidence: bool = Field(
        default=True, description="weigh examples by how sure CLIP is (CW); off: all alike"
    )
    regions: int = Field(default=2, gt=0, description="regions chosen of each picture (TS visual)")
    words: int = Field(default=3, gt=0, description="words chosen of each sentence (TS text)")
    adapt_epochs: int = Field(default=8, ge=0, description="first step: distillation")
    finetune_epochs: int = Field(default=8, gt=0, description="second step: the task")
    adapt_task: float = Field(default=1.0, ge=0, description="the task's weight in the first step")
    finetune_distill: float = Field(default=0.5, ge=0, description="of lambda, in the second step")
    unlabelled: bool = Field(
        default=False,
        description=(
            "the first step also sees the pictures and texts of the examples outside the part, "
            "never their answers (ours)"
        ),
    )
    lr: float = Field(default=5e-4, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    batch_size: int = Field(default=64, gt=0)
    image_size: int = 64
    patch: int = 8
    width: int = 128
    heads: int = 4
    alone: int = 2
    together: int = 2
    dropout: float = Field(default=0.1, ge=0, lt=1)
    top_k: int = Field(default=4, gt=0, description="regions a picture to choose from")
    seed: int = 0


class FusedStudent(nn.Module):
    """The encoder, its task head, and the maps to CLIP's width that are thrown away after training."""

    def __init__(
        self, cfg: Config, *, answers: int, vocabulary: int, length: int, teacher_dim: int, pad_id: int
    ) -> None:
        super().__init__()
        self.encoder = FusedEncoder(
            vocabulary=vocabulary,
            image_size=cfg.image_size,
            patch=cfg.patch,
            length=length,
            width=cfg.width,
            heads=cfg.heads,
            alone=cfg.alone,
            together=cfg.together,
            dropout=cfg.dropout,
            pad_id=pad_id,
        )
        self.head = Head(cfg.width, answers)
        self.to_image, self.to_text, self.to_region, self.to_word = (
            nn.Linear(cfg.width, teacher_dim) for _ in range(4)
        )


@dataclass
class ExampleBatch:
    """`ids` [B, K, L]: K texts an example (choices), K = 1 where there are none. `draw` seeds dropout:
    gradient caching runs a part twice, and a resumed run again."""

    pixels: Tensor
    ids: Tensor
    fixed: Vectors
    draw: int


class Reasoning:
    """See `loop.Task`: one of the three tasks over examples in memory."""

    def __init__(
        self,
        examples: Sequence[Example],
        seen: Seen,
        tower: TwoTower,
        cfg: Config,
        *,
        target: np.ndarray,
        confidence: np.ndarray | None,
        soft: bool,
        adapting: bool = False,
        device: str = "cpu",
    ) -> None:
        """`target` [L, A]: soft scores, or one-hot labels (of choices, A their number), of the first L
        examples: the others are unlabelled. `soft`: several answers can be right (VQA): binary cross-entropy.
            `adapting`: the first of the two steps."""
        self.examples, self.seen, self.tower, self.cfg, self.device, self.soft = (
            examples,
            seen,
            tower.to(device),
            cfg,
            device,
            soft,
        )
        self.size, self.known = len(examples), np.arange(len(examples)) < len(target)
        self.target = np.concatenate(
            [target, np.zeros((len(examples) - len(target), target.shape[1]), np.float32)]
        )
        self.confidence = np.ones(len(examples), np.float32) if confidence is None else confidence
        self.multiple = bool(examples[0].choices)
        self.texts = [
            tuple(f"{e.text} {c}" for c in e.choices) if self.multiple else (e.text,) for e in examples
        ]
        torch.manual_seed(cfg.seed)
        self.student = FusedStudent(
            cfg,
            answers=1 if self.multiple else target.shape[1],
            vocabulary=tower.vocabulary_size,
            pad_id=tower.pad_id,
            length=tower.context_length,
            teacher_dim=tower.dim,
        ).to(device)
        self.modules: nn.Module = self.student
        self.objectives: nn.Module = nn.Module()
        self.task_weight = cfg.adapt_task if adapting else 1.0
        self.distill_weight = (
            0.0 if cfg.distill == "none" else cfg.weight * (1.0 if adapting else cfg.finetune_distill)
        )

    def groups(self) -> list[dict[str, Any]]:
        matrices = [p for p in self.student.parameters() if p.ndim >= 2]
        rest = [p for p in self.student.parameters() if p.ndim < 2]
        return [
            {"params": matrices, "lr": self.cfg.lr, "weight_decay": self.cfg.weight_decay},
            {"params": rest, "lr": self.cfg.lr, "weight_decay": 0.0},
        ]

    def begin(self, epoch: int) -> None:
        self.student.train()

    def batch(self, index: np.ndarray, epoch: int) -> ExampleBatch:
        s = self.seen
        rows = np.array([s.number[self.examples[i].picture] for i in index])
        ids = torch.stack([self._ids(self.texts[i]) for i in index]).to(self.device)
        ids = ids[
            ..., : int((ids != self.tower.pad_id).any(0).any(0).nonzero().max()) + 1
        ]  # what is padding in every row is no work
        fixed = {"target": self.target[index], "weight": self.confidence[index], "known": self.known[index]}
        out = ExampleBatch(
            torch.from_numpy(s.pixels[rows]).to(self.device),
            ids,
            {k: torch.from_numpy(v).float().to(self.device) for k, v in fixed.items()},
            int(np.random.default_rng([self.cfg.seed, epoch, int(index[0])]).integers(1 << 40)),
        )
        if self.cfg.distill != "none":
            right = self.target[index].argmax(1) if self.multiple else np.zeros(len(index), int)
            out.fixed |= {
                "right": torch.from_numpy(right).to(self.device),
                "image": torch.from_numpy(s.image[rows]).to(self.device),
                "crops": torch.from_numpy(s.crops[rows]).to(self.device),
                "boxes": torch.from_numpy(s.boxes[rows]).to(self.device),
                "mask": torch.from_numpy(s.mask[rows]).to(self.device),
            }
        return out

    def _ids(self, texts: tuple[str, ...]) -> Tensor:
        return self.tower.tokenizer(list(texts), context_length=self.tower.context_length)

    def part(self, batch: ExampleBatch, start: int, stop: int) -> ExampleBatch:
        return ExampleBatch(
            batch.pixels[start:stop],
            batch.ids[start:stop],
            {k: v[start:stop] for k, v in batch.fixed.items()},
            batch.draw + start,
        )

    def encode(self, part: ExampleBatch) -> Vectors:
        """scores [B, A] and the distillation distance of each example [B]."""
        b, k, length = part.ids.shape
        pixels = self.tower.normalised(part.pixels)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(part.draw)
            fused = self.student.encoder(pixels.repeat_interleave(k, 0), part.ids.reshape(b * k, length))
        scores = self.student.head(fused).reshape(b, -1) if self.multiple else self.student.head(fused)
        out = {"scores": scores}
        if self.distill_weight and "right" in part.fixed:
            at = torch.arange(b, device=scores.device) * k + part.fixed["right"].long()
            out["distance"] = self._distance(
                Fused(fused.image[at], fused.text[at], fused.patches[at], fused.words[at]),
                part,
                part.ids.reshape(b * k, length)[at],
            )
        return out

    def _distance(self, h: Fused, part: ExampleBatch, ids: Tensor) -> Tensor:
        """D_i [B]: the student against CLIP on the picture with its right text."""
        with torch.no_grad():
            sentence, tokens, is_word = self.tower.encode_words(ids)
        f = part.fixed
        d = l1(self.student.to_image(h.image), f["image"]) + l1(self.student.to_text(h.text), sentence)
        if self.cfg.distill == "naive":
            return d
        b, r = f["mask"].shape
        side = h.patches.shape[-1]
        pooled = roi_align(h.patches.float(), list(f["boxes"].float() * side), output_size=1, aligned=True)[
            :, :, 0, 0
        ].reshape(b, r, -1)
        regions = chosen_mean(
            l1(self.student.to_region(pooled), f["crops"]),
            select(
                F.cosine_similarity(f["crops"], sentence[:, None], dim=-1), f["mask"].bool(), self.cfg.regions
            ),
        )
        words = chosen_mean(
            l1(self.student.to_word(h.words), tokens),
            select(F.cosine_similarity(tokens, sentence[:, None], dim=-1), is_word, self.cfg.words),
        )
        return d + regions + words

    def fixed(self, batch: ExampleBatch) -> Vectors:
        return {k: batch.fixed[k] for k in ("target", "weight", "known")}

    def loss(self, live: Vectors, fixed: Vectors) -> tuple[Tensor, dict[str, float]]:
        known = fixed["known"].bool()
        task = (
            task_loss(live["scores"][known], fixed["target"][known], self.soft)
            if known.any()
            else live["scores"].sum() * 0
        )
        # a labelled example counts the same in any company
        total, terms = (
            self.task_weight * known.float().mean() * task,
            {"task": task.item()},
        )
        if "distance" in live:
            w = fixed["weight"] if self.cfg.confidence else torch.ones_like(fixed["weight"])
            distill = (w * live["distance"]).sum() / w.sum().clamp(min=1e-9)
            total, terms = total + self.distill_weight * distill, terms | {"distill": distill.item()}
        return total, terms

    @torch.no_grad()
    def scores(self, batch_size: int = 128) -> np.ndarray:
        """[N, A] of all examples, as they stand."""
        self.student.eval()
        out = []
        for start in range(0, self.size, batch_size):
            b = self.batch(np.arange(start, min(start + batch_size, self.size)), 0)
            b.fixed.pop("right", None)
            out.append(self.encode(b)["scores"].float().cpu().numpy())
        return np.concatenate(out)


def task_loss(scores: Tensor, target: Tensor, soft: bool) -> Tensor:
    """Cross-entropy over [B, A] against one right answer, or binary cross-entropy summed over answers against
    soft scores (VQA's practice)."""
    if soft:
        return F.binary_cross_entropy_with_logits(scores, target, reduction="none").sum(1).mean()
    return F.cross_entropy(scores, target)


def l1(a: Tensor, b: Tensor) -> Tensor:
    """|n(a) - n(b)|_1 over the last dimension, n(x) = x / |x|."""
    return (F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).abs().sum(-1)


def chosen_mean(distance: Tensor, chosen: Tensor) -> Tensor:
    """[B, K] -> [B]: the mean over what was chosen; 0 where nothing was."""
    c = chosen.to(distance.dtype)
    return (distance * c).sum(1) / c.sum(1).clamp(min=1)
