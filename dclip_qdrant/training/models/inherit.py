"""A lighter student cut from a model: fewer transformer layers, each inherited whole (uniform selection as in
TinyCLIP's manual inheritance, ICCV 2023; ConaCLIP's students keep 2, 4 or 6 text layers)."""

import copy
import re
from pathlib import Path

import numpy as np
from torch import Tensor

from dclip_qdrant.errors import RecipeError
from dclip_qdrant.training.models.bases import CONFIG
from dclip_qdrant.training.models.model_folder import write_model
from dclip_qdrant.training.models.two_tower import TwoTower

_BLOCK = {
    "image": re.compile(r"^(visual\.transformer\.resblocks\.)(\d+)(\..*)$"),
    "text": re.compile(r"^((?:text\.)?transformer\.resblocks\.)(\d+)(\..*)$"),
}


def kept(have: int, want: int) -> list[int]:
    """Which of `have` layers stay when `want` do: evenly spaced, the first and the last among them (one
    alone: the first)."""
    return sorted({int(i) for i in np.linspace(0, have - 1, want).round()})


def cut(
    model: TwoTower, *, image_layers: int | None = None, text_layers: int | None = None
) -> tuple[dict, dict[str, Tensor]]:
    """The smaller model's configuration and weights.

    Raises:
        RecipeError: a tower that isn't open_clip's own transformer, or that has no more layers than are
            wanted.
    """
    config, state = copy.deepcopy(model.config), model.weights()
    for tower, want, part in (("image", image_layers, "vision_cfg"), ("text", text_layers, "text_cfg")):
        if want is None:
            continue
        have = 1 + max((int(m.group(2)) for k in state if (m := _BLOCK[tower].match(k))), default=-1)
        if have == 0 or "layers" not in config.get(part, {}):
            raise RecipeError(
                f"student.inherit.{tower}_layers",
                f"{model.name} has no transformer of open_clip's own there",
                "a ViT or a text transformer",
            )
        if want >= have:
            raise RecipeError(
                f"student.inherit.{tower}_layers", str(want), f"fewer than the {have} of {model.name}"
            )
        place = {old: new for new, old in enumerate(kept(have, want))}
        config[part]["layers"] = want
        out = {}
        for k, v in state.items():
            m = _BLOCK[tower].match(k)
            if m is None:
                out[k] = v
            elif int(m.group(2)) in place:
                out[f"{m.group(1)}{place[int(m.group(2))]}{m.group(3)}"] = v
        state = out
    return config, state


def write(
    model: TwoTower, folder: str, *, image_layers: int | None = None, text_layers: int | None = None
) -> None:
    """`cut` as an open_clip folder, once.

    Raises:
        UsageError: a URI; open_clip loads local folders.
    """
    if (Path(folder) / CONFIG).is_file():
        return
    config, state = cut(model, image_layers=image_layers, text_layers=text_layers)
    write_model(folder, config=config, weights=state, preprocess=model.preprocess, tokenizer=model.tokenizer)
