"""What contrastive objectives share: cosine logits of two sets of vectors, the ways to compare logits with
labels and with a teacher's, prefixes of vectors."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dclip_qdrant.training.encoded import Blend


def cosine_logits(a: Tensor, b: Tensor, temperature: float | Tensor) -> Tensor:
    """a [N, D], b [M, D], not normalised -> cos / temperature [N, M]."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T / temperature


def positives(owner: Tensor, n: int, blend: Blend | None = None) -> Tensor:
    """[N, M] 1.0 where caption m belongs to picture n; of blended pictures each one's share (mixup, Zhang et
    al. 2018, eq. 1, of labels)."""
    y = (torch.arange(n, device=owner.device)[:, None] == owner[None]).float()
    return y if blend is None else torch.lerp(y[blend.partner], y, blend.share[:, None])


def info_nce(logits: Tensor, owner: Tensor) -> Tensor:
    """InfoNCE of logits [N, M] against the true owners [M], the mean of both ways; a picture's mass is spread
    evenly over its captions."""
    y = positives(owner, len(logits))
    by_image = F.cross_entropy(logits, y / y.sum(1, keepdim=True))
    return (by_image + F.cross_entropy(logits.T, owner)) / 2


WHOLE = 1 << 26  # logits that are held at once; beyond it they are made in blocks of rows
BLOCK = 1024  # rows


def info_nce_of(image: Tensor, text: Tensor, owner: Tensor, temperature: float | Tensor) -> Tensor:
    """`info_nce` of image [N, D] and text [M, D], not normalised, in memory that grows with N + M where N * M
    is large. The same value and gradient."""
    if len(image) * len(text) <= WHOLE:
        return info_nce(cosine_logits(image, text, temperature), owner)
    tau = torch.as_tensor(temperature, device=image.device)
    loss = _InBlocks.apply(F.normalize(image, dim=-1), F.normalize(text, dim=-1), tau, owner)
    return cast(Tensor, loss)


class _InBlocks(torch.autograd.Function):
    """InfoNCE of unit vectors a [N, D], b [M, D], block of rows by block of rows; each block's gradient is
    taken at once, so that no block's logits wait for the backward pass."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, tau: Tensor, owner: Tensor) -> Tensor:
        inputs = [x.detach().requires_grad_() for x in (a, b, tau)]
        gradients = [torch.zeros_like(x) for x in inputs]
        total = torch.zeros((), device=a.device)

        def of_images(start: int, stop: int) -> Tensor:
            a, b, tau = inputs
            y = (torch.arange(start, stop, device=owner.device)[:, None] == owner[None]).float()
            logits = a[start:stop] @ b.T / tau
            return F.cross_entropy(logits, y / y.sum(1, keepdim=True), reduction="sum") / (2 * len(a))

        def of_texts(start: int, stop: int) -> Tensor:
            a, b, tau = inputs
            logits = b[start:stop] @ a.T / tau
            return F.cross_entropy(logits, owner[start:stop], reduction="sum") / (2 * len(b))

        for one_way, rows in ((of_images, len(a)), (of_texts, len(b))):
            for start in range(0, rows, BLOCK):
                with torch.enable_grad():
                    loss = one_way(start, min(start + BLOCK, rows))
                    for sums, own in zip(gradients, torch.autograd.grad(loss, inputs), strict=True):
                        sums += own
                total += loss.detach()
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        (upstream,) = outputs
        return (*(upstream * gradient for gradient in ctx.saved_tensors), None)


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
