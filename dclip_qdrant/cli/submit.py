"""--submit: a command that runs as a job of a Ray cluster which is there already, its output followed
here."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import click

FLAG = "--submit"


def submit_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --submit ADDRESS; the function itself never sees it."""

    @functools.wraps(function)
    def run_here_or_there(*args: Any, submit_to: str | None, **kwargs: Any) -> Any:
        if submit_to is None:
            return function(*args, **kwargs)
        from dclip_qdrant.jobs.submit import submit

        return submit(submit_to, _own_arguments())

    return click.option(
        FLAG,
        "submit_to",
        metavar="ADDRESS",
        help="Run as a job of this Ray cluster, e.g. http://127.0.0.1:8265. Paths must be absolute or URIs.",
    )(run_here_or_there)


def _own_arguments() -> list[str]:
    """What was typed after the program's name, without --submit, and with the command's name first."""
    words, kept = sys.argv[1:], []
    while words:
        word = words.pop(0)
        if word == FLAG:
            words.pop(0)
        elif not word.startswith(f"{FLAG}="):
            kept.append(word)
    name = str(click.get_current_context().command.name)
    return kept if name in kept else [name, *kept]
