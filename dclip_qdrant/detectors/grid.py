"""A detector that needs no weights: overlapping tiles of the picture."""

import numpy as np
from PIL import Image

from dclip_qdrant.errors import RecipeError
from dclip_qdrant.pictures.regions import Regions


class Grid:
    """rows x columns tiles, each widened by `overlap` of its size on every side; score 1, label "tile"."""

    def __init__(self, rows: int = 2, columns: int = 2, overlap: float = 0.1) -> None:
        if rows < 1 or columns < 1 or not 0 <= overlap < 1:
            raise RecipeError(
                "detector 'grid'",
                f"rows {rows}, columns {columns}, overlap {overlap}",
                "rows and columns >= 1, overlap in 0..1",
            )
        self.rows, self.columns, self.overlap = rows, columns, overlap
        self.fingerprint = f"grid-{rows}x{columns}-{overlap}"

    def __call__(self, images: list[Image.Image]) -> list[Regions]:
        return [self._tiles(*image.size) for image in images]

    def _tiles(self, width: int, height: int) -> Regions:
        w, h = width / self.columns, height / self.rows
        boxes = [
            (
                max(0, (c - self.overlap) * w),
                max(0, (r - self.overlap) * h),
                min(width, (c + 1 + self.overlap) * w),
                min(height, (r + 1 + self.overlap) * h),
            )
            for r in range(self.rows)
            for c in range(self.columns)
        ]
        return Regions(np.array(boxes, np.float32), np.ones(len(boxes), np.float32), ("tile",) * len(boxes))
