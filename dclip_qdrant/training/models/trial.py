"""One picture and one text through a model's towers, before any work: what a recipe will ask of them."""

import torch
from torch import Tensor

from dclip_qdrant.errors import UsageError
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.training.models.two_tower import TwoTower

ONNX_BYTES = (2 << 30) - (16 << 20)  # a protobuf's limit, less the graph


@torch.no_grad()
def try_recipe(recipe: Recipe, reads: set[str], base: TwoTower, student: TwoTower) -> None:
    """What the recipe will ask of the base (a teacher of spans) and, by what its objectives `reads`, of the
    student (words, regions of its feature map), tried once.

    Raises:
        RecipeError: a tower that can't give it.
    """
    if recipe.teacher is not None and recipe.teacher.spans == "tokens":
        base.encode_words(_text(base))
    if "words" in reads:
        student.encode_words(_text(student))
    if "rois" in reads:
        student.encode_patches(_picture(student))


@torch.no_grad()
def try_towers(model: TwoTower) -> None:
    """Both towers give vectors of the model's width.

    Raises:
        UsageError: towers of another kind than a CLIP's.
    """
    for tower, encode, value in (
        ("image", model.encode_image, _picture(model)),
        ("text", model.encode_text, _text(model)),
    ):
        try:
            out = encode(value)
        except Exception as e:  # a tower that doesn't work as CLIP's do fails in its own way
            came = f"its {tower} tower fails: {str(e).splitlines()[0][:160] or type(e).__name__}"
            raise UsageError(model.name, came, "an image and a text tower as CLIP has them") from e
        if not isinstance(out, Tensor) or tuple(out.shape) != (1, model.dim):
            came = f"its {tower} tower gives {tuple(getattr(out, 'shape', ())) or type(out).__name__}"
            raise UsageError(model.name, came, f"one vector of {model.dim} numbers")


def _picture(model: TwoTower) -> Tensor:
    size = model.preprocess.size
    return torch.zeros(1, 3, size, size, device=next(model.parameters()).device)


def _text(model: TwoTower) -> Tensor:
    return model.tokens(["a photo of a cat"]).to(next(model.parameters()).device)


def check_size(model: TwoTower) -> None:
    """Each tower fits into an ONNX file, which a student's towers are.

    Raises:
        UsageError: a tower of 2 GiB or more in float32.
    """
    sizes = {"image": 0, "text": 0}
    for name, p in model.model.named_parameters():
        sizes["image" if name.startswith("visual.") else "text"] += 4 * p.numel()
    for tower, size in sizes.items():
        if size >= ONNX_BYTES:
            came = f"its {tower} tower has {size / 2**30:.1f} GiB of weights"
            raise UsageError(model.name, came, "less than 2 GiB in a student", "let it teach a lighter one")
