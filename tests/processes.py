"""Processes of tests: none outlives its test, and nothing waits for one without a limit. The limits suit a
machine that is ten times slower than ours."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

RUN_S, READY_S, STOP_S = 1200, 600, 60


def run(
    command: Sequence[object],
    *,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    code: int | None = None,
    limit: float = RUN_S,
) -> "subprocess.CompletedProcess[str]":
    """The command's end, with its output; `code`: the exit code that it must have."""
    done = subprocess.run(
        [str(part) for part in command], env=env, cwd=cwd, capture_output=True, text=True, timeout=limit
    )
    assert code is None or done.returncode == code, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def python(*arguments: object, **options) -> "subprocess.CompletedProcess[str]":
    return run([sys.executable, *arguments], **options)


@contextmanager
def started(
    command: Sequence[object],
    *,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    stdout: object = subprocess.DEVNULL,
    stderr: object = subprocess.DEVNULL,
    limit: float = RUN_S,
) -> "Iterator[subprocess.Popen[str]]":
    """A process that is ended, with its children, when the block is left, or after `limit` seconds: whoever
    reads its output then reads the end of it."""
    process = subprocess.Popen(
        [str(part) for part in command],
        env=env,
        cwd=cwd,
        stdout=stdout,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )
    watch = threading.Timer(limit, _kill, [process])
    watch.start()
    try:
        yield process
    finally:
        watch.cancel()
        _kill(process)
        process.wait(STOP_S)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def _kill(process: "subprocess.Popen[str]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def wait_until(
    ready: Callable[[], object],
    process: "subprocess.Popen[str] | None" = None,
    *,
    log: Path | None = None,
    limit: float = READY_S,
) -> None:
    """Until `ready` says something true; fails when the process ends before, or the time is over."""
    end = time.monotonic() + limit
    while not ready():
        told = log.read_text()[-3000:] if log is not None else ""
        assert process is None or process.poll() is None, f"it ended early\n{told}"
        assert time.monotonic() < end, f"not ready after {limit:.0f} s\n{told}"
        time.sleep(0.05)
