"""What contrastive objectives share: cosine logits of two sets of vectors, the ways to compare logits with
labels and with a teacher's, prefixes of vectors."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_logits(a: Tensor, b: Tensor, temperature: float | Tensor) -> Tensor:
    """a [N, D], b [M, D], not normalised -> cos / temperature [N, M]."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T / temperature


def positives(owner: Tensor, n: int) -> Tensor:
    """[N, M] 1.0 where caption m belongs to picture n."""
    return (torch.arange(n, device=owner.device)[:, None] == owner[None]).float()


def info_nce(logits: Tensor, owner: Tensor) -> Tensor:
    """InfoNCE of logits [N, M] against the true owners [M], the mean of both ways; a picture's mass is spread
    evenly over its captions."""
    y = positives(owner, len(logits))
    by_image = F.cross_entropy(logits, y / y.sum(1, keepdim=True))
    return (by_image + F.cross_entropy(logits.T, owner)) / 2


def divergence(s: Tensor, t: Tensor | Sequence[Tensor], y: Tensor, labels: float) -> Tensor:
    """KL(labels * y + (1 - labels) * mean_m softmax(t_m) || softmax(s)) over logits [N, M], the mean of both
    ways; y [N, M] is 1 where they belong together.

    `t`: one teacher's logits, or several teachers' (averaged after their softmax, as MobileCLIP does).
    """
    several = [t] if isinstance(t, Tensor) else list(t)

    def one_way(s: Tensor, several: list[Tensor], y: Tensor) -> Tensor:
        q = labels * y / y.sum(1, keepdim=True) + (1 - labels) * sum(t.softmax(-1) for t in several) / len(
            several
        )
        return F.kl_div(s.log_softmax(-1), q, reduction="batchmean")

    return (one_way(s, several, y) + one_way(s.T, [t.T for t in several], y.T)) / 2


def prefix(length: int | float, width: int) -> int:
    """How many components: a whole number, or below 1 that part of `width`.

    Raises:
        ValueError: neither, or more than `width`.
    """
    if not (length > 0 and (length < 1 or int(length) == length)):
        raise ValueError(
            f"length {length} must be a whole number of components, or a part of them between 0 and 1"
        )
    if length > width:
        raise ValueError(f"length {length} is more than the student's {width}")
    return int(length) if length >= 1 else max(1, round(length * width))
