"""Labelled pictures for zero-shot accuracy: a folder per class, or a Parquet file with `image` and
`label_name` (or `label`)."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from upath import UPath

from dclip_qdrant.errors import InputError, UsageError
from dclip_qdrant.pairs.readers.picture import locate
from dclip_qdrant.pairs.readers.tar_file import is_litter, is_system_folder
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
        root = storage.absolute(path)
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

    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        """Which pictures choose (alpha, strengths) and which are reported: of each class every other one, in
        the order of a hash of what they are. A class's odd one chooses.

        Raises:
            InputError: fewer than two pictures a class on average.
        """
        if len(self) < 2 * len(self.names):
            came = f"{len(self)} labelled pictures in {len(self.names)} classes"
            raise InputError(
                "`labelled`", came, "two or more a class: half of them choose, half are reported"
            )
        marks = [hashlib.sha256(p if isinstance(p, bytes) else p.encode()).digest() for p in self.pictures]
        place = [0] * len(self.names)
        halves: tuple[list[int], list[int]] = ([], [])
        for i in sorted(range(len(self)), key=lambda i: marks[i]):
            halves[place[self.labels[i]] % 2].append(i)
            place[self.labels[i]] += 1
        choosing, reported = (np.array(sorted(half), np.int64) for half in halves)
        return choosing, reported

    def load(self, i: int) -> Image.Image:
        """Raises ImageError."""
        return images.as_rgb(self.pictures[i], f"labelled picture {i}")


def _rows_of_folder(root: UPath) -> list[tuple[bytes | str, str]]:
    """(path, class) of every picture in the folders below `root`."""
    rows: list[tuple[bytes | str, str]] = []
    for folder in sorted((f for f in root.iterdir() if f.is_dir() and not is_system_folder(f.name)), key=str):
        files = sorted((f for f in folder.iterdir() if f.suffix.lower() in images.SUFFIXES), key=str)
        rows += [(str(file), folder.name) for file in files if not is_litter(file.name)]
    return rows


def _rows_of_parquet(file: UPath) -> list[tuple[bytes | str, str]]:
    """(bytes or path, class) of every row."""
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
    pictures = [_picture(value, file, row) for row, value in enumerate(table["image"].to_pylist())]
    return list(zip(pictures, _class_names(table, column, file), strict=True))


def _picture(value: Any, file: UPath, row: int) -> bytes | str:
    """Bytes, or the path of a picture beside the Parquet file. Raises InputError."""
    data = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
    if isinstance(data, bytes) and data:
        return data
    if isinstance(data, str) and data:
        return locate(storage.absolute(file).parent, data)
    raise InputError(f"{file}#{row}", "no picture", "bytes, a path, or {bytes, path}")


def _class_names(table: pa.Table, column: str, file: UPath) -> list[str]:
    """The class of each row in words. Hugging Face keeps numbers, with their names in the file's metadata.

    Raises:
        InputError: numbers without names ("a photo of a 3." would measure nothing), or a row without a class.
    """
    values = table[column].to_pylist()
    empty = next((row for row, value in enumerate(values) if value in (None, "")), None)
    if empty is not None:
        raise InputError(f"{file}#{empty}", f"no {column}", "a class for every picture")
    texts = [str(value) for value in values]
    if not all(re.fullmatch(r"-?\d+(\.0)?", text) for text in texts):
        return texts
    names = _names_in_metadata(table.schema, column)
    numbers = [int(float(text)) for text in texts]
    if not names or not 0 <= min(numbers) <= max(numbers) < len(names):
        came = f"classes that are numbers ({', '.join(sorted(set(texts))[:3])}, …) without names"
        do = "add a column label_name, or sort the pictures into a folder per class"
        raise InputError(file, came, "the classes' names: they become prompts", do)
    return [names[number] for number in numbers]


def _names_in_metadata(schema: pa.Schema, column: str) -> list[str]:
    """Names of a ClassLabel column, as `datasets` writes them into Parquet files."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = info["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []
