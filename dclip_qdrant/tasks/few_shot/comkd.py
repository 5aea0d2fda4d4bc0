"""ComKD-CLIP's two stages (Chen et al. 2024; docs/papers.md 2.1) as tasks of the training loop.

1. A teacher learns prompts in both towers from few labelled pictures; its class texts are then stored.
2. The student learns, without labels, prompts of its own and a projector to the teacher's width: IFAlign on
the moments, EduAttention over the stored
   class texts, KL to the teacher's logits. It has no text tower any more.

The paper's hyperparameters could not be read; its lineage's (PromptSRC, PromptKD) stand as defaults where
they fit our optimizer.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dclip_qdrant.tasks.few_shot.prompts import ImagePrompts, TextPrompts
from dclip_qdrant.training.loop import Vectors
from dclip_qdrant.training.models.two_tower import TwoTower
from dclip_qdrant.training.objectives.edu_attention import Attention, refine
from dclip_qdrant.training.objectives.moment_alignment import moments


@dataclass
class PictureBatch:
    pixels: Tensor  # [B, S, S, 3] uint8
    fixed: Vectors


class _Pictures:
    """What both stages share: pixels by index, in memory (few-shot sets are small)."""

    def __init__(self, pixels: np.ndarray, device: str) -> None:
        self.pixels, self.device, self.size = pixels, device, len(pixels)

    def begin(self, epoch: int) -> None:
        """Everything learns from the first epoch to the last."""

    def part(self, batch: PictureBatch, start: int, stop: int) -> PictureBatch:
        return PictureBatch(batch.pixels[start:stop], {})

    def fixed(self, batch: PictureBatch) -> Vectors:
        return batch.fixed

    def _batch(self, index: np.ndarray, **fixed: np.ndarray) -> PictureBatch:
        return PictureBatch(
            torch.from_numpy(self.pixels[index]).to(self.device),
            {k: torch.from_numpy(v[index]).float().to(self.device) for k, v in fixed.items()},
        )


class PromptedTeacher(_Pictures):
    """Stage 1. Cross-entropy over the base classes, and PromptSRC's pull to what the frozen model said: L1
    between prompted and plain vectors, text x 25 and image x 10, and KL between their logits (docs/papers.md
    2.2)."""

    def __init__(
        self,
        tower: TwoTower,
        pixels: np.ndarray,
        labels: np.ndarray,
        names: list[str],
        *,
        lr: float,
        depth: int = 9,
        device: str = "cpu",
    ) -> None:
        super().__init__(pixels, device)
        self.tower, self.labels, self.lr, self.scale = tower.to(device), labels, lr, tower.logit_scale.item()
        self.modules: nn.Module = ImagePrompts(self.tower, depth=depth).to(device)
        self.objectives: nn.Module = TextPrompts(self.tower, names, depth=depth).to(device)
        with torch.no_grad():
            self.plain_text = F.normalize(self.tower.encode_text(self.objectives.ids), dim=-1)
        self.plain = plain_features(self.tower, pixels, device)

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.modules.parameters()), "lr": self.lr, "weight_decay": 0.0}]

    def batch(self, index: np.ndarray, epoch: int) -> PictureBatch:
        return self._batch(index, label=self.labels.astype(np.float32), plain=self.plain)

    def encode(self, part: PictureBatch) -> Vectors:
        return {"image": self.modules(self.tower.normalised(part.pixels))}

    def loss(self, live: Vectors, fixed: Vectors) -> tuple[Tensor, dict[str, float]]:
        image, text = F.normalize(live["image"], dim=-1), F.normalize(self.objectives(), dim=-1)
        plain = F.normalize(fixed["plain"], dim=-1)
        logits, was = self.scale * image @ text.T, self.scale * plain @ self.plain_text.T
        ce = F.cross_entropy(logits, fixed["label"].long())
        keep = 25 * (text - self.plain_text).abs().mean() + 10 * (image - plain).abs().mean()
        keep = (
            keep
            + F.kl_div(logits.log_softmax(-1), was.log_softmax(-1), log_target=True, reduction="batchmean")
            / logits.shape[1]
        )
        return ce + keep, {"ce": ce.item()}


class Projector(nn.Module):
    """The student's vector in the teacher's space [B, D] -> [B, D_t]: two layers, as PromptKD's, with
    LayerNorm for its BatchNorm (a batch of any size)."""

    def __init__(self, dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, teacher_dim),
            nn.LayerNorm(teacher_dim),
            nn.ReLU(),
            nn.Linear(teacher_dim, teacher_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class PromptedStudent(nn.Module):
    """What is left at inference: the student's image tower with its prompts, the projector, the attention
    over stored class texts."""

    def __init__(self, tower: TwoTower, teacher_dim: int, *, scale: float, depth: int = 9) -> None:
        """`scale`: the teacher's own logit scale, 1 / tau of both."""
        super().__init__()
        self.scale = scale
        self.prompts, self.projector, self.attention = (
            ImagePrompts(tower, depth=depth),
            Projector(tower.dim, teacher_dim),
            Attention(teacher_dim),
        )

    def project(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S] -> u_s, unit vectors [B, D_t]."""
        return F.normalize(self.projector(self.prompts(pixels)), dim=-1)

    def logits(self, projected: Tensor, texts: Tensor) -> Tensor:
        """u_s [B, D_t] and unit class texts [C, D_t] -> [B, C] through f_e = u_s + alpha f_att."""
        return self.attention(projected, texts) @ texts.T * self.scale


class UnlabelledStudent(_Pictures):
    """Stage 2. L = KL(softmax(u_t W^T / tau) || softmax(f_e W^T / tau)) + L_align, weights 1 : 1 as in the
    paper's notes.

    `teacher`: u_t, unit vectors [N, D_t] of the same pictures; `texts`: the stored class texts [C, D_t], unit
    vectors; `scale`: 1 / tau, the teacher's own.
    """

    def __init__(
        self,
        tower: TwoTower,
        pixels: np.ndarray,
        teacher: np.ndarray,
        texts: Tensor,
        *,
        scale: float,
        lr: float,
        axis: str = "batch",
        align: float = 1.0,
        attention: bool = True,
        depth: int = 9,
        device: str = "cpu",
    ) -> None:
        super().__init__(pixels, device)
        self.tower, self.teacher, self.texts, self.lr, self.axis, self.align = (
            tower.to(device),
            teacher,
            texts.to(device),
            lr,
            axis,
            align,
        )
        self.student = PromptedStudent(self.tower, teacher.shape[1], scale=scale, depth=depth).to(device)
        self.student.attention.requires_grad_(attention)
        self.modules: nn.Module = nn.ModuleList([self.student.prompts, self.student.projector])
        self.objectives: nn.Module = self.student.attention

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.modules.parameters()), "lr": self.lr, "weight_decay": 0.0}]

    def batch(self, index: np.ndarray, epoch: int) -> PictureBatch:
        return self._batch(index, teacher=self.teacher)

    def encode(self, part: PictureBatch) -> Vectors:
        return {"image": self.student.project(self.tower.normalised(part.pixels))}

    def loss(self, live: Vectors, fixed: Vectors) -> tuple[Tensor, dict[str, float]]:
        fused = self.student.attention(live["image"], self.texts)
        kl = refine(fused, fixed["teacher"], self.texts, 1 / self.student.scale, 1.0)
        align = moments(live["image"], fixed["teacher"], self.axis)
        return kl + self.align * align, {"kl": kl.item(), "align": align.item()}


@torch.no_grad()
def over(f: Any, pixels: np.ndarray, tower: TwoTower, device: str, batch: int = 64) -> np.ndarray:
    """f(normalised pixels) over pixels [N, S, S, 3] in batches -> [N, ...]."""
    out = [
        f(tower.normalised(torch.from_numpy(pixels[i : i + batch]).to(device))).float().cpu().numpy()
        for i in range(0, len(pixels), batch)
    ]
    return np.concatenate(out)


def plain_features(tower: TwoTower, pixels: np.ndarray, device: str) -> np.ndarray:
    """[N, D] of the tower without prompts, not normalised."""
    return over(tower.encode_image, pixels, tower, device)
