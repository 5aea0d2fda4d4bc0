"""docs/bases.md: what every model of open_clip can do here, asked of its towers without any weights (on
torch's meta device).

    python tests/all_bases.py      # writes the page
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch

from dclip_qdrant.errors import DclipError
from dclip_qdrant.pictures.preprocess import Preprocess
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.training import hubness
from dclip_qdrant.training.models.trial import try_recipe, try_towers
from dclip_qdrant.training.models.two_tower import TwoTower
from dclip_qdrant.training.student_task import Weighted

PAGE = Path(__file__).resolve().parents[1] / "docs" / "bases.md"
RECIPES = ("best", "dclip", "sft")
SETS = ("proj", "attn_proj", "last_n", "full", "lora")
HEAD = """# Bases

Every model of open_clip, asked without its weights: which parameter sets of its image tower can learn
(`student.train`), which of its frozen trunks are cached, and which recipes it can teach and start.
`tests/training/test_all_bases.py` keeps this page true; `python tests/all_bases.py` writes it.

- *cached*: features of a frozen image trunk (i) and text trunk (t) are computed once; the others run in every
  step.
- *sets*: all of `proj`, `attn_proj`, `last_n`, `full`, `lora`; or those that hold no parameter are named.
- `best` folds hubness reduction into the output projections. A tower that ends in something else is refused
  before any work; `dclip` and `sft` do without.
- Models with a text tower of Hugging Face's need `pip install 'dclip-qdrant[hf]'` and the hub, and are not
  asked here.

One of each family (ViT with QuickGELU, SigLIP, MobileCLIP, EVA02, ConvNeXt, ResNet, CoCa, CLIPA) is trained
with random weights, exported, compared with torch and loaded by stock open_clip in
`tests/training/test_families.py`.

"""


@dataclass(frozen=True)
class Row:
    model: str
    dim: str
    pixels: str
    cached: str
    sets: str
    recipes: tuple[str, ...]  # an answer for each of RECIPES

    def line(self) -> str:
        cells = (self.model, self.dim, self.pixels, self.cached, self.sets, *self.recipes)
        return f"| {' | '.join(cells)} |"


def ask(name: str) -> Row:
    """A model of open_clip's list."""
    config = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(name)
    if "hf_model_name" in config["text_cfg"]:
        return Row(name, str(config["embed_dim"]), "-", "-", "-", ("needs `hf`",) * len(RECIPES))
    with torch.device("meta"):  # nothing is ever filled: the largest would be 20 GB
        model = open_clip.create_model(name, device="meta", load_weights=False)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")  # ids of any tokenizer do, where values aren't looked at
    preprocess = Preprocess.of_open_clip(getattr(model.visual, "preprocess_cfg", {}))
    towers = TwoTower(model, preprocess, tokenizer, name=name, config=config, fingerprint="").to("meta")
    try:
        try_towers(towers)
    except DclipError as e:
        return Row(name, str(towers.dim), str(preprocess.size), "-", "-", (e.came,) * len(RECIPES))
    cached = "i" * towers.trunk_frozen + "t" * towers.text_trunk_frozen
    return Row(
        model=name,
        dim=str(towers.dim),
        pixels=str(preprocess.size),
        cached=cached or "-",
        sets=_sets(towers),
        recipes=tuple(_answer(recipe, towers) for recipe in RECIPES),
    )


def _sets(towers: TwoTower) -> str:
    nothing = [kind for kind in SETS[:-1] if not towers.choose("image", kind)]
    towers.requires_grad_(False)
    return "all" if not nothing else f"not {', '.join(nothing)}"


def _answer(recipe_name: str, towers: TwoTower) -> str:
    """What `Experiment.open` would say of this recipe."""
    recipe = Recipe.load(recipe_name)
    try:
        objectives = Weighted(recipe.objectives, towers.dim, towers.dim)
        try_recipe(recipe, objectives.reads, towers, towers)
        if recipe.hubness.on or recipe.index.objectives:
            towers.output_projections()
        if recipe.hubness.on:
            hubness.room(towers.dim, recipe.hubness.share)
    except DclipError as e:
        return f"no: {e.came.replace(' of ' + towers.name, '')}"
    return "yes"


def page() -> str:
    logging.disable(logging.CRITICAL)
    try:
        rows = [ask(name) for name in open_clip.list_models()]
    finally:
        logging.disable(logging.NOTSET)
    titles = ("model", "dim", "pixels", "cached", "sets", *(f"`{r}`" for r in RECIPES))
    table = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles), *(row.line() for row in rows)]
    asked = [row for row in rows if row.cached != "-" or row.sets != "-"]
    count = [sum(row.recipes[i] == "yes" for row in rows) for i in range(len(RECIPES))]
    summary = ", ".join(f"`{name}` {n}" for name, n in zip(RECIPES, count, strict=True))
    head = f"Of {len(rows)} models {len(asked)} could be asked here; recipes that work: {summary}.\n\n"
    return HEAD + head + "\n".join(table) + "\n"


if __name__ == "__main__":
    with torch.no_grad():
        PAGE.write_text(page())
