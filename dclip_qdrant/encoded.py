"""What one model says about one batch: the one type that objectives see."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Encoded:
    """The whole (gathered) batch. Vectors are as the tower gave them; objectives normalise.

    image [N, D]; text [M, D]; owner [M]: the picture each caption belongs to; logit_scale: the model's own 1/temperature;
    regions [R, D]: crops drawn from the pictures, where the recipe asks for them (train.region_share); the teacher's are the frozen base's.
    """

    image: Tensor
    text: Tensor
    owner: Tensor
    logit_scale: Tensor
    regions: Tensor | None = None

    def with_vectors(self, image: Tensor, text: Tensor, regions: Tensor | None = None) -> "Encoded":
        return Encoded(image, text, self.owner, self.logit_scale, regions)
