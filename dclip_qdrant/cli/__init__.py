"""`dclip-qdrant`: parses, calls one function, prints. Data goes to stdout, everything else to stderr. One
file a group of commands."""

from pathlib import Path
from typing import Any

import click

from dclip_qdrant import __version__
from dclip_qdrant.cli import change, collections, data, front, ingest, serving_apps, students, tasks, train
from dclip_qdrant.cli.commands import Group
from dclip_qdrant.errors import UsageError

STANDS_ON = (
    "qdrant-client",
    "qdrant-edge-py",
    "fastembed",
    "onnxruntime",
    "numpy",
    "pyarrow",
    "torch",
    "open_clip_torch",
    "ray",
    "ultralytics",
)


def _config(path: str | None) -> dict[str, Any]:
    """`dclip.toml`: top-level keys for every command, a [command] table for one. Below environment and
    flags."""
    from dclip_qdrant.settings import read_toml

    file = Path(path or "dclip.toml")
    if not file.is_file():
        if path:
            raise UsageError("--config", f"no file {path}")
        return {}
    raw = read_toml(file)
    everywhere = {_parameter(k): v for k, v in raw.items() if not isinstance(v, dict)}
    defaults = {}
    for name in main.commands:
        own = {_parameter(k): v for k, v in raw.get(name, {}).items()}
        defaults[name] = everywhere | own
    return defaults


def _parameter(key: str) -> str:
    return key.replace("-", "_")


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    click.echo(f"dclip-qdrant {__version__}")
    for package in STANDS_ON:
        try:
            click.echo(f"  {package} {version(package)}")
        except PackageNotFoundError:
            click.echo(f"  {package} -")
    ctx.exit()


@click.group(cls=Group, context_settings={"auto_envvar_prefix": "DCLIP"})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Show the versions of this and of what it stands on.",
)
@click.option("--config", metavar="FILE", help="A TOML file with defaults; ./dclip.toml is read by itself.")
@click.pass_context
def main(ctx: click.Context, config: str | None) -> None:
    """A team's own light CLIP for Qdrant: pairs in, a distilled student out, pictures in, hits out.

    Values come from flags, else the environment (QDRANT_URL, QDRANT_API_KEY, DCLIP_<COMMAND>_<OPTION>), else
    dclip.toml. Exit codes: 0 ok, 1 failure, 2 usage, 3 some rows rejected or below a gate, 4 wrong student
    for the collection, 130 interrupted.
    """
    ctx.default_map = _config(config)


main.add_section("Data", data.COMMANDS)
main.add_section("Students", (*train.COMMANDS, *tasks.COMMANDS, *students.COMMANDS))
main.add_section("Collections", (*ingest.COMMANDS, *collections.COMMANDS, *change.COMMANDS))
main.add_section("Serving", serving_apps.COMMANDS)
main.add_section("Recipes", (students.recipes_group,))


def program() -> None:
    """The console script."""
    front.run(main)
