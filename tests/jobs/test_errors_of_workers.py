"""Our own errors, as they come out of Ray."""

import click
import pytest
from ray.exceptions import RayTaskError

from dclip_qdrant.cli import front
from dclip_qdrant.errors import RecipeError, calling_parameters
from dclip_qdrant.jobs.cluster import own_error


def test_an_error_of_a_task_is_one_line_without_its_traceback(capsys):
    ours = RecipeError("prompts", "the text tower of X", "another")
    raised = RayTaskError("task", "Traceback (most recent call last):\n ...", ours).as_instanceof_cause()
    assert isinstance(raised, RecipeError)  # of Ray's class and of ours: it prints as Ray's
    assert own_error(raised) is ours

    @click.command()
    def job():
        raise raised

    with pytest.raises(SystemExit) as stopped:
        front.run(job, [])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: prompts: the text tower of X; expected another\n"


def test_it_keeps_the_flags_of_the_command(capsys):
    """They are put on what passes through the command, which is Ray's."""
    ours = RecipeError("`labelled`", "no classes", "some")

    @click.command()
    def job():
        with calling_parameters({"labelled": "--labelled"}):
            raise RayTaskError("task", "Traceback ...", ours).as_instanceof_cause()

    with pytest.raises(SystemExit):
        front.run(job, [])
    assert capsys.readouterr().err == "error: --labelled: no classes; expected some\n"
