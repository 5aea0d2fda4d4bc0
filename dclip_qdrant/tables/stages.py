"""Stage folders: each stage writes one, named by the hash of its inputs, its `manifest.json` last.

A folder with a manifest is done.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from dclip_qdrant.errors import InputError
from dclip_qdrant.tables import storage
from dclip_qdrant.tables.contracts import Contract


def digest(inputs: Any) -> str:
    """12 hex digits that stand for the inputs (plain JSON values)."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]


class Stage:
    """A stage's folder `<root>/<kind>-<hash of inputs>`."""

    def __init__(self, root: str | UPath, kind: str, inputs: dict[str, Any]) -> None:
        self.kind = kind
        self.inputs = inputs
        self.path = storage.as_path(root) / f"{kind}-{digest(inputs)}"

    @property
    def done(self) -> bool:
        return (self.path / "manifest.json").exists()

    def manifest(self) -> dict[str, Any]:
        return json.loads((self.path / "manifest.json").read_text())

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Writes the manifest: from now on the stage is done."""
        manifest = {"kind": self.kind, "inputs": self.inputs, **facts}
        storage.write_json(self.path / "manifest.json", manifest)
        return manifest

    def clear(self) -> None:
        """Throws the stage away, manifest first, so that a crash in between leaves nothing that looks
        done."""
        if self.path.exists():
            (self.path / "manifest.json").unlink(missing_ok=True)
            storage.remove(self.path)


def write_part(folder: UPath, contract: Contract, rows: list[dict[str, Any]]) -> UPath:
    """One Parquet part named by its keys: over itself when a task is tried again."""
    name = hashlib.sha256("\n".join(r["key"] for r in rows).encode()).hexdigest()[:20]
    buffer = io.BytesIO()
    pq.write_table(contract.table(rows), buffer, compression="zstd")
    return storage.write_bytes(folder / f"part-{name}.parquet", buffer.getvalue())


def part_files(folder: UPath) -> list[UPath]:
    """The files of a stage's parts, in order of name."""
    return sorted(folder.glob("part-*.parquet"), key=str) if folder.exists() else []


def parts(
    folder: UPath, contract: Contract, columns: list[str], *, check: list[str] | None = None
) -> Iterator[pa.Table]:
    """The parts of a stage, one table of `columns` each, in order of name; these columns, or those of
    `check`, are held against the contract."""
    for file in part_files(folder):
        with storage.open_for_arrow(file) as f:
            try:
                contract.check(pq.read_schema(f), file, check or columns)
            except pa.ArrowInvalid as e:
                raise InputError(file, f"not Parquet ({e})", do="remove it and submit again") from e
            f.seek(0)
            yield pq.read_table(f, columns=columns)


def done_keys(folder: UPath, contract: Contract) -> set[str]:
    """The keys that the parts of a stage hold."""
    keys: set[str] = set()
    for table in parts(folder, contract, ["key"]):
        keys.update(table["key"].to_pylist())
    return keys


def nested(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """A list<list<float>> column -> all vectors [total, D] float32 and how many each row has [rows]."""
    rows = column.combine_chunks()
    if isinstance(rows, pa.ChunkedArray):
        rows = pa.concat_arrays(rows.chunks) if rows.num_chunks else pa.array([], rows.type)
    counts = np.diff(rows.offsets.to_numpy()) if len(rows) else np.zeros(0, np.int64)
    inner = rows.flatten()
    if len(inner) == 0:
        return np.zeros((0, 0), np.float32), counts
    return inner.flatten().to_numpy().reshape(len(inner), -1).astype(np.float32), counts


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A list<float> column -> [rows, D] float32; D is 0 when all are empty."""
    return np.asarray(column.combine_chunks().flatten().to_numpy(), np.float32).reshape(len(column), -1)
