"""What a job of training is asked for, and what can be wrong with it before anything is opened."""

from dataclasses import dataclass

from dclip_qdrant.errors import UsageError
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.pairs.labelled import Labelled
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.tables import storage

READERS = ("auto", "memory", "stream")


@dataclass(frozen=True)
class Request:
    """What was asked for. Paths are absolute or URIs (`cluster.absolute`).

    base: the model that teaches, and that the student starts from where the recipe names no other
    (`student.model`). teach: the recipe that fine-tunes the teaching model on the pairs first, if any.
    """

    pairs: str
    base: str
    out: str
    recipe: Recipe
    compare: tuple[Recipe, ...] = ()
    teach: Recipe | None = None
    seeds: tuple[int, ...] = (0,)
    workers: int = 1
    actors: int | None = None
    pictures: str | None = None  # pairs without captions, which recipes with train.picture_share learn from
    labelled: str | None = None
    min_retention: float = 1.0
    name: str | None = None
    from_scratch: bool = False
    tracker: str | None = None  # a service that metrics go to besides metrics.jsonl
    reader: str = "auto"  # memory, stream, or whichever fits

    @property
    def stages(self) -> str:
        """Where stage folders go; the student and the table stand beside them."""
        return str(storage.as_path(self.out) / "stages")


def check_reader(request: Request, recipes: tuple[Recipe, ...]) -> None:
    """Raises UsageError: an unknown reader, or recipes that only one of them can serve."""
    if request.reader not in READERS:
        raise UsageError("`reader`", repr(request.reader), f"one of {', '.join(READERS)}")
    several = [recipe.name for recipe in recipes if recipe.ensemble.models]
    if request.reader == "stream" and several:
        came = f"stream, but {several[0]!r} has several teachers"
        raise UsageError("`reader`", came, "memory, or a recipe without ensemble.models")


def check_out(out: str) -> None:
    """Raises UsageError: a folder with other things in it; a run writes tables and reports by fixed names."""
    folder = storage.as_path(out)
    if not storage.is_empty(folder) and not (folder / "stages").exists():
        came = f"{out} holds other things than an earlier run"
        raise UsageError("`out`", came, "a new or empty folder, or that of an earlier run")


def labelled_fingerprint(path: str) -> str:
    """Raises InputError: labelled pictures that can't be read, or are too few to be halved."""
    labelled = Labelled.open(path)
    labelled.halves()
    return labelled.fingerprint


def check_teach(request: Request) -> None:
    """Raises UsageError: a recipe for the teaching model that starts from another, or a student that is cut
    from a model that is only to be made."""
    if request.teach is None:
        return
    if request.teach.student.model or request.teach.student.inherit:
        came = f"{request.teach.name!r} starts from a model of its own"
        raise UsageError("`teacher_recipe`", came, "a recipe without student.model and student.inherit")
    if request.teach.train.picture_share:
        came = f"{request.teach.name!r} learns from pictures without captions"
        raise UsageError("`teacher_recipe`", came, "a recipe of pairs alone, like `projections` or `sft`")
    if request.recipe.student.inherit and not request.recipe.student.model:
        came = f"{request.recipe.name!r} cuts its student from the base"
        raise UsageError("`teacher_recipe`", came, "a student that is a model by itself (student.model)")


def check_pictures(request: Request, recipes: tuple[Recipe, ...]) -> None:
    """Raises UsageError: pictures without captions that no recipe learns from, or a recipe that has none."""
    if Pairs.open(request.pairs).manifest.get("captions") == 0:
        came = "pictures without captions"
        raise UsageError("`pairs`", came, "pictures with captions; those without go into `pictures`")
    learning = [recipe.name for recipe in recipes if recipe.train.picture_share]
    if request.pictures is None and learning:
        expected = "`pictures`: made by dclip-qdrant pairs without captions"
        raise UsageError("`pictures`", f"none, but {learning[0]!r} learns from them", expected)
    if request.pictures is None:
        return
    if not learning:
        came = f"{recipes[-1].name!r} learns nothing from them"
        raise UsageError("`pictures`", came, "a recipe with train.picture_share above 0, like `pictures`")
    if not Pairs.open(request.pictures).splits().get("train"):
        raise UsageError("`pictures`", "no pictures for training", "pictures of the split train")
