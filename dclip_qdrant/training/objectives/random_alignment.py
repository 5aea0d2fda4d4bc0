"""RaFA, random feature alignment (CLIP-Refine, Yamaguchi et al., CVPR 2025): both vectors of a pair are drawn
to one random point, which closes the modality gap."""

import torch.nn.functional as F
from torch import Tensor, nn

from dclip_qdrant.training.encoded import Encoded


class RandomAlignment(nn.Module):
    """L = mean over pairs of (|z_image - r|^2 + |z_text - r|^2) / (2 D), r ~ N(0, I) drawn anew for each pair
    of each step [M, D].

    The vectors are as the towers give them (docs/papers.md 5.2: MSE to z ~ N(0, I)); `normalise` takes unit
    vectors and r / |r| instead (ours), for towers whose vectors are far from length sqrt(D).
    """

    reads = ("noise",)

    def __init__(self, *, student_dim: int, teacher_dim: int, normalise: bool = False) -> None:
        super().__init__()
        self.normalise = normalise

    def forward(self, student: Encoded, teacher: Encoded) -> Tensor:
        if student.noise is None:
            raise ValueError("the batch has no noise")
        image, text, r = student.image[student.owner], student.text, student.noise
        if self.normalise:
            image, text, r = (F.normalize(x, dim=-1) * r.shape[1] ** 0.5 for x in (image, text, r))
        return (F.mse_loss(image, r) + F.mse_loss(text, r)) / 2
