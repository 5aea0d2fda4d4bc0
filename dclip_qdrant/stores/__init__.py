"""Stores: where collections live. One interface, one file an engine; `open_store` picks."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from dclip_qdrant.collection import CollectionSpec
from dclip_qdrant.errors import UsageError
from dclip_qdrant.lookup import need


@dataclass
class Point:
    """One picture on its way in. `regions` [R, D] or None."""

    id: str
    image: np.ndarray
    regions: np.ndarray | None
    payload: dict[str, Any]


@dataclass
class Hit:
    """One picture that was found; `regions` [R, D] where asked for."""

    id: str
    score: float
    payload: dict[str, Any]
    regions: np.ndarray | None = None


@dataclass(frozen=True)
class Condition:
    """A payload condition: `op` is = (any of the values), != , ~ (full text), >=, <=, > or <."""

    key: str
    op: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Query:
    """What every store can answer. Sources given together are fused by weighted RRF; `rescore` then orders the candidates by MaxSim on `regions`."""

    limit: int
    vector: np.ndarray | None = None  # [D] against `image`
    text: str | None = None  # BM25 over `caption`
    rescore: np.ndarray | None = None  # [Q, D] against `regions`
    weights: tuple[float, float] = (1.0, 1.0)  # dense, text
    rrf_k: int = 60
    candidates: int = 100
    where: tuple[Condition, ...] = ()
    with_regions: bool = False
    exclude: tuple[str, ...] = field(default=())


class Store(Protocol):
    """One collection in one engine. Errors are StoreError or MismatchError."""

    name: str

    def exists(self) -> bool: ...
    def create(self, spec: CollectionSpec, dim: int, metadata: dict[str, Any]) -> None: ...
    def metadata(self) -> dict[str, Any]: ...
    def describe(self) -> dict[str, Any]: ...
    def count(self) -> int: ...
    def payloads(self, ids: list[str], keys: list[str]) -> dict[str, dict[str, Any]]: ...
    def upsert(self, points: list[Point]) -> None: ...
    def query(self, query: Query) -> list[Hit]: ...
    def scroll(self, *, with_vectors: bool = False) -> Iterable[Point]: ...
    def finish(self) -> None: ...  # after a bulk load: build what makes queries fast
    def close(self) -> None: ...


def open_store(collection: str, *, url: str | None = None, edge: str | None = None, api_key: str | None = None) -> Store:
    """The collection behind a server's URL (`:memory:` for tests), or embedded in a folder (qdrant-edge).

    Raises:
        UsageError: both or neither. MissingExtra: qdrant-edge isn't installed.
    """
    if (url is None) == (edge is None):
        raise UsageError("store", "both --url and --edge" if url else "neither --url nor --edge", "one of them")
    if url is not None:
        from dclip_qdrant.stores.qdrant import Qdrant

        return Qdrant(collection, url, api_key=api_key)
    need("qdrant_edge", "an embedded collection (--edge)")
    from dclip_qdrant.stores.edge import Edge

    return Edge(collection, str(edge))


def rrf(lists: list[list[str]], weights: tuple[float, ...], k: int) -> dict[str, float]:
    """Weighted reciprocal rank fusion as Qdrant does it: sum of 1 / ((rank + 1) / weight + k - 1), rank from 0."""
    out: dict[str, float] = {}
    for ids, weight in zip(lists, weights, strict=True):
        if weight > 0:
            for rank, i in enumerate(ids):
                out[i] = out.get(i, 0.0) + 1.0 / ((rank + 1) / weight + k - 1)
    return out
