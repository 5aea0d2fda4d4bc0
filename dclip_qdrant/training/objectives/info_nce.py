"""Symmetric InfoNCE (van den Oord et al. 2018, eq. 4; CLIP's loss), with several captions a picture
allowed."""

from torch import Tensor, nn

from dclip_qdrant.training.contrast import info_nce_of
from dclip_qdrant.training.encoded import Encoded


class InfoNce(nn.Module):
    """L = (CE(S / tau, Y) + CE(S^T / tau, Y^T)) / 2 with S = cos(image, text), [N, M] -> scalar.

    Y spreads a picture's mass evenly over its captions. `temperature`: tau (DCLIP: 0.05); null takes the
    model's own logit scale. A large batch is taken in blocks of rows: memory grows with N + M, not with
    N * M.
    """

    def __init__(self, *, student_dim: int, teacher_dim: int, temperature: float | None = 0.05) -> None:
        super().__init__()
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature {temperature} must be > 0")
        self.temperature = temperature

    def forward(self, student: Encoded, teacher: Encoded) -> Tensor:
        temperature = 1 / student.logit_scale if self.temperature is None else self.temperature
        return info_nce_of(student.image, student.text, student.owner, temperature)
