"""Options that several commands share, and what they become."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from dclip_qdrant import front
from dclip_qdrant.errors import PartialError, UsageError

FORMATS = click.Choice(["table", "json", "jsonl", "paths"])


def place_options(command: Any) -> Any:
    for option in reversed((
        click.option("--url", envvar="QDRANT_URL", help="A Qdrant server. Default: embedded collections (see --edge)."),
        click.option("--edge", help="Folder of embedded collections (qdrant-edge).  [default: ./dclip-edge]"),
        click.option("--api-key", envvar="QDRANT_API_KEY", help="The server's key; better in QDRANT_API_KEY than on the command line."),
    )):  # fmt: skip
        command = option(command)
    return command


def store_options(command: Any) -> Any:
    return click.option("--collection", required=True, envvar="COLLECTION_NAME", help="The collection's name, or an alias.")(
        place_options(command)
    )


def _where(url: str | None, edge: str | None) -> dict[str, str | None]:
    """A flag on the command line beats QDRANT_URL of the environment; without either, a folder here."""
    return {"url": None if edge else url, "edge": edge or (None if url else "dclip-edge")}


@contextmanager
def the_place(url: str | None, edge: str | None, api_key: str | None) -> Iterator[Any]:
    from dclip_qdrant import stores

    where = stores.place(**_where(url, edge), api_key=api_key)
    try:
        yield where
    finally:
        where.close()


def open_store(collection: str, url: str | None, edge: str | None, api_key: str | None) -> Any:
    from dclip_qdrant import stores

    return stores.open_store(collection, **_where(url, edge), api_key=api_key)


def raise_rejected(report: Any, source: str, rejects: str | None) -> None:
    """Says the first reasons and ends with exit code 3, if pictures were rejected."""
    if report.rejected:
        for reason in report.reasons:
            front.say(f"  rejected: {reason}")
        raise PartialError(source, f"{report.rejected:,} pictures rejected", do=f"reasons are in {rejects}")


def key_values(values: tuple[str, ...], flag: str) -> dict[str, Any]:
    out = {}
    for v in values:
        key, eq, value = v.partition("=")
        if not eq:
            raise UsageError(flag, repr(v), "key=value")
        try:
            out[key] = json.loads(value)
        except json.JSONDecodeError:
            out[key] = value
    return out
