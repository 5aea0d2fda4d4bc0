"""`dclip-qdrant`: parses, calls one function, prints. Data goes to stdout, everything else to stderr. One file a group of commands."""

import tomllib
from pathlib import Path
from typing import Any

import click

from dclip_qdrant import __version__, front
from dclip_qdrant.cli import apps, change, collections, data, students
from dclip_qdrant.errors import UsageError


class _Group(click.Group):
    """Says "did you mean" for a command that isn't there."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            from dclip_qdrant.lookup import did_you_mean

            ctx.fail(f"no command {args[0]!r}: {did_you_mean(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


def _config(path: str | None) -> dict[str, Any]:
    """`dclip.toml`: top-level keys for every command, a [command] table for one. Below environment and flags."""
    file = Path(path or "dclip.toml")
    if not file.is_file():
        if path:
            raise UsageError("--config", f"no file {path}")
        return {}
    try:
        raw = tomllib.loads(file.read_text())
    except tomllib.TOMLDecodeError as e:
        raise UsageError(file, f"not TOML: {e}") from e
    everywhere = {k.replace("-", "_"): v for k, v in raw.items() if not isinstance(v, dict)}
    return {name: everywhere | {k.replace("-", "_"): v for k, v in raw.get(name, {}).items()} for name in main.commands}


def _version(ctx: click.Context, _: Any, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        click.echo(f"dclip-qdrant {__version__}")
        for package in (
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
        ):
            try:
                click.echo(f"  {package} {version(package)}")
            except PackageNotFoundError:
                click.echo(f"  {package} -")
        ctx.exit()


@click.group(cls=_Group, context_settings={"auto_envvar_prefix": "DCLIP", "help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Show the versions of this and of what it stands on.",
)
@click.option("--config", help="A TOML file with defaults; ./dclip.toml is read by itself.")
@click.pass_context
def main(ctx: click.Context, config: str | None) -> None:
    """A team's own light CLIP for Qdrant: pairs in, a distilled student out, pictures in, hits out.

    Values come from flags, else the environment (QDRANT_URL, QDRANT_API_KEY, DCLIP_<COMMAND>_<OPTION>), else dclip.toml.
    Exit codes: 0 ok, 1 failure, 2 usage, 3 some rows rejected or below a gate, 4 wrong student for the collection, 130 interrupted.
    """
    ctx.default_map = _config(config)


for group in (data, collections, change, apps, students):
    for command in group.COMMANDS:
        main.add_command(command)


def program() -> None:
    """The console script."""
    front.run(main)
