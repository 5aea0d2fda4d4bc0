"""Cosine distance to the teacher's vectors: the two distillation terms of DCLIP's hybrid loss (docs/papers.md
1.1)."""

import torch.nn.functional as F
from torch import Tensor, nn

from dclip_qdrant.training.encoded import Encoded

OF = ("image", "text", "regions", "rois", "spans", "pictures")


class Cosine(nn.Module):
    """mean_i 1 - cos(W s_i, t_i); [N, D] -> scalar in 0..2.

    `of`: image (student image to the teacher's fused embedding), text (student text to the frozen sentence
    vector), pictures (without captions, to what the teacher's model says of them; needs train.picture_share),
    or what the frozen base knew of single things: regions (crops, seen by themselves; needs
    train.region_share), rois (regions pooled from the student's patch features of the whole picture to the
    base's vector of the crop: CLIPSelf, Wu et al. 2024; FineCLIP, 2024), spans (phrases; ours; needs
    train.span_share). W is learned where the widths differ and thrown away after training; otherwise it is
    the identity.
    """

    def __init__(self, *, student_dim: int, teacher_dim: int, of: str = "image") -> None:
        super().__init__()
        if of not in OF:
            raise ValueError(f"of = {of!r} must be one of {', '.join(OF)}")
        self.of = of
        self.reads = (of, "roi_mask") if of == "rois" else (of,) if of not in ("image", "text") else ()
        self.project = (
            nn.Identity() if student_dim == teacher_dim else nn.Linear(student_dim, teacher_dim, bias=False)
        )

    def forward(self, student: Encoded, teacher: Encoded) -> Tensor:
        s, t = getattr(student, self.of), getattr(teacher, self.of)
        if s is None or t is None:
            raise ValueError(
                f"the batch has no {self.of}: set train.region_share, span_share or picture_share"
            )
        distance = 1 - F.cosine_similarity(self.project(s), t, dim=-1)
        if self.of == "rois":
            assert student.roi_mask is not None  # it comes with `rois`
            mask = student.roi_mask.to(distance.dtype)
            return (distance * mask).sum() / mask.sum().clamp(min=1)
        return distance.mean()
