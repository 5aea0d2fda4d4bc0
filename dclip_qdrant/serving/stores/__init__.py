"""Stores: where collections live. One interface (`base.py`), one file an engine; `place` picks."""

from dclip_qdrant.errors import UsageError
from dclip_qdrant.lookup import need
from dclip_qdrant.serving.stores.base import Condition, Place, Point, Query, ScoredPoint, Store

__all__ = ["Condition", "Place", "Point", "Query", "ScoredPoint", "Store", "open_store", "place"]


def place(
    *,
    url: str | None = None,
    edge: str | None = None,
    api_key: str | None = None,
    patience: float | None = None,
) -> Place:
    """A server (`:memory:` for tests), or a folder of embedded collections (qdrant-edge).

    `patience`: seconds that a call waits for a server that is busy or away; None: two minutes.

    Raises:
        UsageError: both or neither. MissingExtra: qdrant-edge isn't installed.
    """
    if (url is None) == (edge is None):
        came = "both `url` and `edge`" if url else "neither `url` nor `edge`"
        raise UsageError("store", came, "one of them")
    if url is not None:
        from dclip_qdrant.serving.stores.qdrant_server import Server

        return Server(url, api_key=api_key, patience=patience)
    need("qdrant_edge", "an embedded collection (`edge`)")
    from dclip_qdrant.serving.stores.edge import Folder

    return Folder(str(edge))


def open_store(
    collection: str,
    *,
    url: str | None = None,
    edge: str | None = None,
    api_key: str | None = None,
    patience: float | None = None,
) -> Store:
    """One collection of a `place`; the same errors."""
    return place(url=url, edge=edge, api_key=api_key, patience=patience).open(collection, alone=True)
