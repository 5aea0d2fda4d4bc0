"""Detectors: one file each. `Detector(**options)(images) -> list[Regions]`; heavy imports inside __init__;
`fingerprint` names what it would find."""

import inspect
from typing import Any, Protocol

from PIL import Image

from dclip_qdrant.errors import RecipeError
from dclip_qdrant.lookup import did_you_mean, find
from dclip_qdrant.pictures.regions import Regions


class Detector(Protocol):
    fingerprint: str

    def __call__(self, images: list[Image.Image]) -> list[Regions]: ...


def build(name: str, options: dict[str, Any] | None = None) -> Detector:
    """The detector that a recipe names. A wrong option is a RecipeError that lists the right ones."""
    cls = find("detectors", name)
    known = [p for p in inspect.signature(cls.__init__).parameters if p != "self"]
    for option in options or {}:
        if option not in known:
            do = did_you_mean(option, known)
            raise RecipeError(f"detector {name!r}", f"unknown option {option!r}", do=do)
    return cls(**(options or {}))


def as_detector(detector: Detector | str | None) -> Detector | None:
    """An instance as it is, a name as its detector with default options."""
    return build(detector) if isinstance(detector, str) else detector
