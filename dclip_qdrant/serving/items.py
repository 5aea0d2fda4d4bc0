"""Pictures on their way into a collection, and the account of what became of them."""

import json
import logging
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, TextIO

from upath import UPath

from dclip_qdrant.errors import DclipError, UsageError
from dclip_qdrant.pairs.readers import SourcePicture, left_out_line
from dclip_qdrant.pictures.regions import Regions
from dclip_qdrant.tables import storage

logger = logging.getLogger(__name__)

NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://github.com/dclip-qdrant")
REASONS_KEPT = 5  # of a report: the first few, for people

Payload = dict[str, Any]


def point_id(key: str) -> str:
    """The point of a picture, the same in every run and on every machine."""
    return str(uuid.uuid5(NAMESPACE, key))


@dataclass
class Item:
    """One picture on its way: what the source said, its bytes, and what became of it.

    `carried`: the payload of an older point, which goes on whole; else the payload is made anew. `renewed`:
    the payload of a picture that is there already, where the source says something else of it now.
    """

    picture: SourcePicture
    key: str
    id: str
    carried: Payload | None = None
    data: bytes = b""
    content_hash: str = ""
    file_state: str = ""  # size and time of its file; see embedder.file_state
    size: tuple[int, int] = (0, 0)
    regions: Regions = field(default_factory=Regions)
    unchanged: bool = False
    renewed: Payload | None = None
    restated: Payload | None = None  # of an unchanged one whose file has another time
    error: DclipError | None = None

    @classmethod
    def of(cls, picture: SourcePicture, prefix: str = "", captions: int | None = None) -> "Item":
        """A picture with its first `captions`, or all of them."""
        key = prefix + picture.key
        own = [caption for caption in picture.captions if caption.strip()][:captions]
        return cls(replace(picture, captions=own), key, point_id(key), error=picture.error)

    @property
    def pending(self) -> bool:
        """Whether it is still to be embedded."""
        return self.error is None and not self.unchanged and self.renewed is None

    @property
    def caption(self) -> str:
        return "\n".join(self.picture.captions)

    def reject_row(self) -> dict[str, str]:
        return {"key": self.key, "path": self.picture.uri, "reason": str(self.error)}


@dataclass
class Report:
    """What an ingestion did."""

    seen: int = 0
    embedded: int = 0
    updated: int = 0  # there already; what is said of them is new
    unchanged: int = 0
    rejected: int = 0
    deleted: int = 0  # points of pictures that are gone
    gone: int = 0  # ... that are still there
    reasons: list[str] = field(default_factory=list)  # the first few
    kind: str = ""  # what the source was read as, where something of it was left out
    left_out: dict[str, int] = field(default_factory=dict)  # files of the source's folder, by kind

    def row(self) -> dict[str, Any]:
        counts = {
            "seen": self.seen,
            "embedded": self.embedded,
            "updated": self.updated,
            "unchanged": self.unchanged,
            "rejected": self.rejected,
        }
        counts |= {name: count for name in ("deleted", "gone") if (count := getattr(self, name))}
        return counts | ({"left_out": self.left_out} if self.left_out else {})

    def note_left_out(self, kind: str, counts: dict[str, int]) -> None:
        self.kind, self.left_out = kind, counts

    def line(self) -> str:
        text = f"{self.seen:,} pictures: {self.embedded:,} embedded, {self.unchanged:,} there already"
        text += f", {self.updated:,} updated" if self.updated else ""
        text += f", {self.rejected:,} rejected" if self.rejected else ""
        text += f", {self.deleted:,} deleted" if self.deleted else ""
        text += f"; {self.gone:,} points have no picture any more: `prune` deletes them" if self.gone else ""
        return text + (f"; {left_out_line(self.kind, self.left_out)}" if self.left_out else "")

    def add_rejects(self, rows: Sequence[dict[str, str]]) -> None:
        self.rejected += len(rows)
        self.reasons += [row["reason"] for row in rows[: REASONS_KEPT - len(self.reasons)]]


def _check_rejects(path: UPath) -> None:
    """Raises UsageError: a file that no earlier run wrote; it would be lost."""
    if path.is_file():
        with path.open("rb") as file:
            first = file.readline(1 << 20)
        if not first or b'"reason"' in first:
            return
    raise UsageError("`rejects`", f"{path} is something else than rejects of an earlier run", "a new file")


class RejectsFile:
    """A JSON line for each picture that didn't make it; the file appears with the first one."""

    def __init__(self, path: str | None) -> None:
        self.path = path
        self._file: TextIO | None = None

    def __enter__(self) -> "RejectsFile":
        if self.path and storage.as_path(self.path).is_file():
            _check_rejects(storage.as_path(self.path))
            storage.as_path(self.path).unlink()  # of an earlier run: what is still wrong will be said again
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with suppress(OSError):  # said when it was written
                self._file.close()

    def write(self, rows: Sequence[dict[str, str]]) -> None:
        if not self.path or not rows:
            return
        try:
            if self._file is None:
                path = storage.as_path(self.path)
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("w")
            self._file.writelines(json.dumps(row) + "\n" for row in rows)
            self._file.flush()
        except OSError as e:  # the pictures that are fine still go in
            logger.warning("%s: %s; rejected pictures are not listed", self.path, e.strerror or e)
            self.path = None
