"""Where metrics go besides the run's own `metrics.jsonl`: one file a service. A tracker may be
`package.module:Class`.

A class takes (run, folder, settings): the run's label, a folder of its own, the recipe; it is called with
(epoch, values), and `close()` when the run ends.
"""

import contextlib
import logging
from typing import Any, Protocol

from upath import UPath

from dclip_qdrant.lookup import find
from dclip_qdrant.tables import storage

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    def __call__(self, epoch: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def check(name: str | None) -> None:
    """Raises RecipeError, MissingExtra: a tracker that can't be made."""
    if name is not None:
        find("training.trackers", name)


class Report:
    """Takes a run's epochs as they end: rewrites `metrics.jsonl` in the run's folder, and tells the tracker.

    A tracker that fails is named once and left alone: metrics are not worth a run.
    """

    def __init__(self, label: str, folder: UPath, settings: dict[str, Any], tracker: str | None) -> None:
        self._label, self._file = label, folder / "metrics.jsonl"
        self._tracker: Tracker | None = None
        if tracker is not None:
            with self._named_once():
                self._tracker = find("training.trackers", tracker)(label, folder, settings)

    def __call__(self, history: list[dict[str, float]]) -> None:
        """`history`: a row an epoch, the newest last."""
        storage.write_json_lines(self._file, [{"run": self._label, **row} for row in history])
        if self._tracker is not None:
            row = dict(history[-1])
            with self._named_once():
                self._tracker(int(row.pop("epoch")), row)

    def close(self) -> None:
        if self._tracker is not None:
            with self._named_once():
                self._tracker.close()

    @contextlib.contextmanager
    def _named_once(self) -> Any:
        try:
            yield
        except Exception as e:
            self._tracker = None
            logger.warning("%s: no more metrics to the tracker: %s", self._label, e)
