"""What contrastive objectives share: cosine logits of two sets of vectors, and the ways to compare logits with labels and with a teacher's."""

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
    """InfoNCE of logits [N, M] against the true owners [M], the mean of both ways; a picture's mass is spread evenly over its captions."""
    y = positives(owner, len(logits))
    by_image = F.cross_entropy(logits, y / y.sum(1, keepdim=True))
    return (by_image + F.cross_entropy(logits.T, owner)) / 2


def divergence(s: Tensor, t: Tensor, y: Tensor, labels: float) -> Tensor:
    """KL(labels * y + (1 - labels) * softmax(t) || softmax(s)) over logits [N, M], the mean of both ways; y [N, M] is 1 where they belong together."""

    def one_way(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        q = labels * y / y.sum(1, keepdim=True) + (1 - labels) * t.softmax(-1)
        return F.kl_div(s.log_softmax(-1), q, reduction="batchmean")

    return (one_way(s, t, y) + one_way(s.T, t.T, y.T)) / 2
