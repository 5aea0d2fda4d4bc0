"""RaFA, random feature alignment (CLIP-Refine, Yamaguchi et al., CVPR 2025): both vectors of a pair are drawn to one random point, which closes the modality gap."""

import torch
from torch import Tensor, nn

from dclip_qdrant.encoded import Encoded


class RandomAlignment(nn.Module):
    """L = mean over pairs of (|z_image - r|^2 + |z_text - r|^2) / (2 D), r ~ N(0, I) drawn anew for each pair of each step; vectors as the towers give them.

    The draw hangs on `seed` and on how often the objective was called, so that all workers see the same and a run can be repeated.
    """

    def __init__(self, *, student_dim: int, teacher_dim: int, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, student: Encoded, teacher: Encoded) -> Tensor:
        image, text = student.image[student.owner], student.text
        r = self.reference(len(text), text.shape[1]).to(text)
        if self.training and torch.is_grad_enabled():
            self.calls += 1
        return ((image - r).square().mean() + (text - r).square().mean()) / 2

    def reference(self, n: int, dim: int) -> Tensor:
        """[n, dim] of the step under way."""
        generator = torch.Generator().manual_seed((self.seed << 32) + int(self.calls))
        return torch.randn(n, dim, generator=generator)
