"""A batch of vectors for tests of objectives."""

import torch

from dclip_qdrant.training.encoded import Encoded


def encoded(n=6, c=1, d=5, seed=0, dtype=torch.float32, grad=False):
    """A batch with everything that an objective may read."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)
    image, text = draw(n, d), draw(n * c, d)
    return Encoded(
        image.requires_grad_(grad),
        text.requires_grad_(grad),
        torch.arange(n).repeat_interleave(c),
        torch.tensor(10.0, dtype=dtype),
        rois=draw(n, 3, d).requires_grad_(grad),
        roi_mask=torch.tensor([[True, True, i % 2 == 0] for i in range(n)]),
        words=draw(n * c, 4, d).requires_grad_(grad),
        word_mask=torch.tensor([[True, True, True, i % 2 == 1] for i in range(n * c)]),
        noise=draw(n * c, d),
    )
