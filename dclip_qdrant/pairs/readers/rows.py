"""Rows -> pictures: a picture that has a row for each caption becomes one, wherever its rows stand."""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from upath import UPath

from dclip_qdrant.pairs.readers.picture import (
    CAPTION_COLUMNS,
    KEY_COLUMNS,
    SourcePicture,
    captions_of,
    find_column,
    locate,
    plain,
    split_of,
    unusable,
)


@dataclass
class Row:
    """A row that names a picture, or one that can't be used (`error`)."""

    where: str  # file and line
    name: str = ""  # the picture's, as the row has it
    key: str | None = None  # what the row calls the picture's id
    captions: list[str] = field(default_factory=list)
    split: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    error: SourcePicture | None = None


def row_of(values: dict[str, Any], image: str, where: str) -> Row:
    """A row out of its fields; `image` is the one that names the picture."""
    columns = list(values)
    name = values[image]
    if not isinstance(name, str) or not name.strip():
        came = f"{image} is {'empty' if name in (None, '') else repr(name)[:40]}"
        return Row(where, error=unusable(where, where, came, "the name of a picture"))
    caption, key = find_column(columns, CAPTION_COLUMNS), find_column(columns, KEY_COLUMNS)
    split = find_column(columns, ("split",))
    known = {image, caption, key, split}
    try:
        captions = captions_of(values[caption]) if caption else []
        extra = {k: plain(v) for k, v in values.items() if k not in known and not isinstance(v, bytes)}
        plain([name, captions])
    except ValueError as e:
        return Row(where, error=unusable(name, where, _reason(e)))
    own_key = None if key is None or values[key] in (None, "") else str(values[key])
    return Row(where, name, own_key, captions, split_of(values[split]) if split else None, extra)


def pictures_of(rows: Callable[[], Iterator[Row]], root: UPath) -> Iterator[SourcePicture]:
    """One picture a name, with the captions of all its rows; what can't be used as it comes.

    `rows` is called twice: first to learn which names come again. Only pictures that do are held until their
    last row, so that a long file of one row a picture streams through. The key is the picture's id where the
    source has one for it (and not one for each caption), else its name.
    """
    repeats, ids_are_the_pictures = _repeated(rows())
    waiting: dict[str, SourcePicture] = {}
    for row in rows():
        if row.error is not None:
            yield row.error
            continue
        picture = waiting.get(row.name)
        if picture is None:
            key = row.key if row.key is not None and ids_are_the_pictures else row.name
            picture = SourcePicture(key, locate(root, row.name), [], split=row.split, extra=row.extra)
        elif row.split != picture.split:
            yield unusable(row.name, row.where, f"split {row.split!r}, and {picture.split!r} before")
        picture.captions += row.captions
        number = hash(row.name)
        if repeats.get(number, 1) > 1:
            repeats[number] -= 1
            waiting[row.name] = picture
        else:
            waiting.pop(row.name, None)
            yield picture
    yield from waiting.values()  # none, unless two names had one hash


def _repeated(rows: Iterator[Row]) -> tuple[dict[int, int], bool]:
    """How many rows each name has, by its hash, for those that have several; whether a picture never has two
    ids."""
    names, ids = array("q"), array("q")
    for row in rows:
        if row.error is None:
            names.append(hash(row.name))
            ids.append(hash(row.key))
    if not names:
        return {}, True
    values, inverse, counts = np.unique(
        np.frombuffer(names, np.int64), return_inverse=True, return_counts=True
    )
    of_pictures = len(np.unique(np.stack([inverse, np.frombuffer(ids, np.int64)]), axis=1).T) == len(values)
    several = counts > 1
    return dict(zip(values[several].tolist(), counts[several].tolist(), strict=True)), of_pictures


def _reason(e: ValueError) -> str:
    return "text that is not Unicode (half of a character)" if isinstance(e, UnicodeError) else str(e)
