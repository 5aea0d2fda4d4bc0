"""How every command begins and ends: log lines on stderr, data on stdout, one clear line for our own errors,
the right exit code."""

import logging
import os
import sys

import click

from dclip_qdrant.errors import DclipError

EXIT_CODES = {"usage": 2, "partial": 3, "gate": 3, "mismatch": 4}  # by an error's kind; any other is 1
INTERRUPTED = 130


def run(command: click.Command, args: list[str] | None = None) -> None:
    """Runs a command as a program: our errors become one line, Ctrl-C 130; anything else keeps its
    traceback."""
    log_to_stderr()
    try:
        code = command.main(args, standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; run it again to go on from here", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # `| head` has seen enough; nothing is left to be written at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except DclipError as e:
        fail(_inside_ray(e) or e)
    except Exception as e:
        own = _inside_ray(e) or _of_the_machine(e)
        if own is None or os.environ.get("DCLIP_DEBUG"):
            raise
        fail(own)


def _of_the_machine(error: Exception) -> DclipError | None:
    """A full disk, a folder that may not be written, a package that is missing: nothing that a traceback
    would explain (DCLIP_DEBUG=1 shows it)."""
    if isinstance(error, OSError) and error.strerror:
        return DclipError(error.filename or "this machine", error.strerror)
    if isinstance(error, ImportError):
        return DclipError("a package is missing", str(error), do="pip install it")
    return None


def _inside_ray(error: Exception) -> DclipError | None:
    """Our own error, where it came out of a worker."""
    if "ray" not in sys.modules:
        return None
    from dclip_qdrant.jobs.cluster import own_error

    return own_error(error)


def fail(error: DclipError) -> None:
    """One line on stderr, and the exit code of the error's kind."""
    label = click.style("error", fg="red", bold=True) if sys.stderr.isatty() else "error"
    click.echo(f"{label}: {error}", err=True)
    sys.exit(EXIT_CODES.get(error.kind, 1))


def say(line: str) -> None:
    """For people: stderr, at once."""
    click.echo(line, err=True)


class _Stderr(logging.Handler):
    """Writes to whatever sys.stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(self.format(record), err=True)


def log_to_stderr() -> None:
    """The package's log lines, as they are, on stderr. The root logger stays as it is."""
    ours = logging.getLogger("dclip_qdrant")
    if not any(isinstance(handler, _Stderr) for handler in ours.handlers):
        ours.addHandler(_Stderr())
        ours.setLevel(logging.INFO)
        ours.propagate = False
