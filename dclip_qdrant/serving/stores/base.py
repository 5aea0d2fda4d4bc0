"""What every engine answers to: points, queries, and the two interfaces, a collection (`Store`) and a place
that holds collections (`Place`)."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from dclip_qdrant.errors import UsageError
from dclip_qdrant.serving.collection import CollectionSpec

Payload = dict[str, Any]
LONGEST_NAME = 200  # bytes; a file system takes 255, and reindex adds to it
EXACT = 2.0**53  # up to here every whole number is a float64


@dataclass
class Point:
    """One picture on its way in. `regions` [R, D] or None."""

    id: str
    image: np.ndarray
    regions: np.ndarray | None
    payload: Payload


@dataclass
class ScoredPoint:
    """One point that was found; its vectors, `regions` [R, D] and `image` [D], where asked for."""

    id: str
    score: float
    payload: Payload
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
    """What every store can answer.

    Sources with a weight are fused by weighted RRF: dense (`vector`), BM25 (`text`), and the dense candidates
    in the order of MaxSim on `regions`. `rescore` then orders the candidates by MaxSim alone.
    """

    limit: int
    vector: np.ndarray | None = None  # [D] against `image`
    text: str | None = None  # BM25 over `caption`
    rescore: np.ndarray | None = None  # [Q, D] against `regions`
    weights: tuple[float, float, float] = (1.0, 1.0, 0.0)  # dense, BM25, regions
    rrf_k: int = 60
    candidates: int = 100
    # of a quantised search that looks at the originals again; 0: it doesn't; None: as the collection's spec
    # says, else as the engine likes
    oversampling: float | None = None
    ef: int | None = None  # of HNSW: how many candidates a search keeps; None likewise
    # maximal marginal relevance among the candidates, of `vector` alone: this much of an item's score is its
    # relevance, the rest its unlikeness to what is chosen already; None: by relevance alone
    mmr: float | None = None
    where: tuple[Condition, ...] = ()
    with_regions: bool = False
    with_image: bool = False
    with_payload: bool = True
    exclude: tuple[str, ...] = ()


def with_spec(query: Query, vectors: dict[str, Any]) -> Query:
    """The query with what the collection's spec says of searching `image`, where it says nothing itself;
    `vectors` as in the spec."""
    spec = vectors.get("image") or {}
    oversampling = spec.get("oversampling") if query.oversampling is None else query.oversampling
    return replace(query, oversampling=oversampling, ef=query.ef or spec.get("ef"))


class Store(Protocol):
    """One collection in one engine. Errors are StoreError or MismatchError."""

    name: str

    def exists(self) -> bool: ...

    def create(self, spec: CollectionSpec, dim: int, metadata: dict[str, Any]) -> None: ...

    def complete(self) -> None:
        """Makes what `create` left undone when it was killed."""
        ...

    def metadata(self, *, max_age: float = 0.0) -> dict[str, Any]:
        """What the collection remembers, as it was at most so many seconds ago."""
        ...

    def set_metadata(self, metadata: dict[str, Any]) -> None:
        """Replaces all of it."""
        ...

    def describe(self) -> dict[str, Any]:
        """Facts for people and for `push`; raises where there is no such collection."""
        ...

    def count(self) -> int: ...

    def payloads(self, ids: list[str], keys: list[str] | None) -> dict[str, Payload]:
        """Payloads by id, those keys of them; None gives them whole."""
        ...

    def vectors(self, ids: list[str]) -> dict[str, np.ndarray]:
        """What is stored of the `image` vectors of these points [D], by id."""
        ...

    def upsert(self, points: list[Point]) -> None: ...

    def set_payloads(self, payloads: dict[str, Payload]) -> None:
        """Replaces the payloads of these points, by id; vectors stay."""
        ...

    def delete(self, ids: list[str]) -> None:
        """Points that aren't there are deleted already."""
        ...

    def query(self, query: Query) -> list[ScoredPoint]: ...

    def facet(self, key: str, limit: int) -> list[tuple[str, int]]:
        """Values of a keyword field and how many points have each, the most frequent first."""
        ...

    def scroll(self, *, with_vectors: bool = False) -> Iterable[Point]: ...

    def finish(self) -> None:
        """After a bulk load: builds what makes queries fast."""
        ...

    def settled(self) -> bool:
        """Whether what `finish` asked for is done."""
        ...

    def close(self) -> None: ...


class Place(Protocol):
    """An engine that holds collections; aliases are second names of collections, and one call moves one."""

    where: str

    def collections(self) -> list[str]: ...

    def aliases(self) -> dict[str, str]: ...

    def point(self, alias: str, collection: str) -> None: ...

    def drop(self, collection: str) -> None: ...

    def open(self, name: str, *, alone: bool = False) -> Store:
        """By name or alias; it need not exist yet. `alone`: closing it closes the place."""
        ...

    def close(self) -> None: ...


def readings(words: str) -> tuple[str, ...]:
    """What to match for these words: Han characters alone may be Chinese or Japanese, which engines cut into
    words each in its way. They take text for Japanese that holds a Japanese character; this one is a
    separator and no word."""
    only_han = re.fullmatch(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\s]+", words)
    return (words, words + "\u30fb") if only_han else (words,)


def check_unicode(name: str, text: str) -> None:
    """Raises UsageError for text that no engine takes: with half a surrogate pair, of a cut emoji or of a
    terminal that isn't UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UsageError(name, f"{text[:60]!r}: half a surrogate pair", "Unicode text") from e


def check_name(collection: str) -> None:
    """Raises UsageError for what can't be a collection's name: a path, a name with control characters, one
    longer than file systems and servers take."""
    check_unicode("`collection`", collection)
    if (
        collection in ("", ".", "..")
        or re.search(r'[/\\<>:"|?*\x00-\x1f\x7f]', collection)
        or len(collection.encode()) > LONGEST_NAME
    ):
        shown = repr(collection if len(collection) <= 40 else collection[:40] + "...")
        expected = f'a name of at most {LONGEST_NAME} bytes without / \\ < > : " | ? * and line breaks'
        raise UsageError("`collection`", shown, expected)


def pick(payload: Payload, keys: list[str] | None) -> Payload:
    """Those keys of a payload, None where it has none; all of it without `keys`."""
    return dict(payload) if keys is None else {key: payload.get(key) for key in keys}


def stored_vectors(vectors: Any) -> tuple[np.ndarray | None, np.ndarray | None]:
    """`regions` and `image` of a point as an engine gives them, where they came along."""

    def one_of(name: str) -> np.ndarray | None:
        value = vectors.get(name) if isinstance(vectors, dict) else None
        return None if value is None else np.asarray(value, np.float32)

    return one_of("regions"), one_of("image")


@dataclass(frozen=True)
class Widths:
    """How wide the student's vectors are and how much of each the collection stores."""

    whole: int
    stored: dict[str, int]

    def cut(self, vector: np.ndarray, name: str) -> list[Any]:
        """What is stored of a vector [..., D]; one of another width goes on as it is, for the engine to
        refuse."""
        if vector.shape[-1] != self.whole:
            return vector.tolist()
        return vector[..., : self.stored.get(name)].tolist()

    def of(self, point: Point) -> dict[str, list[Any]]:
        """A point's vectors, those that the collection has."""
        vectors = {"image": self.cut(point.image, "image")}
        if point.regions is not None and "regions" in self.stored:
            vectors["regions"] = self.cut(point.regions, "regions")
        return vectors


def rrf(lists: list[list[str]], weights: tuple[float, ...], k: int) -> dict[str, float]:
    """Weighted reciprocal rank fusion as Qdrant does it: sum of 1 / ((rank + 1) / weight + k - 1), rank from
    0."""
    scores: dict[str, float] = {}
    for ids, weight in zip(lists, weights, strict=True):
        if weight <= 0:
            continue
        for rank, point in enumerate(ids):
            scores[point] = scores.get(point, 0.0) + 1.0 / ((rank + 1) / weight + k - 1)
    return scores


def mmr(vectors: np.ndarray, relevance: np.ndarray, limit: int, weight: float) -> list[int]:
    """Greedy maximal marginal relevance (Carbonell & Goldstein 1998): weight x relevance - (1 - weight) x
    likeness to the most alike of those chosen before. vectors [N, D] unit rows, relevance [N] -> numbers of
    at most `limit` rows, the most relevant first; equals in their order."""
    alike = vectors @ vectors.T
    chosen: list[int] = []
    nearest = np.full(len(relevance), -np.inf)
    value = weight * relevance
    while len(chosen) < min(limit, len(relevance)):
        best = int(np.argmax(value))
        chosen.append(best)
        nearest = np.maximum(nearest, alike[best])
        value = weight * relevance - (1 - weight) * nearest
        value[chosen] = -np.inf
    return chosen
