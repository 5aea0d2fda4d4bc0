"""How every command ends: data on stdout, one clear line for our own errors, the right exit code."""

import sys
from collections.abc import Callable

import click

from dclip_qdrant.errors import DclipError


def run(command: Callable[..., None]) -> None:
    """Runs a click command as a program: our errors become one line, Ctrl-C 130; anything else keeps its traceback."""
    try:
        code = command(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; run it again to go on from here", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except DclipError as e:
        fail(e)
    except Exception as e:
        if "ray" not in sys.modules:
            raise
        from dclip_qdrant.cluster import ours

        found = ours(e)
        if found is None:
            raise
        fail(found)


def fail(error: DclipError) -> None:
    click.echo(f"{click.style('error', fg='red', bold=True) if sys.stderr.isatty() else 'error'}: {error}", err=True)
    sys.exit(error.exit_code)


def say(line: str) -> None:
    """Progress and explanations: stderr, at once."""
    click.echo(line, err=True)
