"""qdrant-edge: the real engine in this process, one folder a collection. The CLI's default when no URL is given."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import qdrant_edge as E

from dclip_qdrant.collection import CollectionSpec
from dclip_qdrant.errors import PointError, StoreError
from dclip_qdrant.stores import Condition, Hit, Point, Query, Widths, found_vectors, pick

ALIASES = "aliases.json"
QUANTISED = {
    "int8": lambda: E.ScalarQuantizationConfig(type=E.ScalarType.Int8, quantile=0.99, always_ram=True),
    "turbo4": lambda: E.TurboQuantQuantizationConfig(bits=E.TurboQuantBitSize.Bits4, always_ram=True),
    "turbo2": lambda: E.TurboQuantQuantizationConfig(bits=E.TurboQuantBitSize.Bits2, always_ram=True),
    "binary": lambda: E.BinaryQuantizationConfig(always_ram=True),
}


class Folder:
    """A folder of embedded collections; `aliases.json` in it holds their second names, which the engine itself has none of."""

    def __init__(self, path: str) -> None:
        self.path, self.where = Path(path), path
        self._open: dict[str, Edge] = {}  # a shard can be open once

    def collections(self) -> list[str]:
        return sorted(p.parent.name for p in self.path.glob("*/collection.json"))

    def aliases(self) -> dict[str, str]:
        try:
            return json.loads((self.path / ALIASES).read_text())
        except FileNotFoundError:
            return {}

    def point(self, alias: str, collection: str) -> None:
        if collection not in self.collections():
            raise StoreError(self.path, f"no collection {collection!r}", ", ".join(self.collections()))
        if alias in self.collections():
            raise StoreError(self.path, f"{alias!r} is a collection, not an alias", "another name")
        _write_json(self.path / ALIASES, self.aliases() | {alias: collection})

    def drop(self, collection: str) -> None:
        if collection in self.aliases().values():
            raise StoreError(self.path, f"{collection!r} is what an alias points at", do="point the alias elsewhere first")
        facts = self.path / collection / "collection.json"
        if not facts.is_file():
            raise StoreError(self.path, f"no collection {collection!r}", ", ".join(self.collections()))
        if collection in self._open:
            self._open.pop(collection).close()
        facts.unlink()  # first: what is left over looks like nothing
        shutil.rmtree(self.path / collection)

    def open(self, name: str, *, alone: bool = False) -> "Edge":
        name = self.aliases().get(name, name)
        if name not in self._open:
            self._open[name] = Edge(name, str(self.path))
        return self._open[name]

    def close(self) -> None:
        for store in self._open.values():
            store.close()


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".partial")
    part.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(part, path)


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
        whole = spec.indexing_threshold
        for name, v in spec.vectors.items():
            hnsw = E.HnswIndexConfig(m=16, ef_construct=100, full_scan_threshold=max(10, whole)) if whole else None
            vectors[name] = E.EdgeVectorParams(
                size=min(v.dim or dim, dim), distance=E.Distance.Cosine, on_disk=v.on_disk, datatype=E.VectorStorageDatatype.Float16 if v.datatype == "float16" else None,
                multivector_config=E.MultiVectorConfig(E.MultiVectorComparator.MaxSim) if v.multivector else None,
                hnsw_config=hnsw if v.hnsw else E.HnswIndexConfig(m=0, ef_construct=4, full_scan_threshold=10),
                quantization_config=QUANTISED[v.quantization]() if v.quantization != "none" else None,
            )  # fmt: skip
        optimizers = E.EdgeOptimizersConfig(indexing_threshold=whole) if whole else None
        self._shard = self._try(lambda: E.EdgeShard.create(str(shard), E.EdgeConfig(vectors=vectors, optimizers=optimizers)))
        kinds = {"keyword": E.PayloadSchemaType.Keyword, "integer": E.PayloadSchemaType.Integer, "float": E.PayloadSchemaType.Float}
        for key, kind in spec.payload_indexes.items():
            params = E.TextIndexParams(tokenizer=E.TokenizerType.Word, scoring=E.TextScoringParams()) if kind == "bm25" else kinds[kind]
            self._try(lambda k=key, p=params: self._shard.update(E.UpdateOperation.create_field_index(k, p)))
        _write_json(self._facts, {"metadata": metadata, "dim": dim, "spec": spec.model_dump(mode="json")})

    def set_metadata(self, metadata: dict[str, Any]) -> None:
        _write_json(self._facts, json.loads(self._facts.read_text()) | {"metadata": metadata})

    def metadata(self) -> dict[str, Any]:
        return json.loads(self._facts.read_text())["metadata"] if self.exists() else {}

    def describe(self) -> dict[str, Any]:
        facts = json.loads(self._facts.read_text()) if self.exists() else {}
        info = self._open().info()
        return {"engine": "qdrant-edge", "path": str(self.path), "points": self.count(), "dim": facts["dim"], "vectors": facts["spec"]["vectors"],
                "payload_indexes": facts["spec"]["payload_indexes"], "segments": info.segments_count, "indexed_vectors": info.indexed_vectors_count}  # fmt: skip

    def count(self) -> int:
        return self._open().count(E.CountRequest(exact=True, filter=None))

    def payloads(self, ids: list[str], keys: list[str] | None) -> dict[str, dict[str, Any]]:
        if not ids:
            return {}
        found = self._try(lambda: self._open().retrieve(ids, True, False))
        return {str(r.id): pick(r.payload or {}, keys) for r in found}

    def _widths(self) -> Widths:
        facts = json.loads(self._facts.read_text())
        return Widths(facts["dim"], {k: min(v.get("dim") or facts["dim"], facts["dim"]) for k, v in facts["spec"]["vectors"].items()})

    def upsert(self, points: list[Point]) -> None:
        shard, widths = self._open(), self._widths()
        try:
            shard.update(E.UpdateOperation.upsert_points([E.Point(p.id, widths.of(p), p.payload) for p in points]))
        except Exception as e:
            kind = StoreError if any(w in str(e) for w in ("WAL", "No space", "os error")) else PointError
            raise kind(self.path, str(e).splitlines()[0][:300]) from e

    def query(self, query: Query) -> list[Hit]:
        shard, where, widths = self._open(), _filter(query.where, query.exclude), self._widths()
        live: list[tuple[Any, float, list[Any]]] = []  # query, weight, what it chooses from
        if query.vector is not None:
            dense = E.Query.Nearest(widths.cut(query.vector, "image"), using="image")
            live.append((dense, query.weights[0], []))
            by_region = E.Query.Nearest([widths.cut(query.vector, "regions")], using="regions")
            live.append((by_region, query.weights[2], [E.Prefetch(limit=query.candidates, query=dense, filter=where)]))
        if query.text is not None:
            live.append((E.TextQuery("caption", query.text), query.weights[1], []))
        live = [one for one in live if one[1] > 0]
        kinds = (["regions"] if query.with_regions else []) + (["image"] if query.with_image else [])
        params = None
        if query.oversampling is not None:
            again = E.QuantizationSearchParams(rescore=query.oversampling > 0, oversampling=query.oversampling or None)
            params = E.SearchParams(quantization=again)
        how: dict[str, Any] = {"limit": query.limit, "with_payload": query.with_payload, "with_vector": kinds or False, "params": params}
        prefetch = [E.Prefetch(limit=query.candidates, query=q, filter=None if inner else where, prefetches=inner) for q, _, inner in live]
        fusion = E.Fusion.Rrf(k=query.rrf_k, weights=[w for _, w, _ in live])
        if query.rescore is not None:
            inner = prefetch if len(prefetch) == 1 else [E.Prefetch(limit=query.candidates, query=fusion, prefetches=prefetch)]
            request = E.QueryRequest(query=E.Query.Nearest(widths.cut(query.rescore, "regions"), using="regions"), prefetches=inner, **how)
        elif len(live) == 1 and not live[0][2]:
            request = E.QueryRequest(query=live[0][0], filter=where, **how)
        elif len(live) == 1:
            request = E.QueryRequest(query=live[0][0], prefetches=live[0][2], **how)
        else:
            request = E.QueryRequest(query=fusion, prefetches=prefetch, **how)
        found = self._try(lambda: shard.query(request))
        return [Hit(str(h.id), float(h.score), dict(h.payload or {}), *found_vectors(h.vector)) for h in found]

    def facet(self, key: str, limit: int) -> list[tuple[str, int]]:
        found = self._try(lambda: self._open().facet(E.FacetRequest(key, limit=limit, exact=True)))
        return [(str(h.value), h.count) for h in found.hits]

    def scroll(self, *, with_vectors: bool = False) -> Iterator[Point]:
        offset = None
        while True:
            found, offset = self._try(
                lambda at=offset: self._open().scroll(E.ScrollRequest(offset=at, limit=256, with_payload=True, with_vector=with_vectors))
            )
            for r in found:
                v = r.vector or {}
                image = np.asarray(v["image"], np.float32) if with_vectors else np.zeros(0, np.float32)
                yield Point(str(r.id), image, found_vectors(v)[0], dict(r.payload or {}))
            if offset is None:
                return

    def finish(self) -> None:
        """Builds the HNSW index; until then new points are searched exactly."""
        self._try(lambda: self._open().optimize())
        self._try(lambda: self._open().flush())

    def settled(self) -> bool:
        return True

    def close(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None


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
