"""Checkpoints of a run: written whole or not at all, the newest found again by whoever resumes.

`step-N.pt` is written under another name and then renamed; only tensors and plain values are inside, and it is read with weights_only.
"""

import io
import re
from typing import Any

import torch
from upath import UPath


class Checkpoints:
    """The checkpoints in one folder (local or any fsspec URI that all workers reach)."""

    def __init__(self, folder: UPath, *, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def _all(self) -> list[tuple[int, UPath]]:
        if not self.folder.exists():
            return []
        found = [(re.fullmatch(r"step-(\d+)\.pt", p.name), p) for p in self.folder.iterdir()]
        return sorted((int(m.group(1)), p) for m, p in found if m)

    def save(self, step: int, state: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        part = self.folder / f"step-{step}.pt.partial"
        part.write_bytes(buffer.getvalue())
        part.rename(self.folder / f"step-{step}.pt")
        for _, old in self._all()[: -self.keep]:
            old.unlink()

    def load(self) -> dict[str, Any] | None:
        """The newest state, or None. A file cut short by a crash of the disk is passed over for the one before it."""
        for _, path in reversed(self._all()):
            try:
                return torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
            except (RuntimeError, EOFError, ValueError):
                continue
        return None

    def clear(self) -> None:
        for _, path in self._all():
            path.unlink()
