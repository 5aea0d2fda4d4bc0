"""Brute force in numpy: the truth that recall is measured against, and the fake of the tests."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from dclip_qdrant.collection import CollectionSpec
from dclip_qdrant.errors import StoreError
from dclip_qdrant.metrics import normalise
from dclip_qdrant.stores import Condition, Hit, Point, Query, rrf


class Exact:
    """A collection in memory. BM25 is Okapi's with k1 = 1.2, b = 0.75 over lower-cased words."""

    def __init__(self, name: str = "exact") -> None:
        self.name = name
        self._points: dict[str, Point] | None = None
        self._metadata: dict[str, Any] = {}
        self._spec: CollectionSpec | None = None

    def exists(self) -> bool:
        return self._points is not None

    def _known(self) -> dict[str, Point]:
        if self._points is None:
            raise StoreError("memory", f"no collection {self.name!r}")
        return self._points

    def create(self, spec: CollectionSpec, dim: int, metadata: dict[str, Any]) -> None:
        self._points, self._spec, self._metadata, self._dim = {}, spec, metadata, dim

    def metadata(self) -> dict[str, Any]:
        return self._metadata

    def describe(self) -> dict[str, Any]:
        spec = self._spec.model_dump(mode="json") if self._spec else {}
        return {
            "engine": "exact",
            "points": self.count(),
            "dim": self._dim,
            "vectors": spec["vectors"],
            "payload_indexes": spec["payload_indexes"],
        }

    def count(self) -> int:
        return len(self._known())

    def payloads(self, ids: list[str], keys: list[str]) -> dict[str, dict[str, Any]]:
        points = self._known()
        return {i: {k: points[i].payload.get(k) for k in keys} for i in ids if i in points}

    def upsert(self, points: list[Point]) -> None:
        known = self._known()
        for p in points:
            if p.image.shape != (self._dim,):
                raise StoreError(self.name, f"a vector of {p.image.shape}", f"({self._dim},)")
            known[p.id] = Point(p.id, normalise(p.image), None if p.regions is None else normalise(p.regions), dict(p.payload))

    def query(self, query: Query) -> list[Hit]:
        found = {i: p for i, p in self._known().items() if i not in query.exclude and all(_holds(c, p.payload) for c in query.where)}
        ids = list(found)
        lists, weights, scores = [], [], {}
        many = query.candidates if query.rescore is not None or (query.vector is not None and query.text is not None) else query.limit
        if query.vector is not None and query.weights[0] > 0:
            scores = {i: float(found[i].image @ normalise(query.vector)) for i in ids}
            lists.append(sorted(ids, key=lambda i: -scores[i])[:many])
            weights.append(query.weights[0])
        if query.text is not None and query.weights[1] > 0:
            scores = _bm25(query.text, {i: str(found[i].payload.get("caption") or "") for i in ids})
            lists.append(sorted(scores, key=lambda i: -scores[i])[:many])
            weights.append(query.weights[1])
        if len(lists) > 1:
            scores = rrf(lists, tuple(weights), query.rrf_k)
            lists = [sorted(scores, key=lambda i: -scores[i])]
        order = lists[0] if lists else ids
        if query.rescore is not None:
            q = normalise(query.rescore)
            scores = {i: float((q @ found[i].regions.T).max(1).sum()) for i in order[: query.candidates] if found[i].regions is not None}
            order = sorted(scores, key=lambda i: -scores[i])
        return [Hit(i, scores[i], dict(found[i].payload), found[i].regions if query.with_regions else None) for i in order[: query.limit]]

    def scroll(self, *, with_vectors: bool = False) -> Iterator[Point]:
        yield from self._known().values()

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


def _holds(c: Condition, payload: dict[str, Any]) -> bool:
    have = payload.get(c.key)
    items = have if isinstance(have, list) else [have]
    if c.op == "=":
        return any(v in items for v in c.values)
    if c.op == "!=":
        return not any(v in items for v in c.values)
    if c.op == "~":
        words = _words(" ".join(map(str, items)))
        return all(w in words for w in _words(str(c.values[0])))
    value = float(c.values[0])
    compare = {">=": float.__ge__, "<=": float.__le__, ">": float.__gt__, "<": float.__lt__}[c.op]
    return any(isinstance(v, int | float) and compare(float(v), value) for v in items)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _bm25(query: str, documents: dict[str, str], k1: float = 1.2, b: float = 0.75) -> dict[str, float]:
    words = {i: Counter(_words(d)) for i, d in documents.items()}
    average = sum(sum(c.values()) for c in words.values()) / max(1, len(words)) or 1.0
    out: dict[str, float] = {}
    for q in set(_words(query)):
        holders = [i for i, c in words.items() if q in c]
        idf = math.log(1 + (len(words) - len(holders) + 0.5) / (len(holders) + 0.5))
        for i in holders:
            f, length = words[i][q], sum(words[i].values())
            out[i] = out.get(i, 0.0) + idf * f * (k1 + 1) / (f + k1 * (1 - b + b * length / average))
    return out
