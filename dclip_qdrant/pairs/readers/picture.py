"""What every reader gives: a picture of the source, or a part of the source that can't be used."""

import datetime
import decimal
import math
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from upath import UPath

from dclip_qdrant.errors import DclipError, InputError

KEY_COLUMNS = ("key", "image_id", "id")
IMAGE_COLUMNS = (
    "image",
    "file_name",
    "filename",
    "image_name",
    "image_path",
    "filepath",
    "path",
    "file",
    "uri",
    "jpg",
    "bytes",
)
CAPTION_COLUMNS = ("captions", "caption", "text", "sentences", "sentence", "comment", "title", "description")
TEXT_FIELDS = (
    "raw",
    "caption",
    "text",
    "sentence",
    "value",
)  # where a caption that is an object has its words
DEEPEST = 32  # levels of lists and objects in what a row says besides


@dataclass
class SourcePicture:
    """One picture as its source tells it. `image` holds its bytes, or `uri` says where they are.

    With an `error` it is a part of the source that can't be used: a line, a member, a whole shard.
    """

    key: str
    uri: str
    captions: list[str]
    image: bytes | None = None
    split: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    place: str = ""  # where in its source it stands: file and number, the same at every reading
    error: DclipError | None = None


def printable(name: str) -> str:
    """A file's name as text that can be written anywhere: bytes that are not UTF-8 become question marks in
    diamonds."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def unusable(key: str, where: object, came: str, expected: str | None = None) -> SourcePicture:
    """A part of the source that can't be used, with the reason."""
    return SourcePicture(key, str(where), [], error=InputError(where, came, expected))


def find_column(columns: Sequence[str], among: Sequence[str]) -> str | None:
    """The first of the names `among` that there is, whatever its case."""
    clean = {column.strip().lower(): column for column in columns}
    return next((clean[name] for name in among if name in clean), None)


def image_column(columns: Sequence[str], where: object, among: Sequence[str] = IMAGE_COLUMNS) -> str:
    """Raises InputError: no column for the picture."""
    column = find_column(columns, among)
    if column is None:
        came = f"columns {', '.join(columns) or 'none'}"
        raise InputError(where, came, f"a column for the picture: one of {', '.join(among)}")
    return column


def captions_of(value: Any) -> list[str]:
    """The captions in a field: a text, an object that holds one (`{"raw": ...}`), or a list of these.

    Empty ones stay: whoever asked counts them.

    Raises:
        ValueError: something else, e.g. a number or one text a language; its message says what.
    """
    if value is None:
        return []
    if isinstance(value, list | tuple):
        return [_caption(part) for part in value if part is not None]
    return [_caption(value)]


def _caption(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        text = next((value[name] for name in TEXT_FIELDS if isinstance(value.get(name), str)), None)
        if text is not None:
            return text
        tokens = value.get("tokens")
        if isinstance(tokens, list) and tokens and all(isinstance(token, str) for token in tokens):
            return " ".join(tokens)
        raise ValueError(f"a caption that is an object of {', '.join(map(str, value)) or 'nothing'}")
    raise ValueError(f"a caption that is {type(value).__name__}: {str(value)[:40]!r}")


class _Unreadable:
    """Stands for a value of a table that Python has nothing for."""


UNREADABLE = _Unreadable()


def plain(value: Any, depth: int = 0) -> Any:
    """A value as JSON can hold it: dates as ISO text, what is no number as null.

    Raises:
        ValueError: nested too deeply, or text that is no Unicode.
    """
    if value is UNREADABLE:
        raise ValueError("a date beyond the years 1 to 9999, or another value that can't be read")
    if depth > DEEPEST:
        raise ValueError(f"nested more than {DEEPEST} levels deep")
    if isinstance(value, str):
        value.encode()  # half of a surrogate pair: a UnicodeEncodeError is a ValueError
        return value
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if not -(2**63) <= value < 2**64:  # what Qdrant's payload holds exactly
            raise ValueError("a whole number of more than 64 bits")
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): plain(v, depth + 1) for k, v in value.items() if not isinstance(v, bytes)}
    if isinstance(value, list | tuple):
        return [plain(v, depth + 1) for v in value]
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return float(value) if value.is_finite() else None
    return str(value)


def split_of(value: Any) -> str | None:
    """The split that a row says, as text."""
    return None if value is None or value == "" else str(value)


def locate(root: UPath, name: str) -> str:
    """`name` under the picture root, or beside it when the name already says the folder."""
    if "://" in name or name.startswith("/"):
        return name
    here = root / name
    # Macs write é as two characters in file names, the list may have it as one
    spellings = (name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))
    for spelled in dict.fromkeys(spellings):
        for folder in (root, root.parent):
            with suppress(OSError, ValueError):  # a name that is too long, or holds a NUL: reading it says so
                if (folder / spelled).exists():
                    return str(folder / spelled)
    return str(here)
