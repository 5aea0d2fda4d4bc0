"""Progress on stderr: a line that rewrites itself on a terminal, a line every 10 seconds elsewhere."""

import sys
import time


class Progress:
    """`bar(count, text)` as often as one likes; `done()` leaves the terminal clean."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._terminal = sys.stderr.isatty()
        self._began = self._last = time.monotonic()
        self._shown = False

    def __call__(self, count: int, text: str) -> None:
        now = time.monotonic()
        if self.quiet or now - self._last < (0.2 if self._terminal else 10):
            return
        self._last = now
        line = f"{text} ({count / (now - self._began):.0f}/s)"
        sys.stderr.write(f"\r\x1b[K{line}" if self._terminal else f"{line}\n")
        sys.stderr.flush()
        self._shown = True

    def done(self) -> None:
        if self._shown and self._terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
