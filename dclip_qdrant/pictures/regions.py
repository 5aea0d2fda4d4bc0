"""Regions: boxes that a detector found in one picture. The value type knows no vendor."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

CONTEXT = 0.1  # each side of a crop is widened by this part of the box


@dataclass(frozen=True)
class Regions:
    """Boxes of one picture, in pixels of the upright image; none at all is normal."""

    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))  # [R, 4] x0, y0, x1, y1
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))  # [R] 0..1
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (self.boxes.shape == (len(self.labels), 4) and self.scores.shape == (len(self.labels),)):
            raise ValueError(
                f"boxes {self.boxes.shape}, scores {self.scores.shape}, {len(self.labels)} "
                "labels: they must be of one length"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray) -> "Regions":
        return Regions(self.boxes[index], self.scores[index], tuple(self.labels[i] for i in index))

    def top(self, k: int) -> "Regions":
        """The k regions that say most: by confidence x area."""
        size = (self.boxes[:, 2] - self.boxes[:, 0]) * (self.boxes[:, 3] - self.boxes[:, 1])
        return self.take(np.argsort(-self.scores * size, kind="stable")[:k])

    def crops(self, image: Image.Image, *, context: float = CONTEXT) -> list[Image.Image]:
        """One crop a region."""
        return [image.crop(cut) for cut in self.cuts(image.width, image.height, context=context)]

    def cuts(self, width: int, height: int, *, context: float = CONTEXT) -> list[tuple[int, int, int, int]]:
        """What is cropped for each region, in whole pixels: each side widened by `context` of the box and cut
        at the border."""
        out = []
        for x0, y0, x1, y1 in self.boxes.tolist():
            dx, dy = (x1 - x0) * context, (y1 - y0) * context
            left, top = max(0, int(x0 - dx)), max(0, int(y0 - dy))
            right, bottom = min(width, int(np.ceil(x1 + dx))), min(height, int(np.ceil(y1 + dy)))
            out.append((left, top, max(right, left + 1), max(bottom, top + 1)))
        return out

    def row(self) -> dict:
        """The columns of the regions contract."""
        return {
            "boxes": self.boxes.astype(np.float32).tolist(),
            "scores": self.scores.astype(np.float32).tolist(),
            "labels": list(self.labels),
        }

    @classmethod
    def of_row(cls, row: dict) -> "Regions":
        n = len(row["labels"])
        return cls(
            np.asarray(row["boxes"], np.float32).reshape(n, 4),
            np.asarray(row["scores"], np.float32).reshape(n),
            tuple(row["labels"]),
        )
