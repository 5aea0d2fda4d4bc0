"""Lists of pictures on the web: (address, caption) rows of TSV, CSV, JSON Lines or Parquet."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dclip_qdrant.errors import InputError
from dclip_qdrant.pairs.readers.json_file import loads
from dclip_qdrant.pairs.readers.lines import text_lines
from dclip_qdrant.pairs.readers.picture import CAPTION_COLUMNS, captions_of, find_column
from dclip_qdrant.tables import storage

URL_COLUMNS = ("url", "image_url", "img_url", "image_link", "link", "src", "image", "uri", "path")
CAPTIONS = (*CAPTION_COLUMNS, "alt", "alt_text", "top_caption")


@dataclass(frozen=True)
class Address:
    """A picture on the web with its caption; with an `error` a row that is none."""

    url: str
    caption: str = ""
    error: str | None = None


def addresses(source: str) -> Iterator[Address]:
    """The rows of a list; which column is which follows from its header, or, without one (Conceptual Captions
    has the caption first, Conceptual 12M the address), from where the addresses stand.

    Raises:
        InputError: no such list, no column of addresses, or not one row with an address.
    """
    path = Path(source)
    if not path.is_file():
        raise InputError(
            source, "no such file", "a TSV, CSV, JSONL or Parquet list of addresses and captions"
        )
    kind = path.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        yield from _of_json_lines(path)
    elif kind == ".parquet":
        yield from _of_parquet(path)
    else:
        yield from _of_table(path, "," if kind == ".csv" else "\t")


def is_address(value: object) -> bool:
    return isinstance(value, str) and value.strip().lower().startswith(("http://", "https://"))


def _of_values(values: dict[str, Any], where: str) -> Address:
    url = find_column(list(values), URL_COLUMNS)
    caption = find_column([c for c in values if c != url], CAPTIONS)
    if url is None or not is_address(values[url]):
        came = "no column for the address" if url is None else f"{str(values[url])[:60]!r} is no address"
        return Address(where, error=came)
    try:
        captions = captions_of(values[caption]) if caption else []
    except ValueError as e:
        return Address(str(values[url]), error=str(e))
    return _address(str(values[url]), " ".join(captions[:1]))


def _address(url: str, caption: str) -> Address:
    if not caption.strip():
        return Address(url.strip(), error="no caption")
    return Address(url.strip(), caption.strip())


def _of_json_lines(path: Path) -> Iterator[Address]:
    for number, line in text_lines(storage.as_path(path)):
        where = f"{path}:{number}"
        if line is None or line.strip():
            try:
                values = loads(line) if line is not None else None
            except ValueError as e:
                yield Address(where, error=str(e))
                continue
            if isinstance(values, dict):
                yield _of_values(values, where)
            else:
                yield Address(where, error="not one JSON object")


def _of_parquet(path: Path) -> Iterator[Address]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as e:
        raise InputError(path, f"not Parquet ({str(e)[:80]})") from None
    names = file.schema_arrow.names
    wanted = [c for c in (find_column(names, URL_COLUMNS), find_column(names, CAPTIONS)) if c]
    if find_column(names, URL_COLUMNS) is None:
        raise InputError(path, f"columns {', '.join(names)}", "a column url")
    number = 0
    for batch in file.iter_batches(batch_size=1024, columns=wanted):
        for values in batch.to_pylist():
            yield _of_values(values, f"{path}#{number}")
            number += 1


def _of_table(path: Path, delimiter: str) -> Iterator[Address]:
    lines = text_lines(storage.as_path(path))
    first = next(((n, line) for n, line in lines if line and line.strip()), None)
    if first is None:
        raise InputError(path, "an empty file", "addresses and captions")
    head = _fields(first[1], delimiter)
    places = _places_by_name(head)
    rows: Iterator[tuple[int, str | None]] = lines
    if places is None:  # no header: a row already
        places = _places_by_value(head)
        rows = chain([first], lines)
    if places is None:
        came = f"{first[1][:60]!r}"
        expected = "an address and a caption in two columns, or a header that names them (url, caption)"
        raise InputError(f"{path}:{first[0]}", came, expected)
    url, caption = places
    for number, line in rows:
        where = f"{path}:{number}"
        if line is None:
            yield Address(where, error="not UTF-8 text")
        elif line.strip():
            fields = _fields(line, delimiter)
            if max(url, caption) >= len(fields) or not is_address(fields[url]):
                yield Address(where, error=f"{line[:60]!r}: no address in column {url + 1}")
            else:
                yield _address(fields[url], fields[caption])


def _fields(line: str, delimiter: str) -> list[str]:
    if delimiter == "\t":
        return line.split("\t")
    return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])


def _places_by_name(head: Sequence[str]) -> tuple[int, int] | None:
    """Where a header says that address and caption stand."""
    if any(is_address(field) for field in head):
        return None
    url = find_column(head, URL_COLUMNS)
    caption = find_column([c for c in head if c != url], CAPTIONS)
    return (head.index(url), head.index(caption)) if url is not None and caption is not None else None


def _places_by_value(fields: Sequence[str]) -> tuple[int, int] | None:
    """Where address and caption stand in a row: the first address, and the first text beside it."""
    url = next((i for i, field in enumerate(fields) if is_address(field)), None)
    caption = next((i for i, field in enumerate(fields) if i != url and field.strip()), None)
    return None if url is None or caption is None else (url, caption)
