"""Cosine distance to the teacher's vectors: the two distillation terms of DCLIP's hybrid loss (papers.md 1.1)."""

import torch.nn.functional as F
from torch import Tensor, nn

from dclip_qdrant.encoded import Encoded


class Cosine(nn.Module):
    """mean_i 1 - cos(W s_i, t_i) over images, texts or regions; [N, D] -> scalar in 0..2.

    `of`: image (student image to the teacher's fused embedding), text (student text to the frozen sentence vector), or regions (student crop to
    the frozen base's crop: what CLIP knew of single things; needs train.region_share; ours, after CLIPSelf, Wu et al. 2024).
    W is learned where the widths differ and thrown away after training; otherwise it is the identity.
    """

    def __init__(self, *, student_dim: int, teacher_dim: int, of: str = "image") -> None:
        super().__init__()
        if of not in ("image", "text", "regions"):
            raise ValueError(f"of = {of!r} must be image, text or regions")
        self.of = of
        self.project = nn.Identity() if student_dim == teacher_dim else nn.Linear(student_dim, teacher_dim, bias=False)

    def forward(self, student: Encoded, teacher: Encoded) -> Tensor:
        s, t = getattr(student, self.of), getattr(teacher, self.of)
        if s is None or t is None:
            raise ValueError(f"the batch has no {self.of}: set train.region_share")
        return (1 - F.cosine_similarity(self.project(s), t, dim=-1)).mean()
