"""How far a job is, in words."""

import logging
import time
from collections.abc import Sequence

logger = logging.getLogger(__name__)


def duration(seconds: float) -> str:
    """45 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Stages:
    """Says which of a job's stages begins, and how long the job has taken."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self._began = list(names), time.monotonic()

    def begin(self, name: str) -> None:
        number, elapsed = self._names.index(name) + 1, time.monotonic() - self._began
        since = f" ({duration(elapsed)} so far)" if number > 1 else ""
        logger.info("stage %d of %d: %s%s", number, len(self._names), name, since)
