"""Objectives: one file, one term, `(student: Encoded, teacher: Encoded) -> scalar`. They know torch and
nothing else."""

import inspect

from torch import nn

from dclip_qdrant.errors import RecipeError
from dclip_qdrant.lookup import did_you_mean, find

GIVEN = ("self", "student_dim", "teacher_dim")  # by us; every other argument is an option of the recipe


def build(name: str, *, student_dim: int, teacher_dim: int, **options: object) -> nn.Module:
    """The objective that a recipe names. A wrong option is a RecipeError that lists the right ones."""
    cls = find("training.objectives", name)
    known = [p for p in inspect.signature(cls.__init__).parameters if p not in GIVEN]
    for option in options:
        if option not in known:
            do = did_you_mean(option, [*known, "name", "weight"])
            raise RecipeError(f"objective {name!r}", f"unknown key {option!r}", do=do)
    try:
        return cls(student_dim=student_dim, teacher_dim=teacher_dim, **options)
    except (TypeError, ValueError) as e:
        raise RecipeError(f"objective {name!r}", str(e)) from e
