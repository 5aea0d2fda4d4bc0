"""Labelled pictures for zero-shot accuracy: a folder per class, or a Parquet file with `image` and
`label_name` (or `label`)."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image
from upath import UPath

from dclip_qdrant.errors import InputError, UsageError
from dclip_qdrant.pictures import images
from dclip_qdrant.tables import storage

PROMPT = "a photo of a {}."  # CLIP's single prompt; DCLIP's evaluation uses it too (docs/papers.md 1.4)
LABEL_COLUMNS = ("label_name", "class", "label")


@dataclass(frozen=True)
class Labelled:
    """Pictures with a class each."""

    names: tuple[str, ...]  # [C]
    labels: tuple[int, ...]  # [N]
    pictures: tuple[bytes | str, ...]  # encoded bytes, or a path
    fingerprint: str

    @classmethod
    def open(cls, path: str | Path) -> "Labelled":
        """Raises UsageError (nothing there) or InputError (no classes, no columns)."""
        root = storage.as_path(path)
        if root.is_dir():
            rows = _rows_of_folder(root)
        elif root.is_file():
            rows = _rows_of_parquet(root)
        else:
            expected = "labelled pictures: a folder per class, or Parquet"
            raise UsageError(path, "no such file or folder", expected)
        names = sorted({name for _, name in rows})
        if len(names) < 2:
            came = f"{len(rows)} pictures in {len(names)} classes"
            raise InputError(path, came, "two classes or more")
        number_of = {name: number for number, name in enumerate(names)}
        digest = hashlib.sha256()
        for picture, name in rows:
            digest.update(name.encode() + (picture if isinstance(picture, bytes) else picture.encode()))
        labels = tuple(number_of[name] for _, name in rows)
        return cls(tuple(names), labels, tuple(picture for picture, _ in rows), digest.hexdigest())

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def prompts(self) -> list[str]:
        return [PROMPT.format(n.replace("_", " ")) for n in self.names]

    def load(self, i: int) -> Image.Image:
        """Raises ImageError."""
        return images.as_rgb(self.pictures[i], f"labelled picture {i}")


def _rows_of_folder(root: UPath) -> list[tuple[bytes | str, str]]:
    """(path, class) of every picture in the folders below `root`."""
    rows: list[tuple[bytes | str, str]] = []
    for folder in sorted((f for f in root.iterdir() if f.is_dir()), key=str):
        files = sorted((f for f in folder.iterdir() if f.suffix.lower() in images.SUFFIXES), key=str)
        rows += [(str(file), folder.name) for file in files]
    return rows


def _rows_of_parquet(file: UPath) -> list[tuple[bytes | str, str]]:
    """(bytes, class) of every row."""
    with storage.open_for_arrow(file) as f:
        try:
            table = pq.read_table(f)
        except Exception as e:
            came = f"can't be read as Parquet: {str(e)[:80]}"
            raise InputError(file, came, "a folder per class, or Parquet") from e
    column = next((c for c in LABEL_COLUMNS if c in table.column_names), None)
    if column is None or "image" not in table.column_names:
        came = f"columns {', '.join(table.column_names)}"
        raise InputError(file, came, "image and label_name (or label)")
    pictures = [value["bytes"] if isinstance(value, dict) else value for value in table["image"].to_pylist()]
    return list(zip(pictures, map(str, table[column].to_pylist()), strict=True))
