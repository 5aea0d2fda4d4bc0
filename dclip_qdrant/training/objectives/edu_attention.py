"""EduAttention and the refining KL of ComKD-CLIP (Chen et al. 2024; docs/papers.md 2.1), with captions in the
place of class texts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dclip_qdrant.training.encoded import Encoded


class EduAttention(nn.Module):
    """f_att = softmax(FC_q(u_s) FC_k(W)^T / sqrt(D)) FC_v(W),  f_e = u_s + alpha f_att,  alpha learned from
    0; L = KL(softmax(u_t W^T / tau) || softmax(f_e W^T / tau)) T^2, both logits at T besides, the mean over
    pictures [N].

    u_s = P s_i the student's images in the teacher's width, u_t the teacher's, W the teacher's text vectors
    [M, D]: the batch's captions here (our adaptation to retrieval; the paper has its classes' texts, see
    few_shot/comkd.py). All unit vectors. The attention is thrown away after training: a retriever's image
    vector can't hang on a batch of captions. The paper's C is unknown; sqrt(D) is attention's.
    """

    def __init__(
        self,
        *,
        student_dim: int,
        teacher_dim: int,
        temperature: float = 0.05,
        distill_temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if not (temperature > 0 and distill_temperature > 0):
            raise ValueError(
                f"temperature {temperature}, distill_temperature {distill_temperature} must be > 0"
            )
        self.temperature, self.distill_temperature = temperature, distill_temperature
        self.project = (
            nn.Identity() if student_dim == teacher_dim else nn.Linear(student_dim, teacher_dim, bias=False)
        )
        self.attention = Attention(teacher_dim)

    def forward(self, student: Encoded, teacher: Encoded) -> Tensor:
        unit = lambda x: F.normalize(x, dim=-1)
        w = unit(teacher.text)
        fused = self.attention(unit(self.project(student.image)), w)
        return refine(fused, unit(teacher.image), w, self.temperature, self.distill_temperature)


class Attention(nn.Module):
    """u [N, D], texts [C, D] -> u + alpha * attention over the texts [N, D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, u: Tensor, texts: Tensor) -> Tensor:
        weights = (self.query(u) @ self.key(texts).T / u.shape[-1] ** 0.5).softmax(-1)
        return u + self.alpha * (weights @ self.value(texts))


def refine(
    fused: Tensor, teacher: Tensor, texts: Tensor, temperature: float, distill_temperature: float
) -> Tensor:
    """KL between the teacher's image-text logits and the student's; [N, D], [N, D], [C, D] -> scalar."""
    t = (teacher @ texts.T / (temperature * distill_temperature)).log_softmax(-1)
    s = (fused @ texts.T / (temperature * distill_temperature)).log_softmax(-1)
    return F.kl_div(s, t, log_target=True, reduction="batchmean") * distill_temperature**2
