"""What a run needs: memory, by what is read and how. Says which reader fits, and what a plan shows."""

from dataclasses import dataclass

import torch

from dclip_qdrant.training.models.two_tower import TwoTower

HALF = 2  # bytes of a cached number

# Python's own, a worker: names and addresses of a picture, and a caption as text and as token ids. A round
# guess above the one measurement (benchmarks/memory.py): 1,500 bytes a picture of two captions without ids
PICTURE_BYTES = 500
CAPTION_BYTES = 600


@dataclass(frozen=True)
class Shape:
    """What is cached of the pictures of train."""

    pictures: int
    captions: float  # a picture
    views: int
    regions: int  # of a picture, at most; 0 where none are read
    teacher: int  # width of the teaching model's vectors
    trunk: int  # of the student's image trunk's features; 0 where it learns
    text_trunk: int  # of its text trunk's; 0 where they aren't cached
    targets: float  # the teacher's vectors of a view: one, or one for each caption; 0 without a teacher

    def numbers(self) -> float:
        """Cached numbers a picture."""
        of_view = self.teacher + self.trunk + self.targets * self.teacher
        of_caption = self.teacher + self.text_trunk
        of_region = self.teacher + self.trunk
        return self.views * of_view + self.captions * of_caption + self.regions * of_region

    def in_memory(self, ranks: int = 1) -> float:
        """Bytes on a node with so many workers, when it holds the whole split."""
        lists = ranks * self.pictures * (PICTURE_BYTES + self.captions * CAPTION_BYTES)
        return self.pictures * self.numbers() * HALF + lists


@torch.no_grad()
def trunk_widths(model: TwoTower, *, image: bool, text: bool) -> tuple[int, int]:
    """How many numbers the image trunk and the text trunk give; 0 for one that isn't asked for."""
    size = model.preprocess.size
    pixels = torch.zeros(1, 3, size, size, device=model.logit_scale.device)
    ids = model.tokens(["a"]).to(pixels.device)
    of_image = model.trunk(pixels).shape[-1] if image else 0
    return of_image, model.text_trunk(ids).shape[-1] if text else 0
