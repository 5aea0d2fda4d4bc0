"""Rows in the pairs contract -> Parquet files of a bounded size."""

import hashlib
import json
from types import TracebackType
from typing import Any

import pyarrow.parquet as pq
from upath import UPath

from dclip_qdrant.tables.contracts import PAIRS
from dclip_qdrant.tables.storage import open_for_arrow

ROWS_A_FILE = 2000
BYTES_A_FILE = 256 << 20
IDENTITY = ("key", "pixel_hash", "captions", "split")  # what two sets of pairs must share to be the same


class PairsWriter:
    """`with PairsWriter(folder) as writer:` writes `pairs-*.parquet`."""

    def __init__(self, folder: UPath) -> None:
        self.folder = folder
        self.files: list[UPath] = []
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def __enter__(self) -> "PairsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._flush()

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self._bytes += len(row["image"] or b"")
        if len(self._rows) >= ROWS_A_FILE or self._bytes >= BYTES_A_FILE:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        file = self.folder / f"pairs-{len(self.files):05d}.parquet"
        with file.open("wb") as f:
            pq.write_table(PAIRS.table(self._rows), f, row_group_size=256)
        self.files.append(file)
        self._rows, self._bytes = [], 0


def row_identity(row: dict[str, Any]) -> bytes:
    """What a row adds to the fingerprint of its pairs."""
    return json.dumps({name: row[name] for name in IDENTITY}, sort_keys=True).encode()


def fingerprint_of(files: list[UPath]) -> str:
    """sha256 over the identity of every row, in file order."""
    digest = hashlib.sha256()
    for file in files:
        with open_for_arrow(file) as f:
            for row in pq.read_table(f, columns=list(IDENTITY)).to_pylist():
                digest.update(row_identity(row))
    return digest.hexdigest()
