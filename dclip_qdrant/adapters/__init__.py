"""Students in the frameworks that apps are built with; one file each, imported only by those who use it. They hold a `Student` and nothing else."""

from pathlib import Path
from typing import Any

from PIL import Image

from dclip_qdrant import images
from dclip_qdrant.student import Student


def opened(student: Student | str | Path) -> Student:
    return student if isinstance(student, Student) else Student.load(student)


def picture(value: Any) -> Image.Image:
    """A path, bytes, a file object or a PIL image, as ingestion would read it."""
    if isinstance(value, Image.Image):
        return images.upright(value)
    if isinstance(value, bytes):
        return images.open_rgb(value, "a picture")
    if hasattr(value, "read"):
        return images.open_rgb(value.read(), "a picture")
    return images.open_rgb(images.read(value), value)
