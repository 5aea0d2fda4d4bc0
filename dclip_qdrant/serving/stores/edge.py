"""qdrant-edge: the real engine in this process, one folder a collection. The CLI's default when no URL is
given."""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import qdrant_edge as E

from dclip_qdrant.errors import PointError, StoreError, UsageError
from dclip_qdrant.serving.collection import CollectionSpec, TextSpec, VectorSpec
from dclip_qdrant.serving.stores.base import (
    EXACT,
    Condition,
    Payload,
    Point,
    Query,
    ScoredPoint,
    Widths,
    check_name,
    pick,
    readings,
    stored_vectors,
    with_spec,
)
from dclip_qdrant.serving.stores.edge_words import words_options
from dclip_qdrant.tables import storage

logger = logging.getLogger(__name__)

ALIASES = "aliases.json"
PAGE = 256  # points a scroll
BOUNDS = {">=": "gte", "<=": "lte", ">": "gt", "<": "lt"}
QUANTISED = {
    "int8": lambda: E.ScalarQuantizationConfig(type=E.ScalarType.Int8, quantile=0.99, always_ram=True),
    "turbo4": lambda: E.TurboQuantQuantizationConfig(bits=E.TurboQuantBitSize.Bits4, always_ram=True),
    "turbo2": lambda: E.TurboQuantQuantizationConfig(bits=E.TurboQuantBitSize.Bits2, always_ram=True),
    "binary": lambda: E.BinaryQuantizationConfig(always_ram=True),
}


class Folder:
    """A folder of embedded collections; `aliases.json` in it holds their second names, which the engine
    itself has none of."""

    def __init__(self, path: str) -> None:
        self.path = storage.local_path(path, "`edge`")
        if self.path.exists() and not self.path.is_dir():
            raise UsageError("`edge`", f"{path} is a file", "a folder of embedded collections, or a new one")
        self.where = path
        self._open: dict[str, Edge] = {}  # a shard can be open once

    def collections(self) -> list[str]:
        return sorted(p.parent.name for p in self.path.glob("*/collection.json"))

    def aliases(self) -> dict[str, str]:
        return _read_json(self.path / ALIASES)

    def point(self, alias: str, collection: str) -> None:
        if collection not in self.collections():
            raise StoreError(self.path, f"no collection {collection!r}", ", ".join(self.collections()))
        if alias in self.collections():
            raise StoreError(self.path, f"{alias!r} is a collection, not an alias", "another name")
        storage.write_json(self.path / ALIASES, self.aliases() | {alias: collection})

    def drop(self, collection: str) -> None:
        if collection in self.aliases().values():
            raise StoreError(
                self.path, f"{collection!r} is what an alias points at", do="point the alias elsewhere first"
            )
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


class Edge:
    """`<folder>/<collection>/` holds the shard; `collection.json` beside it what the engine itself doesn't
    keep (spec, metadata)."""

    def __init__(self, name: str, folder: str) -> None:
        check_name(name)
        self.name, self.path = name, Path(folder) / name
        self._facts_file = self.path / "collection.json"
        self._shard: Any = None
        self._read_facts: tuple[Any, dict[str, Any]] = (None, {})

    def exists(self) -> bool:
        return self._facts_file.is_file()

    def _open(self) -> Any:
        if self._shard is None:
            if not self.path.parent.is_dir():
                came = "no such folder"
                raise StoreError(self.path.parent, came, "a folder of embedded collections", "check `edge`")
            if not self.exists():
                there = sorted(p.parent.name for p in self.path.parent.glob("*/collection.json"))
                raise StoreError(
                    self.path.parent,
                    f"no collection {self.name!r}",
                    f"one of {', '.join(there)}" if there else "an ingested collection",
                    "dclip-qdrant ingest",
                )
            self._shard = self._call(lambda: E.EdgeShard.load(str(self.path / "shard")))
        return self._shard

    def _call(self, request: Callable[[], Any]) -> Any:
        try:
            return request()
        except Exception as e:  # the engine raises bare Exception
            if "WouldBlock" in str(e):
                raise StoreError(
                    self.path,
                    "open in another process",
                    "one process at a time",
                    "wait for it, or use a server with `url`",
                ) from e
            raise StoreError(self.path, str(e).splitlines()[0][:300]) from e

    def create(self, spec: CollectionSpec, dim: int, metadata: dict[str, Any]) -> None:
        if spec.shards or spec.replicas or spec.write_consistency:
            logger.warning(
                "%s: shards and replicas are for servers; an embedded collection is one", self.name
            )
        shard = self.path / "shard"
        try:
            if shard.exists():
                _put_aside(shard)
            shard.mkdir(parents=True)
        except OSError as e:
            came = f"can't be made: {e.strerror}"
            raise StoreError(self.path, came, "a folder that may be written", "another `edge`") from e
        threshold = spec.indexing_threshold
        vectors = {name: _vector_params(v, dim, threshold) for name, v in spec.vectors.items()}
        optimizers = E.EdgeOptimizersConfig(indexing_threshold=threshold) if threshold else None
        config = E.EdgeConfig(vectors=vectors, optimizers=optimizers)
        self._shard = self._call(lambda: E.EdgeShard.create(str(shard), config))
        for key, kind in spec.payload_indexes.items():
            operation = E.UpdateOperation.create_field_index(key, _index_params(kind, spec.text))
            self._call(lambda operation=operation: self._shard.update(operation))
        facts = {"metadata": metadata, "dim": dim, "spec": spec.model_dump(mode="json")}
        storage.write_json(self._facts_file, facts)

    def _facts(self) -> dict[str, Any]:
        """What the engine itself doesn't keep; read again when its file has changed."""
        try:
            stat = self._facts_file.stat()
        except FileNotFoundError:
            return {}
        version = (stat.st_mtime_ns, stat.st_ino)
        if self._read_facts[0] != version:
            self._read_facts = (version, _read_json(self._facts_file))
        return self._read_facts[1]

    def complete(self) -> None:
        """Nothing is missing: `collection.json` is written last."""

    def set_metadata(self, metadata: dict[str, Any]) -> None:
        storage.write_json(self._facts_file, self._facts() | {"metadata": metadata})

    def metadata(self, *, max_age: float = 0.0) -> dict[str, Any]:
        return self._facts().get("metadata", {})

    def describe(self) -> dict[str, Any]:
        info, facts = self._open().info(), self._facts()
        return {
            "engine": "qdrant-edge",
            "path": str(self.path),
            "points": self.count(),
            "dim": facts["dim"],
            "vectors": facts["spec"]["vectors"],
            "payload_indexes": facts["spec"]["payload_indexes"],
            "text": facts["spec"].get("text", {}),
            "segments": info.segments_count,
            "indexed_vectors": info.indexed_vectors_count,
        }

    def count(self) -> int:
        return self._open().count(E.CountRequest(exact=True, filter=None))

    def payloads(self, ids: list[str], keys: list[str] | None) -> dict[str, Payload]:
        if not ids:
            return {}
        records = self._call(lambda: self._open().retrieve(ids, True, False))
        return {str(r.id): pick(r.payload or {}, keys) for r in records}

    def vectors(self, ids: list[str]) -> dict[str, np.ndarray]:
        records = self._call(lambda: self._open().retrieve(ids, False, ["image"])) if ids else []
        found = {str(r.id): stored_vectors(r.vector)[1] for r in records}
        return {i: vector for i, vector in found.items() if vector is not None}

    def _widths(self) -> Widths:
        facts = self._facts()
        dim, vectors = facts["dim"], facts["spec"]["vectors"]
        return Widths(dim, {name: min(v.get("dim") or dim, dim) for name, v in vectors.items()})

    def upsert(self, points: list[Point]) -> None:
        shard, widths = self._open(), self._widths()
        vectors: Any = [widths.of(p) for p in points]
        structs = [E.Point(p.id, v, p.payload) for p, v in zip(points, vectors, strict=True)]
        try:
            shard.update(E.UpdateOperation.upsert_points(structs))
        except Exception as e:
            of_the_disk = any(word in str(e) for word in ("WAL", "No space", "os error"))
            kind = StoreError if of_the_disk else PointError
            raise kind(self.path, str(e).splitlines()[0][:300]) from e

    def set_payloads(self, payloads: dict[str, Payload]) -> None:
        shard = self._open()
        for i, payload in payloads.items():
            change = E.UpdateOperation.overwrite_payload([i], payload)
            self._call(lambda change=change: shard.update(change))

    def delete(self, ids: list[str]) -> None:
        points: Any = ids
        shard, change = self._open(), E.UpdateOperation.delete_points(points)
        self._call(lambda: shard.update(change))
        self._call(lambda: shard.flush())

    def query(self, query: Query) -> list[ScoredPoint]:
        shard, widths = self._open(), self._widths()
        query = with_spec(query, self._facts()["spec"]["vectors"])
        params = _search_params(query)
        where = _filter(query.where, query.exclude, self._ids_with)
        sources = _sources(query, widths, where, params)
        prefetch = [
            E.Prefetch(
                limit=query.candidates,
                query=s.query,
                filter=None if s.candidates else where,
                prefetches=s.candidates,
                params=params,
            )
            for s in sources
        ]
        fusion: Any = E.Fusion.Rrf(k=query.rrf_k, weights=[s.weight for s in sources])
        if query.rescore is not None:
            inner = prefetch
            if len(prefetch) > 1:
                inner = [E.Prefetch(limit=query.candidates, query=fusion, prefetches=prefetch)]
            by_regions = E.Query.Nearest(widths.cut(query.rescore, "regions"), using="regions")
            request = {"query": by_regions, "prefetches": inner}
        elif query.mmr is not None and query.vector is not None:
            diverse = E.Mmr(widths.cut(query.vector, "image"), query.mmr, query.candidates, "image")
            request = {"query": diverse, "filter": where}
        elif len(sources) == 1 and not sources[0].candidates:
            request = {"query": sources[0].query, "filter": where}
        elif len(sources) == 1:
            request = {"query": sources[0].query, "prefetches": sources[0].candidates}
        else:
            request = {"query": fusion, "prefetches": prefetch}
        vectors = [name for name, wanted in _wanted_vectors(query) if wanted]
        full = E.QueryRequest(
            **request,
            limit=query.limit,
            with_payload=query.with_payload,
            with_vector=vectors or False,
            params=params,
        )
        hits = self._call(lambda: shard.query(full))
        return [
            ScoredPoint(str(h.id), float(h.score), dict(h.payload or {}), *stored_vectors(h.vector))
            for h in hits
        ]

    def _ids_with(self, key: str, flag: bool) -> set[str]:
        """Points that have true, or false, in a field: the engine's Python has no condition for that (it
        takes True for 1), so the payload is looked through."""
        return {p.id for p in self.scroll() if any(v is flag for v in _values_at(p.payload, key.split(".")))}

    def facet(self, key: str, limit: int) -> list[tuple[str, int]]:
        answer = self._call(lambda: self._open().facet(E.FacetRequest(key, limit=limit, exact=True)))
        return [(str(hit.value), hit.count) for hit in answer.hits]

    def scroll(self, *, with_vectors: bool = False) -> Iterator[Point]:
        offset = None
        while True:
            request = E.ScrollRequest(offset=offset, limit=PAGE, with_payload=True, with_vector=with_vectors)
            records, offset = self._call(lambda request=request: self._open().scroll(request))
            for record in records:
                regions, image = stored_vectors(record.vector)
                empty = np.zeros(0, np.float32)
                yield Point(
                    str(record.id), empty if image is None else image, regions, dict(record.payload or {})
                )
            if offset is None:
                return

    def finish(self) -> None:
        """Builds the HNSW index; until then new points are searched exactly."""
        self._call(lambda: self._open().optimize())
        self._call(lambda: self._open().flush())

    def settled(self) -> bool:
        return True

    def close(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None


def _put_aside(shard: Path) -> None:
    """What a run left that was killed before it had made its collection. It holds no points; one that does is
    somebody's, and is kept under another name."""
    try:
        left_over = E.EdgeShard.load(str(shard))
        points = left_over.count(E.CountRequest(exact=True, filter=None))
        left_over.close()
    except Exception:  # the engine raises bare Exception; it may have been killed at any moment
        points = None
    if points == 0 or not any(shard.iterdir()):
        shutil.rmtree(shard)
        return
    kept = shard.with_name(f"{shard.name}-{time.time_ns()}")
    shard.rename(kept)
    logger.warning("%s: half made, without collection.json; kept as %s", shard.parent, kept.name)


def _read_json(file: Path) -> dict[str, Any]:
    """What one of our own files holds; nothing where there is none.

    Raises:
        StoreError: a file that was damaged, by a full disk or by hand.
    """
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as e:
        do = "put back a copy of it, or move its folder away and ingest again"
        raise StoreError(file, f"damaged ({e})", "what dclip-qdrant wrote", do) from e
    return value


@dataclass(frozen=True)
class Source:
    """One of the things that a query fuses, with its weight and the candidates that it orders."""

    query: Any
    weight: float
    candidates: list[Any]


def _sources(query: Query, widths: Widths, where: Any, params: Any) -> list[Source]:
    """What the query fuses: sources with a weight."""
    dense_weight, text_weight, regions_weight = query.weights
    sources = []
    if query.vector is not None:
        dense = E.Query.Nearest(widths.cut(query.vector, "image"), using="image")
        by_region = E.Query.Nearest([widths.cut(query.vector, "regions")], using="regions")
        nearest = E.Prefetch(limit=query.candidates, query=dense, filter=where, params=params)
        sources += [Source(dense, dense_weight, []), Source(by_region, regions_weight, [nearest])]
    if query.text is not None:
        sources.append(Source(E.TextQuery("caption", query.text), text_weight, []))
    return [source for source in sources if source.weight > 0]


def _search_params(query: Query) -> Any:
    """How a quantised search and HNSW look; None: as the engine likes."""
    quantisation = None
    if query.oversampling is not None:
        quantisation = E.QuantizationSearchParams(
            rescore=query.oversampling > 0, oversampling=query.oversampling or None
        )
    if quantisation is None and query.ef is None:
        return None
    return E.SearchParams(hnsw_ef=query.ef, quantization=quantisation)


def _wanted_vectors(query: Query) -> tuple[tuple[str, bool], ...]:
    return ("regions", query.with_regions), ("image", query.with_image)


def _vector_params(vector: VectorSpec, dim: int, threshold: int | None) -> Any:
    hnsw = None
    if threshold:
        hnsw = E.HnswIndexConfig(m=16, ef_construct=100, full_scan_threshold=max(10, threshold))
    if not vector.hnsw:
        hnsw = E.HnswIndexConfig(m=0, ef_construct=4, full_scan_threshold=10)
    max_sim = E.MultiVectorConfig(E.MultiVectorComparator.MaxSim) if vector.multivector else None
    return E.EdgeVectorParams(
        size=min(vector.dim or dim, dim),
        distance=E.Distance.Cosine,
        on_disk=vector.on_disk,
        datatype=E.VectorStorageDatatype.Float16 if vector.datatype == "float16" else None,
        multivector_config=max_sim,
        hnsw_config=hnsw,
        quantization_config=QUANTISED[vector.quantization]() if vector.quantization != "none" else None,
    )


def _index_params(kind: str, text: TextSpec) -> Any:
    if kind == "bm25":
        return E.TextIndexParams(scoring=E.TextScoringParams(), **words_options(text))
    if kind == "tenant":
        return E.KeywordIndexParams(is_tenant=True)
    return {
        "keyword": E.PayloadSchemaType.Keyword,
        "uuid": E.PayloadSchemaType.Uuid,
        "geo": E.PayloadSchemaType.Geo,
        "integer": E.PayloadSchemaType.Integer,
        "float": E.PayloadSchemaType.Float,
        "datetime": E.PayloadSchemaType.Datetime,
        "bool": E.PayloadSchemaType.Bool,
    }[kind]


IdsWith = Callable[[str, bool], set[str]]


def _filter(where: tuple[Condition, ...], exclude: tuple[str, ...], ids_with: IdsWith) -> Any:
    """Conditions, all of which must hold, as the engine's filter; points of `exclude` never match."""
    must, must_not = [], []
    for c in where:
        if c.op in ("=", "!="):
            each = [_equals(c.key, value, ids_with) for value in c.values]
            condition = each[0] if len(each) == 1 else E.Filter(should=each)
            (must if c.op == "=" else must_not).append(condition)
        elif c.op == "~":
            texts = readings(str(c.values[0]))
            each: list[Any] = [E.FieldCondition(key=c.key, match=E.MatchText(text)) for text in texts]
            must.append(each[0] if len(each) == 1 else E.Filter(should=each))
        elif isinstance(c.values[0], datetime):
            until = E.RangeDateTime(**{BOUNDS[c.op]: c.values[0].isoformat()})
            must.append(E.FieldCondition(key=c.key, range=until))
        else:
            bound = {BOUNDS[c.op]: float(c.values[0])}
            must.append(E.FieldCondition(key=c.key, range=E.RangeFloat(**bound)))
    if exclude:
        must_not.append(E.HasIdCondition(set(exclude)))
    return E.Filter(must=must or None, must_not=must_not or None) if must or must_not else None


def _equals(key: str, value: Any, ids_with: IdsWith) -> Any:
    if isinstance(value, bool):
        points: Any = ids_with(key, value)
        return E.HasIdCondition(points)
    # an exact match is for words and for numbers that are stored as whole ones; 10 is also 10.0
    if isinstance(value, int | float) and abs(value) < EXACT:
        return E.FieldCondition(key=key, range=E.RangeFloat(gte=value, lte=value))
    whole: Any = value
    return E.FieldCondition(key=key, match=E.MatchValue(whole))


def _values_at(payload: Payload, path: list[str]) -> list[Any]:
    """What stands at a payload key such as `a.b` or `a[].b`; of a list at its end, each item."""
    values: list[Any] = [payload]
    for part in path:
        name, opened, _ = part.partition("[]")
        values = [value[name] for value in values if isinstance(value, dict) and name in value]
        if opened:
            values = [item for value in values if isinstance(value, list) for item in value]
    return [item for value in values for item in (value if isinstance(value, list) else [value])]
