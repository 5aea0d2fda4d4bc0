"""Symmetric InfoNCE (van den Oord et al. 2018, eq. 4; CLIP's loss), with several captions a picture allowed."""

import torch.nn.functional as F
from torch import Tensor, nn

from dclip_qdrant.encoded import Encoded, positives


class InfoNce(nn.Module):
    """L = (CE(S / tau, Y) + CE(S^T / tau, Y^T)) / 2 with S = cos(image, text), [N, M] -> scalar.

    Y spreads a picture's mass evenly over its captions. `temperature`: tau (DCLIP: 0.05); null takes the model's own logit scale.
    """

    def __init__(self, *, student_dim: int, teacher_dim: int, temperature: float | None = 0.05) -> None:
        super().__init__()
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature {temperature} must be > 0")
        self.temperature = temperature

    def forward(self, student: Encoded, teacher: Encoded) -> Tensor:
        scale = student.logit_scale if self.temperature is None else 1 / self.temperature
        logits = scale * F.normalize(student.image, dim=-1) @ F.normalize(student.text, dim=-1).T
        y = positives(student.owner, len(student.image))
        by_image = F.cross_entropy(logits, y / y.sum(1, keepdim=True))
        return (by_image + F.cross_entropy(logits.T, student.owner)) / 2
