"""Parquet: ours, Hugging Face's ({bytes, path}), or any table with a picture column (bytes or paths) and a
captions column."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from dclip_qdrant.errors import InputError
from dclip_qdrant.pairs.readers.picture import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    KEY_COLUMNS,
    UNREADABLE,
    SourcePicture,
    captions_of,
    find_column,
    image_column,
    locate,
    plain,
    split_of,
    unusable,
)
from dclip_qdrant.pairs.readers.rows import Row, pictures_of, row_of
from dclip_qdrant.tables import storage

ROWS = 64  # at a time
NOT_EXTRA = ("width", "height", "uri", "pixel_hash")  # of our own pairs


@dataclass(frozen=True)
class Columns:
    """Which columns hold what."""

    image: str
    name: str | None  # what a row calls its picture: its id, or the path that came with its bytes
    key: str | None
    caption: str | None
    split: str | None


def columns_of(schema: pa.Schema, path: UPath) -> Columns:
    """Raises InputError: no column for the picture, or one of a type that holds none."""
    names = schema.names
    image = image_column(names, path)
    kind = schema.field(image).type
    types = pa.types
    holds = types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind)
    if not (holds or types.is_large_binary(kind) or types.is_struct(kind) or types.is_null(kind)):
        raise InputError(path, f"column {image!r} of type {kind}", "bytes, a path, or {bytes, path}")
    key = find_column(names, KEY_COLUMNS)
    path_of = f"{image}.path" if types.is_struct(kind) and kind.get_field_index("path") >= 0 else None
    name = key or path_of or ("uri" if "uri" in names else None)
    return Columns(image, name, key, find_column(names, CAPTION_COLUMNS), find_column(names, ("split",)))


def has_pictures(path: UPath) -> bool:
    """Whether a Parquet file has a column for pictures at all (img2dataset's table of addresses hasn't)."""
    with storage.open_for_arrow(path) as f:
        try:
            names = pq.read_schema(f).names
        except (pa.ArrowInvalid, OSError):
            return True  # it will be read, and named as broken
    return find_column(names, IMAGE_COLUMNS) is not None


def read_parquet(path: UPath, root: UPath) -> Iterator[SourcePicture]:
    """Raises InputError: no column for the picture. A file that is broken is one unusable part."""
    try:
        with storage.open_for_arrow(path) as f:
            file = pq.ParquetFile(f)
            columns = columns_of(file.schema_arrow, path)
            by_name = _refers_to_files(file.schema_arrow.field(columns.image).type)
        if by_name:
            yield from pictures_of(lambda: _named_rows(path, columns), root)
        else:
            yield from _embedded(path, root, columns)
    except (pa.ArrowException, OSError) as e:
        yield unusable(path.name, path, f"not Parquet, or damaged ({' '.join(str(e).split())[:160]})")


def _refers_to_files(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _batches(path: UPath, columns: list[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of every row."""
    number = 0
    with storage.open_for_arrow(path) as f:
        for batch in pq.ParquetFile(f).iter_batches(batch_size=ROWS, columns=columns):
            for row in _rows_of(batch):
                yield number, row
                number += 1


def _rows_of(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows; a value that Python can't hold is UNREADABLE, so that it costs its own row alone."""
    try:
        return batch.to_pylist()
    except (OverflowError, ValueError):  # dates beyond the years 1 to 9999
        columns = {name: [_value(scalar) for scalar in batch[name]] for name in batch.schema.names}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (OverflowError, ValueError):
        return UNREADABLE


def _named_rows(path: UPath, columns: Columns) -> Iterator[Row]:
    for number, row in _batches(path):
        yield row_of(row, columns.image, f"{path}#{number}")


def _embedded(path: UPath, root: UPath, columns: Columns) -> Iterator[SourcePicture]:
    """Pictures inside the file. Rows with the same picture and the same name are one; the same name for other
    pictures (`image.jpg` in every row) names none of them: their keys are the file and the row."""
    names = _names(path, columns)
    several = {name for name, count in Counter(names).items() if count > 1 and name is not None}
    groups: Counter[tuple[str, str]] = Counter()
    if several:
        for number, row in _batches(path, [columns.image]):
            if names[number] in several:
                groups[str(names[number]), _digest(row[columns.image])] += 1
    pictures_of_name = Counter(name for name, _ in groups)
    waiting: dict[tuple[str, str], SourcePicture] = {}
    before: tuple[str, SourcePicture] | None = None  # a picture without a name, which may go on
    for number, row in _batches(path):
        picture = _picture(path, root, number, row, columns)
        if picture.error is not None:
            yield picture
            continue
        name = names[number]
        digest = _digest(row[columns.image]) if name is None or name in several else ""
        if before is not None and (name is not None or digest != before[0]):
            yield before[1]
            before = None
        if name is None:
            if before is None:
                before = (digest, picture)
            else:
                before[1].captions += picture.captions
            continue
        if name not in several:
            yield picture
            continue
        group = (name, digest)
        first = waiting.setdefault(group, picture)
        if first is not picture:
            first.captions += picture.captions
        elif pictures_of_name[name] > 1:
            picture.key = f"{path.name}-{number:08d}"
            picture.uri = f"{path}#{number}"
        groups[group] -= 1
        if groups[group] <= 0:
            yield waiting.pop(group)
    if before is not None:
        yield before[1]
    yield from waiting.values()  # of rows that were unusable


def _names(path: UPath, columns: Columns) -> list[str | None]:
    """What each row calls its picture."""
    if columns.name is None:
        with storage.open_for_arrow(path) as f:
            return [None] * pq.ParquetFile(f).metadata.num_rows
    names: list[str | None] = []
    for _, row in _batches(path, [columns.name]):
        (value,) = row.values()
        value = value.get("path") if isinstance(value, dict) else value
        names.append(None if value in (None, "") else str(value))
    return names


def _digest(value: Any) -> str:
    data = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
    return hashlib.sha256(data if isinstance(data, bytes) else str(data).encode()).hexdigest()


def _picture(path: UPath, root: UPath, number: int, row: dict[str, Any], columns: Columns) -> SourcePicture:
    value = row[columns.image]
    inner = value if isinstance(value, dict) else {}
    data = inner.get("bytes") if inner else value if isinstance(value, bytes) else None
    name = inner.get("path") if inner else row.get("uri")
    own_key = row[columns.key] if columns.key else None
    ident = str(own_key) if own_key not in (None, "") else name or f"{path.name}-{number:08d}"
    known = {columns.image, columns.caption, columns.key, columns.split, *NOT_EXTRA}
    where = f"{path}#{ident}"
    if data is None and not name:
        return unusable(ident, where, "no picture in this row")
    try:
        captions = captions_of(row[columns.caption]) if columns.caption else []
        extra = {k: plain(v) for k, v in row.items() if k not in known and not isinstance(v, bytes)}
    except ValueError as e:
        return unusable(ident, where, str(e))
    split = split_of(row[columns.split]) if columns.split else None
    uri = where if data is not None else locate(root, str(name))
    return SourcePicture(ident, uri, captions, image=data, split=split, extra=extra)
