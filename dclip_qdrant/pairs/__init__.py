"""Pairs: pictures with captions, in the pairs contract."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from upath import UPath

from dclip_qdrant.errors import InputError, SchemaError, UsageError
from dclip_qdrant.pictures import images
from dclip_qdrant.tables import storage
from dclip_qdrant.tables.contracts import PAIRS

_MAKE = "make them with: dclip-qdrant pairs SOURCE -o DIR"


@dataclass(frozen=True)
class Pairs:
    """An opened pairs folder (or one Parquet file in the pairs contract)."""

    path: UPath
    files: tuple[UPath, ...]
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path | UPath) -> "Pairs":
        """Checks that the pairs are whole and in the contract; reads no pictures.

        Raises:
            UsageError: nothing there. InputError: half-written. SchemaError: a missing or wrong column.
        """
        root = storage.as_path(path)
        if root.is_dir():
            files = sorted(root.glob("*.parquet"), key=str)
            if not files:
                raise UsageError(path, "no Parquet files", "a pairs folder", _MAKE)
            manifest_file = root / "manifest.json"
            manifest = json.loads(manifest_file.read_text()) if manifest_file.exists() else None
        elif root.exists():
            files, manifest = [root], None
        else:
            raise UsageError(path, "no such file or folder", "a pairs folder", _MAKE)
        for file in files:
            with storage.open_for_arrow(file) as f:
                try:
                    schema = pq.read_schema(f)
                except pa.ArrowInvalid as e:
                    raise SchemaError(file, f"not Parquet ({e})", "the pairs contract", _MAKE) from e
            PAIRS.check(schema, file, do=_MAKE)
        if manifest is None:
            if root.is_dir():
                came = "no manifest.json: these pairs were not written to the end"
                raise InputError(path, came, "a finished pairs folder", _MAKE)
            manifest = {"fingerprint": images.content_hash(root.read_bytes())}
        return cls(root, tuple(files), manifest)

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    def table(
        self,
        columns: list[str],
        splits: tuple[str, ...] | None = None,
        *,
        rows: np.ndarray | None = None,
    ) -> pa.Table:
        """The named columns, of the named splits, in file order; `rows`: only these positions among them,
        ascending."""
        parts, before = [], 0
        for file in self.files:
            with storage.open_for_arrow(file) as f:
                table = pq.read_table(f, columns=_with_split(columns))
            if splits:
                table = table.filter(pc.field("split").isin(splits))
            count = table.num_rows
            if rows is not None:
                table = table.take(rows[(rows >= before) & (rows < before + count)] - before)
            before += count
            parts.append(table.select(columns))
        return pa.concat_tables(parts)

    def rows(
        self, columns: list[str], splits: tuple[str, ...] | None = None, batch: int = 64
    ) -> Iterator[list[dict[str, Any]]]:
        """Lists of at most `batch` rows, without ever holding more than one file's row group."""
        for file in self.files:
            with storage.open_for_arrow(file) as f:
                for part in pq.ParquetFile(f).iter_batches(batch_size=batch, columns=_with_split(columns)):
                    rows = [r for r in part.to_pylist() if not splits or r["split"] in splits]
                    if rows:
                        yield rows

    def splits(self) -> dict[str, int]:
        """How many pictures each split has."""
        counted = self.table(["split"])["split"].value_counts().to_pylist()
        return {c["values"]: c["counts"] for c in counted}

    def hold_pictures(self) -> bool:
        """Whether any picture is inside the Parquet files, by their statistics; unknown counts as yes."""
        for file in self.files:
            with storage.open_for_arrow(file) as f:
                metadata = pq.ParquetFile(f).metadata
                for number in range(metadata.num_row_groups):
                    group = metadata.row_group(number)
                    names = [group.column(i).path_in_schema for i in range(group.num_columns)]
                    statistics = group.column(names.index("image")).statistics
                    if statistics is None or statistics.null_count != group.num_rows:
                        return True
        return False


def _with_split(columns: list[str]) -> list[str]:
    return columns if "split" in columns else [*columns, "split"]


def load_image(row: dict[str, Any]) -> Image.Image:
    """The upright RGB picture of a pairs row. Raises ImageError."""
    data = row["image"] if row.get("image") is not None else images.read(row["uri"])
    return images.open_rgb(data, row.get("uri") or row["key"])
