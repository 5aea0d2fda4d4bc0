"""IFAlign of ComKD-CLIP (Chen et al. 2024; docs/papers.md 2.1): the student's image features get the
teacher's first and second moments."""

import torch.nn.functional as F
from torch import Tensor, nn

from dclip_qdrant.training.encoded import Encoded


class MomentAlignment(nn.Module):
    """L = |mean(u_s) - mean(u_t)|_1 + |var(u_s) - var(u_t)|_1, u_s = W s_i the student's images [N, D] in the
    teacher's width, u_t the teacher's.

    `axis`: batch = moments of each component over the pictures, D of each (what the paper's notes read most
    naturally as); feature = moments of each picture over its components, their distance averaged over
    pictures. The notes don't settle it. Variances divide by N, as printed. `normalise`: unit vectors first;
    ours, because two models' lengths need not agree.
    """

    def __init__(
        self, *, student_dim: int, teacher_dim: int, axis: str = "batch", normalise: bool = True
    ) -> None:
        super().__init__()
        if axis not in ("batch", "feature"):
            raise ValueError(f"axis = {axis!r} must be batch or feature")
        self.axis, self.normalise = axis, normalise
        self.project = (
            nn.Identity() if student_dim == teacher_dim else nn.Linear(student_dim, teacher_dim, bias=False)
        )

    def forward(self, student: Encoded, teacher: Encoded) -> Tensor:
        s, t = self.project(student.image), teacher.image
        if self.normalise:
            s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)
        return moments(s, t, self.axis)


def moments(s: Tensor, t: Tensor, axis: str) -> Tensor:
    """The distance of two sets of features [N, D] in mean and variance, in L1."""
    over = 0 if axis == "batch" else 1
    distance = (s.mean(over) - t.mean(over)).abs() + (
        s.var(over, unbiased=False) - t.var(over, unbiased=False)
    ).abs()
    return distance.sum() if axis == "batch" else distance.mean()
