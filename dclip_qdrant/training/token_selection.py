"""What CLIP-TD's two forms share: which tokens are distilled, and how sure the teacher is (docs/papers.md
4.1: our reading)."""

import torch
from torch import Tensor

from dclip_qdrant.training.contrast import cosine_logits, positives


def select(score: Tensor, mask: Tensor, top: int) -> Tensor:
    """score [B, K], mask [B, K] -> [B, K] bool: the `top` best-scored tokens of each row among those of the
    mask (all, where there are fewer)."""
    ranked = score.masked_fill(~mask, -torch.inf)
    best = ranked.topk(min(top, score.shape[1]), dim=1).indices
    return torch.zeros_like(mask).scatter(1, best, True) & mask


def confidence(image: Tensor, text: Tensor, owner: Tensor, temperature: float) -> Tensor:
    """image [N, D], text [M, D], owner [M] -> [M]: the softmax probability of each right pair, the mean of
    both ways (a picture's captions count together)."""
    logits = cosine_logits(image, text, temperature)
    y = positives(owner, len(image))
    to_image = logits.softmax(0)[owner, torch.arange(len(owner), device=owner.device)]
    to_text = (logits.softmax(1) * y).sum(1)[owner]
    return (to_image + to_text) / 2
