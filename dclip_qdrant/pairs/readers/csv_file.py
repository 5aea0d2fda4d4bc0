"""CSV and TSV, Flickr's captions.txt (comma) and results.csv (bar): one row a caption or one row a picture.

Files written by hand don't quote what CSV wants quoted. Whatever a line has, it becomes a caption of its own
picture or is rejected by name: a quotation mark that nobody closed never swallows the lines behind it, and an
unquoted comma never cuts a caption.
"""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from upath import UPath

from dclip_qdrant.errors import InputError
from dclip_qdrant.pairs.readers.lines import text_lines
from dclip_qdrant.pairs.readers.picture import (
    CAPTION_COLUMNS,
    KEY_COLUMNS,
    SourcePicture,
    find_column,
    image_column,
    unusable,
)
from dclip_qdrant.pairs.readers.rows import Row, pictures_of, row_of

DELIMITERS = ",\t|;"
QUOTING = ",;"  # tab- and bar-separated files have a record on every line
MOST_LINES = 1000  # of one quoted field
csv.field_size_limit(1 << 30)  # the module's own, 131,072 characters, is shorter than some descriptions
_INTEGER = re.compile(r"-?(0|[1-9]\d{0,14})")
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,14})(\.\d+)?([eE][+-]?\d{1,2})?")

Line = tuple[int, str | None]


@dataclass
class Record:
    """The fields of one record; None where it can't be read, with the reason."""

    line: int
    text: str
    fields: list[str] | None
    reason: str = ""


@dataclass
class Header:
    """The first line: what separates fields, and what they are called."""

    delimiter: str
    columns: list[str]
    image: str
    caption: int | None  # its place
    lines: int  # that stand before the first record


def read_csv(path: UPath, root: UPath) -> Iterator[SourcePicture]:
    """Raises InputError: no header, or no column for the picture."""
    header = _header(path)
    numbers = _number_columns(path, header)
    yield from pictures_of(lambda: _rows(path, header, numbers), root)


def picture_column(path: UPath) -> str:
    """The column that names pictures. Raises InputError: there is none."""
    return _header(path).image


def _header(path: UPath) -> Header:
    lines = text_lines(path)
    skipped = 0
    number, head = next(lines, (1, ""))
    if head is not None and head.lower().startswith("sep=") and len(head) == 5:  # Excel's own first line
        number, head = next(lines, (2, ""))
        skipped = 1
    if head is None:
        raise InputError(f"{path}:{number}", "not UTF-8 text", "a CSV file saved as UTF-8")
    delimiter = max(DELIMITERS, key=head.count)
    columns = [column.strip() for column in _fields(head, delimiter) or head.split(delimiter)]
    caption = find_column(columns, CAPTION_COLUMNS)
    image = image_column(columns, path)
    place = None if caption is None else columns.index(caption)
    return Header(delimiter, columns, image, place, skipped + 1)


def _rows(path: UPath, header: Header, numbers: dict[str, type]) -> Iterator[Row]:
    for record in _records(path, header):
        where = f"{path}:{record.line}"
        if record.fields is None:
            key = _picture_named(record.text, header) or where
            yield Row(where, error=unusable(key, where, record.reason))
            continue
        values: dict[str, Any] = dict(zip(header.columns, record.fields, strict=True))
        for column, kind in numbers.items():
            values[column] = kind(values[column]) if values[column] else None
        yield row_of(values, header.image, where)


def _number_columns(path: UPath, header: Header) -> dict[str, type]:
    """Columns besides picture, captions and ids in which every value is a number, as JSON and Parquet would
    have them; one with leading zeros (article numbers) is text."""
    kinds: dict[str, type] = {}
    meanings = (CAPTION_COLUMNS, KEY_COLUMNS, ("split",))
    plain_text = {header.image, *(find_column(header.columns, among) for among in meanings)}
    for record in _records(path, header):
        for column, value in zip(header.columns, record.fields or [], strict=False):
            if column in plain_text or not value:
                continue
            if _INTEGER.fullmatch(value):
                kinds.setdefault(column, int)
            elif _NUMBER.fullmatch(value):
                kinds[column] = float
            else:
                plain_text.add(column)
    return {column: kind for column, kind in kinds.items() if column not in plain_text}


def _records(path: UPath, header: Header) -> Iterator[Record]:
    """The records behind the header, each with as many fields as that."""
    waiting: list[Line] = []
    lines = text_lines(path)
    for _ in range(header.lines):
        next(lines, None)

    def ahead() -> Iterator[Line]:
        """The lines from here on, kept for those that read on."""
        yield from list(waiting)
        for line in lines:
            waiting.append(line)
            yield line

    while True:
        if not waiting:
            line = next(lines, None)
            if line is None:
                return
            waiting.append(line)
        number, text = waiting.pop(0)
        if text is None:
            yield Record(number, "", None, "not UTF-8 text")
        elif text.strip():
            if header.delimiter in QUOTING and text.count('"') % 2:
                whole, used = _quoted_lines(text, ahead(), header)
                if used:
                    del waiting[:used]
                    text = whole
            yield _record(number, text, header)


def _quoted_lines(text: str, following: Iterator[Line], header: Header) -> tuple[str, int]:
    """A record whose quoted field goes on over the next lines, and how many those are; 0 where its mark is
    just a mark: nothing closes it, or what follows are records themselves."""
    whole = text
    for used, (_, line) in enumerate(following, 1):
        if line is None or used > MOST_LINES or _looks_like_a_record(line, header):
            return text, 0
        whole += "\n" + line
        fields = _fields(whole, header.delimiter) if whole.count('"') % 2 == 0 else None
        if fields is not None and len(fields) == len(header.columns):
            return whole, used
    return text, 0


def _looks_like_a_record(line: str, header: Header) -> bool:
    """Whether a line by itself names a picture in the right place."""
    fields = line.split(header.delimiter)
    place = header.columns.index(header.image)
    if len(fields) < len(header.columns):
        return False
    name = fields[place].strip().strip('"')
    return bool(re.fullmatch(r"[^\"\n]+\.\w{2,5}", name)) and " " not in name.rsplit(".", 1)[1]


def _record(number: int, text: str, header: Header) -> Record:
    fields = _fields(text, header.delimiter)
    wanted = len(header.columns)
    if fields is None:  # marks that close nothing: the line as it is
        fields = [field.strip() for field in text.split(header.delimiter)]
    while len(fields) > wanted and not fields[-1]:  # Excel's empty columns at the end
        fields.pop()
    if len(fields) > wanted and header.caption == wanted - 1 and '"' not in text:
        # the caption is the rest of the line, commas and all
        fields = [field.strip() for field in text.split(header.delimiter, wanted - 1)]
    if len(fields) != wanted:
        reason = f"{len(fields)} fields where the header has {wanted} ({text[:60]!r})"
        return Record(
            number, text, None, f"{reason}; is a caption with {header.delimiter!r} in it not quoted?"
        )
    return Record(number, text, fields)


def _fields(text: str, delimiter: str) -> list[str] | None:
    """The fields of a whole record; None where its quotation marks are not CSV's."""
    if delimiter not in QUOTING:
        return [_unquoted(field.strip()) for field in text.split(delimiter)]
    try:
        (fields,) = csv.reader([text], delimiter=delimiter, skipinitialspace=True, strict=True)
    except (csv.Error, ValueError):
        return None
    return [field.strip() for field in fields]


def _unquoted(field: str) -> str:
    """A field of a file that needs no quoting, written by a program that quotes nevertheless: marks around
    the whole, and every mark inside doubled."""
    inner = field[1:-1]
    if len(field) >= 2 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return field


def _picture_named(text: str, header: Header) -> str | None:
    fields = text.split(header.delimiter)
    place = header.columns.index(header.image)
    return fields[place].strip() if place < len(fields) and fields[place].strip() else None
