"""Stores: where collections live. One interface, one file an engine; `place` picks."""

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
    """One picture that was found; its vectors, `regions` [R, D] and `image` [D], where asked for."""

    id: str
    score: float
    payload: dict[str, Any]
    regions: np.ndarray | None = None
    image: np.ndarray | None = None


@dataclass(frozen=True)
class Condition:
    """A payload condition: `op` is = (any of the values), != , ~ (full text), >=, <=, > or <."""

    key: str
    op: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Query:
    """What every store can answer. Sources with a weight are fused by weighted RRF: dense (`vector`), BM25 (`text`), and the dense candidates in the order of
    MaxSim on `regions`. `rescore` then orders the candidates by MaxSim alone."""

    limit: int
    vector: np.ndarray | None = None  # [D] against `image`
    text: str | None = None  # BM25 over `caption`
    rescore: np.ndarray | None = None  # [Q, D] against `regions`
    weights: tuple[float, float, float] = (1.0, 1.0, 0.0)  # dense, BM25, regions
    rrf_k: int = 60
    candidates: int = 100
    oversampling: float | None = None  # of a quantised search that looks at the originals again; 0: it doesn't; None: as the engine likes
    where: tuple[Condition, ...] = ()
    with_regions: bool = False
    with_image: bool = False
    with_payload: bool = True
    exclude: tuple[str, ...] = field(default=())


class Store(Protocol):
    """One collection in one engine. Errors are StoreError or MismatchError."""

    name: str

    def exists(self) -> bool: ...
    def create(self, spec: CollectionSpec, dim: int, metadata: dict[str, Any]) -> None: ...
    def metadata(self) -> dict[str, Any]: ...
    def set_metadata(self, metadata: dict[str, Any]) -> None: ...  # all of it
    def describe(self) -> dict[str, Any]: ...
    def count(self) -> int: ...
    def payloads(self, ids: list[str], keys: list[str] | None) -> dict[str, dict[str, Any]]: ...  # None: whole
    def upsert(self, points: list[Point]) -> None: ...
    def query(self, query: Query) -> list[Hit]: ...
    def facet(self, key: str, limit: int) -> list[tuple[str, int]]: ...  # values of a keyword field, the most frequent first
    def scroll(self, *, with_vectors: bool = False) -> Iterable[Point]: ...
    def finish(self) -> None: ...  # after a bulk load: build what makes queries fast
    def settled(self) -> bool: ...  # whether what `finish` asked for is done
    def close(self) -> None: ...


class Place(Protocol):
    """An engine that holds collections; aliases are second names of collections, and one call moves one."""

    where: str

    def collections(self) -> list[str]: ...
    def aliases(self) -> dict[str, str]: ...
    def point(self, alias: str, collection: str) -> None: ...
    def drop(self, collection: str) -> None: ...
    def open(
        self, name: str, *, alone: bool = False
    ) -> Store: ...  # by name or alias; it need not exist yet; `alone`: closing it closes the place
    def close(self) -> None: ...


def place(*, url: str | None = None, edge: str | None = None, api_key: str | None = None) -> Place:
    """A server (`:memory:` for tests), or a folder of embedded collections (qdrant-edge).

    Raises:
        UsageError: both or neither. MissingExtra: qdrant-edge isn't installed.
    """
    if (url is None) == (edge is None):
        raise UsageError("store", "both --url and --edge" if url else "neither --url nor --edge", "one of them")
    if url is not None:
        from dclip_qdrant.stores.qdrant_server import Server

        return Server(url, api_key=api_key)
    need("qdrant_edge", "an embedded collection (--edge)")
    from dclip_qdrant.stores.edge import Folder

    return Folder(str(edge))


def open_store(collection: str, *, url: str | None = None, edge: str | None = None, api_key: str | None = None) -> Store:
    """One collection of a `place`; the same errors."""
    return place(url=url, edge=edge, api_key=api_key).open(collection, alone=True)


def pick(payload: dict[str, Any], keys: list[str] | None) -> dict[str, Any]:
    """Those keys of a payload, None where it has none; all of it without `keys`."""
    return dict(payload) if keys is None else {k: payload.get(k) for k in keys}


def found_vectors(found: Any) -> tuple[np.ndarray | None, np.ndarray | None]:
    """`regions` and `image` of a point, where they came along."""
    found = found if isinstance(found, dict) else {}
    return tuple(np.asarray(found[k], np.float32) if found.get(k) is not None else None for k in ("regions", "image"))


@dataclass(frozen=True)
class Widths:
    """How wide the student's vectors are and how much of each the collection stores."""

    whole: int
    stored: dict[str, int]

    def cut(self, vector: np.ndarray, name: str) -> list:
        """What is stored of a vector [..., D]; one of another width goes on as it is, for the engine to refuse."""
        return (vector[..., : self.stored.get(name)] if vector.shape[-1] == self.whole else vector).tolist()

    def of(self, point: Point) -> dict[str, list]:
        """A point's vectors, those that the collection has."""
        have = {"image": point.image} | ({"regions": point.regions} if point.regions is not None and "regions" in self.stored else {})
        return {k: self.cut(v, k) for k, v in have.items()}


def rrf(lists: list[list[str]], weights: tuple[float, ...], k: int) -> dict[str, float]:
    """Weighted reciprocal rank fusion as Qdrant does it: sum of 1 / ((rank + 1) / weight + k - 1), rank from 0."""
    out: dict[str, float] = {}
    for ids, weight in zip(lists, weights, strict=True):
        if weight > 0:
            for rank, i in enumerate(ids):
                out[i] = out.get(i, 0.0) + 1.0 / ((rank + 1) / weight + k - 1)
    return out
