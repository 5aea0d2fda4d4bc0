"""What every command says of itself."""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dclip_qdrant.cli import main
from dclip_qdrant.cli.commands import Group, RenamedOption


def walk(group, path=()):
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from walk(command, (*path, name))


COMMANDS = dict(walk(main))
LEAVES = {path: c for path, c in COMMANDS.items() if not isinstance(c, click.Group)}


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_h_is_help(path):
    long = CliRunner().invoke(main, [*path, "--help"])
    short = CliRunner().invoke(main, [*path, "-h"])
    assert (long.exit_code, short.exit_code) == (0, 0)
    assert long.output == short.output


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_help_has_an_example_that_parses(path):
    """The example's options exist; nothing is run."""
    example = LEAVES[path].example
    assert example.startswith("dclip-qdrant " + " ".join(path))
    known = {flag for p in LEAVES[path].params for flag in (*p.opts, *p.secondary_opts)}
    used = {word.split("=")[0] for word in example.split() if word.startswith("-")}
    assert used <= known


def test_the_list_of_commands_cuts_no_line_short():
    listed = " ".join(CliRunner().invoke(main, ["-h"]).output.split())
    for command in main.commands.values():
        first_sentence = " ".join((command.help or "").split()).split(". ")[0]
        assert first_sentence in listed


def test_every_command_stands_in_a_section():
    assert isinstance(main, Group)
    listed = [name for names in main.sections.values() for name in names]
    assert sorted(listed) == sorted(main.commands)


def test_an_option_means_one_thing_everywhere():
    """Flags that are shown have one kind of value in all commands."""
    kinds = defaultdict(lambda: defaultdict(list))
    for path, command in LEAVES.items():
        for p in command.params:
            if isinstance(p, click.Option) and not p.hidden:
                for flag in p.opts:
                    kinds[flag][(p.type.name, p.is_flag, (p.metavar or "").split("|")[0])].append(
                        " ".join(path)
                    )
    # what distillation starts from is a model, what everything else takes is a folder that it left
    kinds["--student"].pop(("text", False, "MODEL"))
    several = {flag: dict(ways) for flag, ways in kinds.items() if len(ways) > 1}
    assert not several


FORMER = [
    (path, option, flag)
    for path, command in LEAVES.items()
    for option in command.params
    if isinstance(option, RenamedOption)
    for flag in option.former
]


@pytest.mark.parametrize(("path", "option", "flag"), FORMER, ids=lambda value: str(value)[:40])
def test_former_names_are_understood_and_not_shown(path, option, flag):
    command = LEAVES[path]
    context = click.Context(command, **command.context_settings)
    values, _, _ = command.make_parser(context).parse_args([flag, "x"])
    assert values[option.name] == (["x"] if option.multiple else "x")
    assert f"{flag} " not in command.get_help(context)


def test_all_former_names_are_there():
    assert {flag for _, _, flag in FORMER} == {"--weights", "--split", "--base", "--student", "--index"}


LISTS = ("recipes list", "collections", "inspect", "search", "evaluate", "tune")


@pytest.mark.parametrize("path", [tuple(words.split()) for words in LISTS], ids=" ".join)
def test_what_is_listed_has_formats(path):
    flags = {flag for p in LEAVES[path].params for flag in p.opts}
    assert "--format" in flags


def test_a_reader_that_stops_early_is_no_error():
    """`| head`: no traceback, no message."""
    line = f"set -o pipefail; {sys.executable} -m dclip_qdrant.cli recipes show best | head -1"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
