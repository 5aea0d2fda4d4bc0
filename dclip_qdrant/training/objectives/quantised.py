"""Vectors that survive the index: the contrastive loss as seen through int8 or binary quantisation, with
straight-through gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dclip_qdrant.training.contrast import cosine_logits, divergence, positives, prefix
from dclip_qdrant.training.encoded import Encoded

QUANTILE = 0.99  # what our collections ask Qdrant's scalar quantisation for
LEVELS = 127  # Qdrant's int8 codes run from 0 to 127


class Quantised(nn.Module):
    """L = KL(labels * Y + (1 - labels) * softmax(S / tau) || softmax(S_q / tau)), both ways; [N, M] ->
    scalar.

    S_q compares vectors after quantisation: `int8` clips to the batch's 0.99 quantile range and rounds to 128
    levels, as Qdrant's scalar quantisation does; `binary` keeps the signs. `dim` first cuts to a
    `contrast.prefix`. Rounding passes its gradient straight through (Bengio et al. 2013); the sign passes
    that of tanh(sharpness * sqrt(D) * x), x a unit vector, so that components far from zero rest. `query`:
    binary compares signs with signs, as Qdrant does unless told otherwise; float keeps the text side whole
    (asymmetric, Qdrant's scalar query encoding).
    """

    def __init__(
        self,
        *,
        student_dim: int,
        teacher_dim: int,
        level: str = "int8",
        dim: int | float | None = None,
        query: str = "same",
        temperature: float = 0.05,
        labels: float = 0.0,
        sharpness: float = 1.0,
    ) -> None:
        super().__init__()
        if level not in ("int8", "binary"):
            raise ValueError(f"level = {level!r} must be int8 or binary")
        if query not in ("same", "float"):
            raise ValueError(f"query = {query!r} must be same or float")
        if not (temperature > 0 and 0 <= labels <= 1 and sharpness > 0):
            raise ValueError(
                f"temperature {temperature}, sharpness {sharpness} must be > 0, labels {labels} in 0..1"
            )
        dim = None if dim is None else prefix(dim, student_dim)
        self.level, self.dim, self.query, self.temperature, self.labels, self.sharpness = (
            level,
            dim,
            query,
            temperature,
            labels,
            sharpness,
        )

    def forward(self, student: Encoded, teacher: Encoded) -> Tensor:
        image, text = (F.normalize(x[:, : self.dim], dim=-1) for x in (student.image, student.text))
        whole = cosine_logits(student.image, student.text, self.temperature).detach()
        logits = cosine_logits(
            self._quantise(image), text if self.query == "float" else self._quantise(text), self.temperature
        )
        return divergence(logits, whole, positives(student.owner, len(image)), self.labels)

    def _quantise(self, x: Tensor) -> Tensor:
        if self.level == "int8":
            return int8(x)
        return sign(x, self.sharpness)


def int8(x: Tensor) -> Tensor:
    """x [N, D] rounded to 128 levels between its quantiles; the gradient passes where nothing was clipped."""
    values = x.detach().flatten()
    low, high = _quantiles(values, (1 - QUANTILE) / 2)
    step = ((high - low) / LEVELS).clamp_min(1e-12)
    clipped = x.clamp(low, high)
    rounded = ((clipped.detach() - low) / step).round() * step + low
    return clipped + (rounded - clipped).detach()


def sign(x: Tensor, sharpness: float = 1.0) -> Tensor:
    """+1 above zero, else -1 (Qdrant's bit is x > 0); the gradient of tanh(sharpness * sqrt(D) * x)."""
    soft = torch.tanh(sharpness * x.shape[-1] ** 0.5 * x)
    hard = torch.where(x > 0, 1.0, -1.0)
    return soft + (hard - soft).detach()


def _quantiles(values: Tensor, tail: float) -> tuple[Tensor, Tensor]:
    k = max(1, round(tail * len(values)))  # torch.quantile stops at 16 million values
    return values.kthvalue(k).values, values.kthvalue(len(values) - k + 1).values
