"""Short vectors that work by themselves: Matryoshka representation learning (Kusupati et al. 2022, eq. 1) for
two towers."""

import torch
from torch import Tensor, nn

from dclip_qdrant.training.contrast import cosine_logits, divergence, positives, prefix
from dclip_qdrant.training.encoded import Encoded


class Matryoshka(nn.Module):
    """L = mean over d in `dims` of KL(labels * Y + (1 - labels) * softmax(S / tau) || softmax(S_d / tau)),
    both ways; [N, M] -> scalar.

    S_d = cos of the first d components. labels = 1 is the paper's sum of contrastive losses over prefixes (up
    to a constant); 0 asks each prefix for the order that the whole vector gives, which is what recall through
    an index counts (ours). `dims`: see `contrast.prefix`.
    """

    def __init__(
        self,
        *,
        student_dim: int,
        teacher_dim: int,
        dims: tuple[int | float, ...] = (0.5, 0.25),
        temperature: float = 0.05,
        labels: float = 1.0,
    ) -> None:
        super().__init__()
        if not dims:
            raise ValueError("dims are empty: at least one length, like 0.5")
        if not (temperature > 0 and 0 <= labels <= 1):
            raise ValueError(f"temperature {temperature} must be > 0, labels {labels} in 0..1")
        self.dims, self.temperature, self.labels = (
            tuple(prefix(d, student_dim) for d in dims),
            temperature,
            labels,
        )

    def forward(self, student: Encoded, teacher: Encoded) -> Tensor:
        y = positives(student.owner, len(student.image))
        whole = self._logits(student, student.image.shape[-1]).detach()
        terms = [divergence(self._logits(student, d), whole, y, self.labels) for d in self.dims]
        return sum(terms, torch.zeros(())) / len(terms)

    def _logits(self, student: Encoded, d: int) -> Tensor:
        return cosine_logits(student.image[:, :d], student.text[:, :d], self.temperature)
