"""qdrant-edge: the real engine in this process, one folder a collection. The CLI's default when no URL is given."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import qdrant_edge as E

from dclip_qdrant.collection import CollectionSpec
from dclip_qdrant.errors import PointError, StoreError
from dclip_qdrant.stores import Condition, Hit, Point, Query


class Edge:
    """`<folder>/<collection>/` holds the shard; `collection.json` beside it what the engine itself doesn't keep (spec, metadata)."""

    def __init__(self, name: str, folder: str) -> None:
        if not name or Path(name).name != name:
            raise StoreError("--collection", repr(name), "a plain name")
        self.name, self.path = name, Path(folder) / name
        self._facts = self.path / "collection.json"
        self._shard: Any = None

    def exists(self) -> bool:
        return self._facts.is_file()

    def _open(self) -> Any:
        if self._shard is None:
            if not self.exists():
                there = sorted(p.parent.name for p in self.path.parent.glob("*/collection.json"))
                raise StoreError(
                    self.path.parent,
                    f"no collection {self.name!r}",
                    f"one of {', '.join(there)}" if there else "an ingested collection",
                    "dclip-qdrant ingest",
                )
            self._shard = self._try(lambda: E.EdgeShard.load(str(self.path / "shard")))
        return self._shard

    def _try(self, f: Any) -> Any:
        try:
            return f()
        except Exception as e:  # the engine raises bare Exception
            if "WouldBlock" in str(e):
                raise StoreError(
                    self.path, "open in another process", "one process at a time", "wait for it, or use a server with --url"
                ) from e
            raise StoreError(self.path, str(e).splitlines()[0][:300]) from e

    def create(self, spec: CollectionSpec, dim: int, metadata: dict[str, Any]) -> None:
        shard = self.path / "shard"
        shard.mkdir(parents=True, exist_ok=True)
        vectors = {}
        for name, v in spec.vectors.items():
            vectors[name] = E.EdgeVectorParams(
                size=dim, distance=E.Distance.Cosine, on_disk=v.on_disk,
                multivector_config=E.MultiVectorConfig(E.MultiVectorComparator.MaxSim) if v.multivector else None,
                hnsw_config=None if v.hnsw else E.HnswIndexConfig(m=0, ef_construct=4, full_scan_threshold=10),
                quantization_config=E.ScalarQuantizationConfig(type=E.ScalarType.Int8, quantile=0.99, always_ram=True) if v.quantization == "int8" else None,
            )  # fmt: skip
        self._shard = self._try(lambda: E.EdgeShard.create(str(shard), E.EdgeConfig(vectors=vectors)))
        kinds = {"keyword": E.PayloadSchemaType.Keyword, "integer": E.PayloadSchemaType.Integer, "float": E.PayloadSchemaType.Float}
        for key, kind in spec.payload_indexes.items():
            params = E.TextIndexParams(tokenizer=E.TokenizerType.Word, scoring=E.TextScoringParams()) if kind == "bm25" else kinds[kind]
            self._try(lambda k=key, p=params: self._shard.update(E.UpdateOperation.create_field_index(k, p)))
        part = self._facts.with_suffix(".partial")
        part.write_text(json.dumps({"metadata": metadata, "dim": dim, "spec": spec.model_dump(mode="json")}, indent=1) + "\n")
        os.replace(part, self._facts)

    def metadata(self) -> dict[str, Any]:
        return json.loads(self._facts.read_text())["metadata"] if self.exists() else {}

    def describe(self) -> dict[str, Any]:
        facts = json.loads(self._facts.read_text()) if self.exists() else {}
        info = self._open().info()
        return {"engine": "qdrant-edge", "path": str(self.path), "points": self.count(), "dim": facts["dim"], "vectors": facts["spec"]["vectors"],
                "payload_indexes": facts["spec"]["payload_indexes"], "segments": info.segments_count, "indexed_vectors": info.indexed_vectors_count}  # fmt: skip

    def count(self) -> int:
        return self._open().count(E.CountRequest(exact=True, filter=None))

    def payloads(self, ids: list[str], keys: list[str]) -> dict[str, dict[str, Any]]:
        if not ids:
            return {}
        found = self._try(lambda: self._open().retrieve(ids, True, False))
        return {str(r.id): {k: (r.payload or {}).get(k) for k in keys} for r in found}

    def upsert(self, points: list[Point]) -> None:
        rows = []
        for p in points:
            vector = {"image": p.image.tolist()} | ({"regions": p.regions.tolist()} if p.regions is not None else {})
            rows.append(E.Point(p.id, vector, p.payload))
        shard = self._open()
        try:
            shard.update(E.UpdateOperation.upsert_points(rows))
        except Exception as e:
            kind = StoreError if any(w in str(e) for w in ("WAL", "No space", "os error")) else PointError
            raise kind(self.path, str(e).splitlines()[0][:300]) from e

    def query(self, query: Query) -> list[Hit]:
        shard, where = self._open(), _filter(query.where, query.exclude)
        sources = []
        if query.vector is not None:
            sources.append((E.Query.Nearest(query.vector.tolist(), using="image"), query.weights[0]))
        if query.text is not None:
            sources.append((E.TextQuery("caption", query.text), query.weights[1]))
        kinds: list[str] = ["regions"] if query.with_regions else []
        how: dict[str, Any] = {"limit": query.limit, "with_payload": True, "with_vector": kinds or False}
        live = [(q, w) for q, w in sources if w > 0]
        prefetch = [E.Prefetch(limit=query.candidates, query=q, filter=where) for q, _ in live]
        fusion = E.Fusion.Rrf(k=query.rrf_k, weights=[w for _, w in live])
        if query.rescore is not None:
            inner = prefetch if len(prefetch) == 1 else [E.Prefetch(limit=query.candidates, query=fusion, prefetches=prefetch)]
            request = E.QueryRequest(query=E.Query.Nearest(query.rescore.tolist(), using="regions"), prefetches=inner, **how)
        elif len(live) == 1:
            request = E.QueryRequest(query=live[0][0], filter=where, **how)
        else:
            request = E.QueryRequest(query=fusion, prefetches=prefetch, **how)
        found = self._try(lambda: shard.query(request))
        return [Hit(str(h.id), float(h.score), dict(h.payload or {}), _matrix(h.vector)) for h in found]

    def scroll(self, *, with_vectors: bool = False) -> Iterator[Point]:
        offset = None
        while True:
            rows, offset = self._try(
                lambda at=offset: self._open().scroll(E.ScrollRequest(offset=at, limit=256, with_payload=True, with_vector=with_vectors))
            )
            for r in rows:
                v = r.vector or {}
                image = np.asarray(v["image"], np.float32) if with_vectors else np.zeros(0, np.float32)
                yield Point(str(r.id), image, _matrix(v), dict(r.payload or {}))
            if offset is None:
                return

    def finish(self) -> None:
        """Builds the HNSW index; until then new points are searched exactly."""
        self._try(lambda: self._open().optimize())
        self._try(lambda: self._open().flush())

    def close(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None


def _matrix(vectors: Any) -> np.ndarray | None:
    rows = vectors.get("regions") if isinstance(vectors, dict) else None
    return np.asarray(rows, np.float32) if rows is not None else None


def _filter(where: tuple[Condition, ...], exclude: tuple[str, ...]) -> Any:
    must, must_not = [], []
    for c in where:
        if c.op in ("=", "!="):
            any_of = [
                E.FieldCondition(key=c.key, match=E.MatchValue(v))
                if not isinstance(v, float)
                else E.FieldCondition(key=c.key, range=E.RangeFloat(gte=v, lte=v))
                for v in c.values
            ]
            (must if c.op == "=" else must_not).append(any_of[0] if len(any_of) == 1 else E.Filter(should=any_of))
        elif c.op == "~":
            must.append(E.FieldCondition(key=c.key, match=E.MatchText(str(c.values[0]))))
        else:
            bound = {">=": "gte", "<=": "lte", ">": "gt", "<": "lt"}[c.op]
            must.append(E.FieldCondition(key=c.key, range=E.RangeFloat(**{bound: float(c.values[0])})))
    if exclude:
        must_not.append(E.HasIdCondition(set(exclude)))
    return E.Filter(must=must or None, must_not=must_not or None) if must or must_not else None
