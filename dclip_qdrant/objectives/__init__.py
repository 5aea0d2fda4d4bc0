"""Objectives: one file, one term, `(student: Encoded, teacher: Encoded) -> scalar`. They know torch and nothing else."""

from torch import nn

from dclip_qdrant.errors import RecipeError
from dclip_qdrant.lookup import find


def build(name: str, *, student_dim: int, teacher_dim: int, **options: object) -> nn.Module:
    """The objective that a recipe names. A wrong option is a RecipeError that lists the right ones."""
    import inspect

    cls = find("objectives", name)
    known = [p for p in inspect.signature(cls.__init__).parameters if p not in ("self", "student_dim", "teacher_dim")]
    for option in options:
        if option not in known:
            from dclip_qdrant.lookup import did_you_mean

            raise RecipeError(f"objective {name!r}", f"unknown key {option!r}", do=did_you_mean(option, [*known, "name", "weight"]))
    try:
        return cls(student_dim=student_dim, teacher_dim=teacher_dim, **options)
    except (TypeError, ValueError) as e:
        raise RecipeError(f"objective {name!r}", str(e)) from e
