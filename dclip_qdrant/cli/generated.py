"""Files that follow from the code: `python -m dclip_qdrant.cli.generated ROOT` (make generated) writes
`schemas/*.json` and `docs/cli.md` of a checkout, and a test compares them."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from dclip_qdrant.cli import main
from dclip_qdrant.cli.commands import Group
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.serving import evaluation
from dclip_qdrant.tables import contracts
from dclip_qdrant.tables.storage import write_text

STUDENT = {
    "about": "manifest.json of a student folder; written last",
    "version": 1,
    "keys": {
        "version": "of this format",
        "name": "the student's name",
        "fingerprint": "sha256 over weights, tokenizer and preprocessing",
        "dim": "vector width",
        "image_size": "pixels a side",
        "context_length": "tokens",
        "preprocess": "open_clip's preprocess_cfg",
        "text": "cleaning and padding of the tokenizer",
        "base": "the model it started from",
        "parameters": "image and text tower",
        "files": "sha256 of every file",
    },
}


def generated_files() -> dict[str, str]:
    """Path in a checkout -> content."""
    documents: dict[str, Any] = {f"{c.name}.json": c.describe() for c in contracts.ALL}
    documents["recipe.schema.json"] = Recipe.model_json_schema()
    documents["student.schema.json"] = STUDENT
    documents["evaluation.json"] = {
        "about": "dclip-qdrant evaluate --format json",
        "keys": evaluation.KEYS,
        "with --through": evaluation.THROUGH,
    }
    files = {f"schemas/{name}": json.dumps(content, indent=1) + "\n" for name, content in documents.items()}
    files["docs/cli.md"] = command_reference()
    return files


def command_reference() -> str:
    """Every command's help, as Markdown."""
    lines = ["# Command line", "", "Generated from the commands themselves (`make generated`).", ""]
    for title, names in main.sections.items():
        lines += [f"- **{title}**: " + ", ".join(f"[{n}](#dclip-qdrant-{n})" for n in names)]
    lines += ["", *_help("dclip-qdrant", main)]
    for title, names in main.sections.items():
        lines += [f"# {title}", ""]
        for name in names:
            lines += _with_subcommands(f"dclip-qdrant {name}", main.commands[name])
    return "\n".join(lines).rstrip() + "\n"


def _with_subcommands(path: str, command: click.Command) -> Iterator[str]:
    yield from _help(path, command)
    if isinstance(command, Group):
        for name, inner in command.commands.items():
            yield from _with_subcommands(f"{path} {name}", inner)


def _help(path: str, command: click.Command) -> list[str]:
    width = {"terminal_width": 100, "max_content_width": 100}
    ctx = click.Context(command, info_name=path, **{**command.context_settings, **width})
    return [f"## {path}", "", "```text", command.get_help(ctx), "```", ""]


if __name__ == "__main__":
    for name, content in generated_files().items():
        write_text(Path(sys.argv[1]) / name, content)
