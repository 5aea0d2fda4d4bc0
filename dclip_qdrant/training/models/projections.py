"""Where a tower ends: its output projection, whatever its family calls it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

# open_clip's own towers, timm's with a projection behind the trunk or inside of it, Hugging Face's
PARAMETERS = re.compile(
    r"^visual\.(proj$|head\.|attnpool\.|trunk\.head\.(fc\.)?(weight|bias)$)"
    r"|^(text\.)?text_projection(\.|$)|^text\.proj\."
)


class Place(NamedTuple):
    """A child (module or parameter) of a module, by name."""

    parent: Any
    name: str

    @property
    def value(self) -> Any:
        return getattr(self.parent, self.name)


def image_head(visual: Any, dim: int) -> Place | None:
    """The projection of a timm tower: behind its trunk, or the trunk's own last layer (EVA02, MobileCLIP,
    PE). None where the tower is another, or ends in something else."""
    if not (hasattr(visual, "trunk") and hasattr(visual, "head")):
        return None
    if any(True for _ in visual.head.parameters()):
        return Place(visual, "head")
    inner = getattr(visual.trunk, "head", None)
    for place in (Place(inner, "fc"), Place(visual.trunk, "head")):
        linear = getattr(place.parent, place.name, None)
        if isinstance(linear, nn.Linear) and linear.out_features == dim:
            return place
    return None


def text_head(text: Any) -> Place | None:
    """The projection of a text tower; None where there is none, or where the tower gives its tokens too
    (CoCa)."""
    if getattr(text, "cls_emb", None) is not None:
        return None
    for name in ("text_projection", "proj"):  # open_clip's own, Hugging Face's
        if isinstance(getattr(text, name, None), nn.Module | Tensor):
            return Place(text, name)
    return None


@contextmanager
def left_out(place: Place) -> Iterator[None]:
    """The tower without this projection."""
    head = place.value
    # open_clip's text towers leave out a projection that is None, all others call theirs always
    setattr(place.parent, place.name, None if place.name == "text_projection" else nn.Identity())
    try:
        yield
    finally:
        setattr(place.parent, place.name, head)


def last_linear(place: Place | None, dim: int) -> nn.Linear | Tensor | None:
    """The linear map that the place ends in, when it gives `dim` numbers."""
    value = getattr(place.parent, place.name, None) if place is not None else None
    if isinstance(value, nn.Module):
        linear = [m for m in value.modules() if isinstance(m, nn.Linear)]
        return linear[-1] if linear and linear[-1].out_features == dim else None
    return value if isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == dim else None
