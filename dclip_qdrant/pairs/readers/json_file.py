"""JSON Lines; one JSON file with COCO captions, a Karpathy split, or a list of rows (BLIP, LAVIS)."""

import json
from collections.abc import Iterator
from typing import Any

from upath import UPath

from dclip_qdrant.errors import InputError
from dclip_qdrant.pairs.readers.lines import text_lines
from dclip_qdrant.pairs.readers.picture import (
    IMAGE_COLUMNS,
    SourcePicture,
    captions_of,
    find_column,
    locate,
    split_of,
    unusable,
)
from dclip_qdrant.pairs.readers.rows import Row, pictures_of, row_of

NAME_COLUMNS = (*IMAGE_COLUMNS[1:], "image")  # `image` last: beside a file name it may hold something else


def read_json_lines(path: UPath, root: UPath) -> Iterator[SourcePicture]:
    """One object a line, one row a picture or one a caption."""
    yield from pictures_of(lambda: _rows_of_lines(path), root)


def _rows_of_lines(path: UPath) -> Iterator[Row]:
    for number, line in text_lines(path):
        where = f"{path}:{number}"
        if line is None:
            yield Row(where, error=unusable(where, where, "not UTF-8 text"))
        elif line.strip():
            try:
                values = loads(line)
            except ValueError as e:
                yield Row(where, error=unusable(where, where, str(e), "one object a line"))
                continue
            yield _row(values, where)


def _row(values: Any, where: str) -> Row:
    if not isinstance(values, dict):
        return Row(where, error=unusable(where, where, f"{json.dumps(values)[:40]}", "an object"))
    image = find_column(list(values), NAME_COLUMNS)
    if image is None:
        came = f"columns {', '.join(values) or 'none'}"
        expected = f"a column for the picture: one of {', '.join(NAME_COLUMNS)}"
        return Row(where, error=unusable(where, where, came, expected))
    return row_of(values, image, where)


def loads(text: str | bytes) -> Any:
    """A JSON value; NaN and the infinities, which JSON doesn't have, are null.

    Raises:
        ValueError: not JSON, with its reason.
    """
    try:
        return json.loads(text, parse_constant=lambda _: None)
    except json.JSONDecodeError as e:
        raise ValueError(f"not JSON ({e.msg})") from None
    except UnicodeDecodeError:
        raise ValueError("not JSON (not UTF-8 text)") from None
    except RecursionError:
        raise ValueError("not JSON that can be read (nested too deeply)") from None


def read_json(path: UPath, root: UPath) -> Iterator[SourcePicture]:
    """COCO captions ({"images", "annotations"}), a Karpathy split ({"images": [{"sentences", "split"}]}), or
    a list of rows.

    Raises:
        InputError: none of these.
    """
    try:
        data = loads(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except ValueError as e:
        raise InputError(path, str(e)) from None
    if isinstance(data, list) and data:
        rows = [_row(values, f"{path}#{number}") for number, values in enumerate(data)]
        yield from pictures_of(lambda: iter(rows), root)
        return
    data = data if isinstance(data, dict) else {}
    images = data.get("images")
    if not isinstance(images, list):
        expected = "COCO captions, a Karpathy split, or a list of objects with a picture and captions each"
        raise InputError(path, "JSON without an images list", expected)
    if "annotations" in data:
        yield from _coco(path, root, images, data["annotations"])
    else:
        yield from _karpathy(path, root, images)


def _coco(path: UPath, root: UPath, images: list[Any], annotations: Any) -> Iterator[SourcePicture]:
    if not isinstance(annotations, list):
        raise InputError(path, "annotations that are no list", "COCO captions")
    objects = [note for note in annotations if isinstance(note, dict)]
    if objects and not any("caption" in note for note in objects):
        came = f"annotations of {', '.join(objects[0])}, none with a caption"
        raise InputError(path, came, "COCO captions (captions_*.json; instances_*.json has boxes)")
    captions: dict[str, list[Any]] = {}
    for number, note in enumerate(annotations):
        if isinstance(note, dict) and isinstance(note.get("caption"), str) and "image_id" in note:
            captions.setdefault(str(note["image_id"]), []).append(note["caption"])  # "1" and 1 are one id
        else:
            where = f"{path}#annotations[{number}]"
            yield unusable(where, where, "an annotation without a caption or image_id")
    for number, row in enumerate(images):
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str):
            where = f"{path}#images[{number}]"
            yield unusable(where, where, "a picture without a file_name")
            continue
        yield SourcePicture(name, locate(root, name), captions.get(str(row.get("id")), []))


def _karpathy(path: UPath, root: UPath, images: list[Any]) -> Iterator[SourcePicture]:
    for number, row in enumerate(images):
        where = f"{path}#images[{number}]"
        if not isinstance(row, dict) or not isinstance(row.get("filename"), str):
            yield unusable(where, where, "a picture without a filename")
            continue
        name = "/".join(part for part in (row.get("filepath"), row["filename"]) if part)
        try:
            captions = captions_of(row.get("sentences"))
        except ValueError as e:
            yield unusable(name, where, str(e))
            continue
        # Karpathy's restval belongs to training
        split = "train" if row.get("split") == "restval" else split_of(row.get("split"))
        yield SourcePicture(name, locate(root, name), captions, split=split)
