"""ComKD-CLIP's own task as one Ray task."""

from typing import Any

from dclip_qdrant.jobs.cluster import as_one_task
from dclip_qdrant.settings import checked, options
from dclip_qdrant.tasks.few_shot.run import Config, adapt, table

__all__ = ["adapt_as_task", "table"]


def adapt_as_task(
    labelled: str,
    *,
    teacher: str,
    student: str,
    out: str,
    settings: tuple[str, ...] = (),
    cross: tuple[str, ...] = (),
    domains: tuple[str, ...] = (),
) -> dict[str, Any]:
    """See `tasks.few_shot.run.adapt`; `settings` are `key=value` of its Config.

    Raises:
        RecipeError: a setting that isn't there, or a value that can't be meant.
    """
    config = checked(Config, options(settings, "`settings`"), "`settings`")
    return as_one_task(
        adapt,
        labelled,
        teacher=teacher,
        student=student,
        out=out,
        config=config,
        cross=cross,
        domains=domains,
    )
