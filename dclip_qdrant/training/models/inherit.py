"""A lighter student cut from a model: fewer tokens (vocabulary.py), and fewer transformer layers, each
inherited whole (uniform selection as in TinyCLIP's manual inheritance, ICCV 2023; ConaCLIP's students keep
2, 4 or 6 text layers)."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from dclip_qdrant.errors import RecipeError
from dclip_qdrant.recipe import InheritSettings
from dclip_qdrant.training.models import vocabulary
from dclip_qdrant.training.models.bases import CONFIG
from dclip_qdrant.training.models.model_folder import write_model
from dclip_qdrant.training.models.two_tower import TwoTower

_BLOCK = {
    "image": re.compile(r"^(visual\.transformer\.resblocks\.)(\d+)(\..*)$"),
    "text": re.compile(r"^((?:text\.)?transformer\.resblocks\.)(\d+)(\..*)$"),
}


_TOKENS = re.compile(r"^(text\.)?token_embedding\.weight$")


def kept(have: int, want: int) -> list[int]:
    """Which of `have` layers stay when `want` do: evenly spaced, the first and the last among them (one
    alone: the first)."""
    return sorted({int(i) for i in np.linspace(0, have - 1, want).round()})


@dataclass(frozen=True)
class Cut:
    """What `write_model` writes."""

    config: dict[str, Any]
    state: dict[str, Tensor]
    tokenizer: Any


def cut(model: TwoTower, settings: InheritSettings) -> Cut:
    """The smaller model.

    Raises:
        RecipeError: a tower that isn't open_clip's own transformer, or that has no more layers or tokens than
            are wanted.
    """
    config, state, tokenizer = copy.deepcopy(model.config), model.weights(), model.tokenizer
    for tower, want, part in (
        ("image", settings.image_layers, "vision_cfg"),
        ("text", settings.text_layers, "text_cfg"),
    ):
        if want is not None:
            state = _fewer_layers(model, state, tower, want, config.get(part, {}))
            config[part]["layers"] = want
    if settings.vocabulary is not None:
        tokenizer = _fewer_tokens(model, state, settings.vocabulary)
        config["text_cfg"]["vocab_size"] = settings.vocabulary
    return Cut(config, state, tokenizer)


def _fewer_layers(
    model: TwoTower, state: dict[str, Tensor], tower: str, want: int, config: dict[str, Any]
) -> dict[str, Tensor]:
    have = 1 + max((int(m.group(2)) for k in state if (m := _BLOCK[tower].match(k))), default=-1)
    if have == 0 or "layers" not in config:
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
    out = {}
    for k, v in state.items():
        m = _BLOCK[tower].match(k)
        if m is None:
            out[k] = v
        elif int(m.group(2)) in place:
            out[f"{m.group(1)}{place[int(m.group(2))]}{m.group(3)}"] = v
    return out


def _fewer_tokens(model: TwoTower, state: dict[str, Tensor], want: int) -> SimpleTokenizer:
    """Cuts the token vectors in `state`; the tokenizer that goes with them."""
    name = next((k for k in state if _TOKENS.match(k)), None)
    where = "student.inherit.vocabulary"
    if name is None or not isinstance(model.tokenizer, SimpleTokenizer):
        raise RecipeError(
            where, f"{model.name} doesn't read CLIP's tokens", "a text tower of open_clip's own"
        )
    have = model.tokenizer.vocab_size
    if want >= have or state[name].shape[0] != have:
        raise RecipeError(where, str(want), f"fewer than the {have} of {model.name}")
    state[name] = vocabulary.cut_embedding(state[name], want)
    return vocabulary.cut_tokenizer(model.tokenizer, want)


def write(model: TwoTower, folder: str, settings: InheritSettings) -> None:
    """`cut` as an open_clip folder, once.

    Raises:
        UsageError: a URI; open_clip loads local folders.
    """
    if (Path(folder) / CONFIG).is_file():
        return
    smaller = cut(model, settings)
    write_model(
        folder,
        config=smaller.config,
        weights=smaller.state,
        preprocess=model.preprocess,
        tokenizer=smaller.tokenizer,
    )
