"""Brute force in numpy: the truth that recall is measured against, and the fake of the tests."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from dclip_qdrant.errors import StoreError
from dclip_qdrant.metrics import normalise
from dclip_qdrant.serving.collection import CollectionSpec
from dclip_qdrant.serving.stores.base import Condition, Point, Query, ScoredPoint, mmr, pick, rrf


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

    def complete(self) -> None:
        """Nothing is missing."""

    def metadata(self, *, max_age: float = 0.0) -> dict[str, Any]:
        return self._metadata

    def set_metadata(self, metadata: dict[str, Any]) -> None:
        self._metadata = metadata

    def describe(self) -> dict[str, Any]:
        spec = self._spec.model_dump(mode="json") if self._spec else {}
        return {
            "engine": "exact",
            "points": self.count(),
            "dim": self._dim,
            "vectors": spec["vectors"],
            "payload_indexes": spec["payload_indexes"],
            "text": spec["text"],
        }

    def count(self) -> int:
        return len(self._known())

    def payloads(self, ids: list[str], keys: list[str] | None) -> dict[str, dict[str, Any]]:
        points = self._known()
        return {i: pick(points[i].payload, keys) for i in ids if i in points}

    def vectors(self, ids: list[str]) -> dict[str, np.ndarray]:
        points = self._known()
        return {i: points[i].image for i in ids if i in points}

    def upsert(self, points: list[Point]) -> None:
        known = self._known()
        for p in points:
            if p.image.shape != (self._dim,):
                raise StoreError(self.name, f"a vector of {p.image.shape}", f"({self._dim},)")
            known[p.id] = Point(
                p.id, normalise(p.image), None if p.regions is None else normalise(p.regions), dict(p.payload)
            )

    def set_payloads(self, payloads: dict[str, dict[str, Any]]) -> None:
        known = self._known()
        for i, payload in payloads.items():
            known[i].payload = dict(payload)

    def delete(self, ids: list[str]) -> None:
        for i in ids:
            self._known().pop(i, None)

    def query(self, query: Query) -> list[ScoredPoint]:
        matching = {
            i: p
            for i, p in self._known().items()
            if i not in query.exclude and all(_holds(c, p.payload) for c in query.where)
        }
        sources: list[tuple[float, dict[str, float]]] = []
        if query.vector is not None:
            v = normalise(query.vector)
            dense = {i: float(p.image @ v) for i, p in matching.items()}
            sources.append((query.weights[0], dense))
            near = sorted(dense, key=lambda i: -dense[i])[: query.candidates]
            sources.append(
                (
                    query.weights[2],
                    _max_sim(v[None], {i: matching[i] for i in near}) if query.weights[2] > 0 else {},
                )
            )
        if query.text is not None:
            sources.append(
                (
                    query.weights[1],
                    _bm25(query.text, {i: str(p.payload.get("caption") or "") for i, p in matching.items()}),
                )
            )
        sources = [s for s in sources if s[0] > 0]
        scores = sources[0][1] if sources else dict.fromkeys(matching, 0.0)
        if len(sources) > 1:
            lists = [sorted(s, key=lambda i, s=s: -s[i])[: query.candidates] for _, s in sources]
            scores = rrf(lists, tuple(w for w, _ in sources), query.rrf_k)
        order = sorted(scores, key=lambda i: -scores[i])
        if query.rescore is not None:
            scores = _max_sim(normalise(query.rescore), {i: matching[i] for i in order[: query.candidates]})
            order = sorted(scores, key=lambda i: -scores[i])
        if query.mmr is not None:
            near = order[: query.candidates]
            vectors, relevance = np.stack([matching[i].image for i in near]), [scores[i] for i in near]
            order = [near[n] for n in mmr(vectors, np.array(relevance), query.limit, query.mmr)]
        return [
            ScoredPoint(
                i,
                scores[i],
                dict(matching[i].payload) if query.with_payload else {},
                matching[i].regions if query.with_regions else None,
                matching[i].image if query.with_image else None,
            )
            for i in order[: query.limit]
        ]

    def facet(self, key: str, limit: int) -> list[tuple[str, int]]:
        counted: Counter[str] = Counter()
        for p in self._known().values():
            have = p.payload.get(key)
            counted.update(
                {str(v) for v in (have if isinstance(have, list) else [] if have is None else [have])}
            )
        return sorted(counted.items(), key=lambda kv: (-kv[1], kv[0]))[:limit]

    def scroll(self, *, with_vectors: bool = False) -> Iterator[Point]:
        yield from self._known().values()

    def finish(self) -> None:
        pass

    def settled(self) -> bool:
        return True

    def close(self) -> None:
        pass


def _max_sim(q: np.ndarray, points: dict[str, Point]) -> dict[str, float]:
    """Sum over the query's rows [Q, D] of the best row of each point; points without regions drop out."""
    return {i: float((q @ p.regions.T).max(1).sum()) for i, p in points.items() if p.regions is not None}


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
