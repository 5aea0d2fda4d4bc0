"""Checkpoints of a run: written whole or not at all, the newest found again by whoever resumes.

Only tensors and plain values are inside a `step-N.pt`, and it is read with weights_only.
"""

import io
import logging
import re
from typing import Any

import torch
from upath import UPath

from dclip_qdrant.tables import storage

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints in one folder (local or any fsspec URI that all workers reach)."""

    def __init__(self, folder: UPath, *, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def _by_step(self) -> list[tuple[int, UPath]]:
        if not self.folder.exists():
            return []
        named = [(re.fullmatch(r"step-(\d+)\.pt", p.name), p) for p in self.folder.iterdir()]
        return sorted((int(match.group(1)), p) for match, p in named if match)

    def save(self, step: int, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        storage.write_bytes(self.folder / f"step-{step}.pt", buffer.getvalue())
        for _, old in self._by_step()[: -self.keep]:
            old.unlink()

    def newest(self) -> int | None:
        """Its step."""
        return max((step for step, _ in self._by_step()), default=None)

    def load(self) -> dict[str, Any] | None:
        """The newest state, or None. A file that a crash of the disk cut short, or filled with zeros or with
        something else, is passed over for the one before, and said."""
        for _, path in reversed(self._by_step()):
            data = path.read_bytes()
            try:
                return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            except Exception as e:  # torch's readers raise whatever the bytes lead to
                reason = (str(e) or type(e).__name__).splitlines()[0][:120]
                logger.warning("%s can't be read (%s): the one before it is taken", path, reason)
        return None

    def clear(self) -> None:
        for _, path in self._by_step():
            path.unlink()
