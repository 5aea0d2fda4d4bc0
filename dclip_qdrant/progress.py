"""Progress on stderr: a line that rewrites itself on a terminal, a line every 10 seconds elsewhere."""

import sys
import time


class Progress:
    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet, self._tty = quiet, sys.stderr.isatty()
        self._began = self._last = time.monotonic()
        self._shown = False

    def __call__(self, count: int, text: str) -> None:
        now = time.monotonic()
        if self.quiet or now - self._last < (0.2 if self._tty else 10):
            return
        self._last = now
        line = f"{text} ({count / (now - self._began):.0f}/s)"
        print(f"\r\x1b[K{line}" if self._tty else line, end="" if self._tty else "\n", file=sys.stderr, flush=True)
        self._shown = True

    def done(self) -> None:
        if self._shown and self._tty:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
