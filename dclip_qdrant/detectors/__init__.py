"""Detectors: one file each. `Detector(**options)(images) -> list[Regions]`; heavy imports inside __init__; `fingerprint` names what it would find."""

import inspect
from typing import Any, Protocol

from PIL import Image

from dclip_qdrant.errors import RecipeError
from dclip_qdrant.lookup import did_you_mean, find
from dclip_qdrant.regions import Regions


class Detector(Protocol):
    fingerprint: str

    def __call__(self, images: list[Image.Image]) -> list[Regions]: ...


def build(name: str, options: dict[str, Any]) -> Detector:
    """The detector that a recipe names. A wrong option is a RecipeError that lists the right ones."""
    cls = find("detectors", name)
    known = [p for p in inspect.signature(cls.__init__).parameters if p != "self"]
    for option in options:
        if option not in known:
            raise RecipeError(f"detector {name!r}", f"unknown option {option!r}", do=did_you_mean(option, known))
    return cls(**options)
