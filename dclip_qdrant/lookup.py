"""A name in a recipe becomes a class: the folder is the registry, strangers say "package.module:Class"."""

import importlib
import importlib.util
from difflib import get_close_matches
from pathlib import Path

from dclip_qdrant.errors import MissingExtra, RecipeError

EXTRA_OF = {  # which extra brings a module that may be absent
    "torch": "train",
    "torchvision": "train",
    "open_clip": "train",
    "ultralytics": "train",
    "ray": "train",
    "onnx": "train",
    "onnxscript": "train",
    "safetensors": "train",
    "timm": "train",
    "matplotlib": "train",
    "transformers": "hf",
    "qdrant_edge": "edge",
    "fastembed": "fastembed",
    "starlette": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "fastapi": "ray-serve",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "wandb": "wandb",
}


def did_you_mean(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return (f"did you mean {close[0]!r}? " if close else "") + "known: " + ", ".join(sorted(known))


def names(folder: str) -> list[str]:
    """The components in a folder of the package (`detectors`, `training.objectives`), by file name."""
    path = Path(__file__).parent.joinpath(*folder.split("."))
    return sorted(p.stem for p in path.glob("*.py") if not p.stem.startswith("_"))


def find(folder: str, name: str) -> type:
    """The class that `name` means: `info_nce` in `training.objectives` is `InfoNce` in
    `training/objectives/info_nce.py`.

    Raises:
        RecipeError: no such file, module or class.
        MissingExtra: the file needs a package that is not installed.
    """
    if ":" in name:
        module, _, cls = name.partition(":")
    else:
        if name not in names(folder):
            raise RecipeError(folder, f"no {name!r} here", do=did_you_mean(name, names(folder)))
        module, cls = f"dclip_qdrant.{folder}.{name}", "".join(part.capitalize() for part in name.split("_"))
    try:
        return getattr(importlib.import_module(module), cls)
    except ModuleNotFoundError as e:
        if e.name and not module.startswith(e.name):
            raise missing(e.name, f"{folder} {name!r}") from e
        raise RecipeError(
            folder, f"no module {module!r} for {name!r}", 'a file name here or "package.module:Class"'
        ) from e
    except AttributeError as e:
        raise RecipeError(folder, f"no class {cls!r} in {module}") from e


def missing(module: str, needed_by: str) -> MissingExtra:
    """The error for a package that isn't installed, with the line that installs it."""
    extra = EXTRA_OF.get(module.split(".")[0])
    do = f'pip install "dclip-qdrant[{extra}]"' if extra else f"pip install {module}"
    return MissingExtra(needed_by, f"the package {module.split('.')[0]!r} is not installed", do=do)


def need(module: str, needed_by: str) -> None:
    """Raises MissingExtra now, before minutes of work, if `module` can't be imported."""
    try:
        there = importlib.util.find_spec(module.split(".")[0]) is not None
    except ModuleNotFoundError:
        there = False
    if not there:
        raise missing(module, needed_by)
