"""A collection on a Qdrant server, or in qdrant-client's in-memory engine for `:memory:`.

What an older server lacks is made up for, down to 1.15: BM25 over a text index (1.20) by a sparse vector `bm25` beside the others, made by qdrant-edge's own
BM25 (the same ids and values as the server's); weighted RRF (1.17) by fusing here; a collection's metadata (1.16) by a collection of our own, `dclip-metadata`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from qdrant_client import models as m

from dclip_qdrant.collection import META, CollectionSpec
from dclip_qdrant.errors import PointError, StoreError
from dclip_qdrant.lookup import need
from dclip_qdrant.stores import Hit, Point, Query, Widths, found_vectors, pick, rrf
from dclip_qdrant.stores.qdrant_server import METADATA, NEW_VECTORS, TEXT_SCORING, WEIGHTED_RRF, Server
from dclip_qdrant.stores.qdrant_terms import QUANTISED, SPARSE, Names, bm25, conditions, sent_id


class Qdrant:
    """One collection on a server."""

    def __init__(self, name: str, server: Server, *, alone: bool = False) -> None:
        self.name, self.server, self.url, self.client, self.alone = name, server, server.url, server.client, alone
        self._is: Any = None  # what the collection is, asked once
        self._aside: dict[str, Any] | None = None

    def _try(self, f: Callable[[], Any]) -> Any:
        return self.server.call(f, self.name)

    def exists(self) -> bool:
        return self._try(lambda: self.client.collection_exists(self.name))

    def create(self, spec: CollectionSpec, dim: int, metadata: dict[str, Any]) -> None:
        whole = spec.indexing_threshold
        hnsw = m.HnswConfigDiff(full_scan_threshold=max(10, whole)) if whole else None
        vectors = {
            name: m.VectorParams(
                size=min(v.dim or dim, dim), distance=m.Distance.COSINE, on_disk=v.on_disk, hnsw_config=hnsw if v.hnsw else m.HnswConfigDiff(m=0),
                datatype=m.Datatype.FLOAT16 if v.datatype == "float16" else None,
                multivector_config=m.MultiVectorConfig(comparator=m.MultiVectorComparator.MAX_SIM) if v.multivector else None,
                quantization_config=QUANTISED[v.quantization]() if v.quantization != "none" else None,
            )
            for name, v in spec.vectors.items()
        }  # fmt: skip
        how: dict[str, Any] = {"optimizers_config": m.OptimizersConfigDiff(indexing_threshold=whole)} if whole else {}
        scored = self.server.version() >= TEXT_SCORING
        if not scored and "bm25" in spec.payload_indexes.values():
            need("qdrant_edge", f"BM25 on a Qdrant server older than {'.'.join(map(str, TEXT_SCORING))}")
            how["sparse_vectors_config"] = {SPARSE: m.SparseVectorParams(modifier=m.Modifier.IDF)}
        metadata = {META: {**metadata[META], "spec": spec.model_dump(mode="json")}}
        if self.server.version() >= METADATA:
            how["metadata"] = metadata
        else:
            self.server.set_metadata_aside(self.name, metadata)
        self._try(lambda: self.client.create_collection(self.name, vectors_config=vectors, **how))
        self._is = None
        self._index(spec, Names())

    def _index(self, spec: CollectionSpec, names: Names) -> None:
        import warnings

        scored = self.server.version() >= TEXT_SCORING
        for key, kind in spec.payload_indexes.items():
            schema: Any = {
                "keyword": m.PayloadSchemaType.KEYWORD,
                "integer": m.PayloadSchemaType.INTEGER,
                "float": m.PayloadSchemaType.FLOAT,
            }.get(kind)
            if kind == "bm25":
                scoring = {"scoring": m.TextScoringParams(type=m.TextScoringType.BM25)} if scored else {}
                schema = m.TextIndexParams(type=m.TextIndexType.TEXT, tokenizer=m.TokenizerType.WORD, **scoring)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*[Pp]ayload indexes have no effect.*")  # the in-memory engine needs none
                self._try(lambda k=key, s=schema: self.client.create_payload_index(self.name, names.field(k), s, wait=True))

    def metadata(self) -> dict[str, Any]:
        try:
            self._is, self._aside = self._try(lambda: self.client.get_collection(self.name)), None
        except (PointError, StoreError):
            if self.exists():
                raise
            return {}
        return self._said()

    def _said(self) -> dict[str, Any]:
        """The metadata, as it was when the collection was last looked at."""
        self._params()
        if self.server.version() >= METADATA:
            return self._is.config.metadata or {}
        if self._aside is None:
            self._aside = self.server.metadata_aside(self.name)
        return self._aside

    def set_metadata(self, metadata: dict[str, Any]) -> None:
        if self.server.version() >= METADATA:
            self._try(lambda: self.client.update_collection(self.name, metadata=metadata))
        else:
            self.server.set_metadata_aside(self.name, metadata)
        self._is = self._aside = None

    def _known(self) -> Any:
        """What the server says of the collection. Raises StoreError with what there is where there is none."""
        if not self.exists():
            names = self.server.collections()
            raise StoreError(
                self.url,
                f"no collection {self.name!r}",
                f"one of {', '.join(names)}" if names else "an ingested collection",
                "dclip-qdrant ingest",
            )
        self._is = self._try(lambda: self.client.get_collection(self.name))
        return self._is

    def _params(self) -> Any:
        """Vectors and their sizes: they don't change, so they are asked for once."""
        return (self._is or self._known()).config.params

    def _names(self) -> Names:
        return Names(self._said().get(META, {}).get("mark", ""))

    def _widths(self) -> Widths:
        vectors, names, said = self._params().vectors, self._names(), self._said().get(META, {})
        sizes = {k: v.size for k, v in vectors.items()} if isinstance(vectors, dict) else {}
        stored = {k: sizes[names.vector(k)] for k in ("image", "regions") if names.vector(k) in sizes}
        return Widths(said.get("dim") or stored.get("image", 0), stored)

    def _sparse(self) -> bool:
        return SPARSE in (self._params().sparse_vectors or {})

    def describe(self) -> dict[str, Any]:
        info = self._known()
        spec = self._said().get(META, {}).get("spec", {})
        vectors = info.config.params.vectors
        dims = {k: v.size for k, v in vectors.items()} if isinstance(vectors, dict) else {"": vectors.size}
        return {"engine": "qdrant", "url": self.url, "points": self.count(), "dim": dims.get("image"), "vectors": spec.get("vectors", dims), "payload_indexes": spec.get("payload_indexes", {}),
                "segments": info.segments_count, "indexed_vectors": info.indexed_vectors_count}  # fmt: skip

    def count(self) -> int:
        self._known()
        return self._try(lambda: self.client.count(self.name, exact=True)).count

    # --- as a guest in a collection that was there before us

    def move_in(self, spec: CollectionSpec, dim: int, metadata: dict[str, Any], mark: str) -> None:
        """Adds our vectors, indexes and metadata to the collection as it stands; nothing of its owner's changes. Doing it again finishes it.

        Raises:
            StoreError: a server before 1.18, or a vector of ours that has another width there.
        """
        said = self._known()
        theirs = dict(self._said())
        names, have = Names(mark), said.config.params.vectors
        have = have if isinstance(have, dict) else {"": have}
        for name, v in spec.vectors.items():
            ours, size = names.vector(name), min(v.dim or dim, dim)
            if ours in have and have[ours].size != size:
                raise StoreError(
                    f"{self.url}/{self.name}",
                    f"a vector {ours!r} of {have[ours].size} numbers",
                    str(size),
                    "drop it, or take another --mark",
                )
            if ours not in have:
                if self.server.version() < NEW_VECTORS:
                    raise StoreError(
                        self.url,
                        "a Qdrant server before 1.18",
                        "one that can add a vector to a live collection",
                        "reindex into a new collection",
                    )
                kind = m.MultiVectorConfig(comparator=m.MultiVectorComparator.MAX_SIM) if v.multivector else None
                config = m.DenseVectorNameConfig(dense=m.DenseVectorConfig(size=size, distance=m.Distance.COSINE, multivector_config=kind))
                self._try(lambda n=ours, c=config: self.client.create_vector_name(self.name, n, c))
            change = m.VectorParamsDiff(
                hnsw_config=None if v.hnsw else m.HnswConfigDiff(m=0), on_disk=v.on_disk,
                quantization_config=QUANTISED[v.quantization]() if v.quantization != "none" else None,
            )  # fmt: skip
            self._try(lambda n=ours, c=change: self.client.update_collection(self.name, vectors_config={n: c}))
        self._index(spec, names)
        self.set_metadata(theirs | {META: metadata[META] | {"mark": mark, "spec": spec.model_dump(mode="json")}})

    def field_values(self, field: str) -> Iterator[tuple[str, Any]]:
        """Every point's id and what it has in a payload field."""
        offset: Any = None
        while True:
            found, offset = self._try(
                lambda at=offset: self.client.scroll(self.name, limit=1000, offset=at, with_payload=[field], with_vectors=False)
            )
            for r in found:
                value: Any = r.payload or {}
                for part in field.split("."):
                    value = value.get(part) if isinstance(value, dict) else None
                yield str(r.id), value
            if offset is None:
                return

    def update(self, points: list[Point]) -> None:
        """Our vectors and payload of points that are there; everything else of them stays."""
        widths, names = self._widths(), self._names()
        vectors = [m.PointVectors(id=sent_id(p.id), vector={names.vector(k): v for k, v in widths.of(p).items()}) for p in points]
        changes: list[Any] = [m.UpdateVectorsOperation(update_vectors=m.UpdateVectors(points=vectors))]
        for p in points:
            changes.append(m.SetPayloadOperation(set_payload=m.SetPayload(payload=p.payload, points=[sent_id(p.id)], key=names.mark)))
        self._try(lambda: self.client.batch_update_points(self.name, changes, wait=True))

    def payloads(self, ids: list[str], keys: list[str] | None) -> dict[str, dict[str, Any]]:
        if not ids:
            return {}
        names = self._names()
        wanted = True if keys is None else [names.field(k) for k in keys]
        found = self._try(lambda: self.client.retrieve(self.name, [sent_id(i) for i in ids], with_payload=wanted, with_vectors=False))
        return {str(r.id): pick(names.payload(r.payload), keys) for r in found}

    def upsert(self, points: list[Point]) -> None:
        widths, sparse = self._widths(), self._sparse()
        some = []
        for p in points:
            vector: dict[str, Any] = dict(widths.of(p))
            if sparse and p.payload.get("caption"):
                vector[SPARSE] = bm25(p.payload["caption"], document=True)
            some.append(m.PointStruct(id=p.id, vector=vector, payload=p.payload))
        self._try(lambda: self.client.upsert(self.name, some, wait=True))

    def query(self, query: Query) -> list[Hit]:
        widths, names = self._widths(), self._names()
        where = conditions(tuple(replace(c, key=names.field(c.key)) for c in query.where), query.exclude)
        image, regions = names.vector("image"), names.vector("regions")
        live: list[tuple[Any, str, float, Any]] = []  # query, using, weight, what it chooses from
        if query.vector is not None:
            dense = widths.cut(query.vector, "image")
            live.append((dense, image, query.weights[0], None))
            chosen = m.Prefetch(query=dense, using=image, limit=query.candidates, filter=where)
            live.append(([widths.cut(query.vector, "regions")], regions, query.weights[2], chosen))
        if query.text is not None and self._sparse():
            live.append((bm25(query.text), SPARSE, query.weights[1], None))
        elif query.text is not None:
            live.append((m.TextQuery(text=m.TextQueryInput(query=query.text)), names.field("caption"), query.weights[1], None))
        live = [one for one in live if one[2] > 0]
        if len(live) > 1 and self.server.version() < WEIGHTED_RRF:
            return self._fused_here(query, widths, names)
        kinds = [regions] * query.with_regions + [image] * query.with_image
        how: dict[str, Any] = {"limit": query.limit, "with_payload": query.with_payload, "with_vectors": kinds or False}
        if query.oversampling is not None:
            again = m.QuantizationSearchParams(rescore=query.oversampling > 0, oversampling=query.oversampling or None)
            how["search_params"] = m.SearchParams(quantization=again)
        prefetch = [
            m.Prefetch(query=q, using=using, limit=query.candidates, filter=None if inner else where, prefetch=inner)
            for q, using, _, inner in live
        ]
        fusion = m.RrfQuery(rrf=m.Rrf(k=query.rrf_k, weights=[w for _, _, w, _ in live]))
        if query.rescore is not None:
            inner = prefetch if len(prefetch) == 1 else [m.Prefetch(prefetch=prefetch, query=fusion, limit=query.candidates)]
            call = lambda: self.client.query_points(
                self.name, prefetch=inner, query=widths.cut(query.rescore, "regions"), using=regions, **how
            )
        elif len(live) == 1:
            q, using, _, inner = live[0]
            call = lambda: self.client.query_points(
                self.name, prefetch=inner, query=q, using=using, query_filter=None if inner else where, **how
            )
        else:
            call = lambda: self.client.query_points(self.name, prefetch=prefetch, query=fusion, **how)
        try:
            found = self._try(call).points
        except (PointError, StoreError):
            self._known()  # says it better where the collection has gone
            raise
        return [Hit(str(p.id), float(p.score), names.payload(p.payload), *found_vectors(names.vectors(p.vector))) for p in found]

    def _fused_here(self, query: Query, widths: Widths, names: Names) -> list[Hit]:
        """Each source by itself, weighted RRF in this process, then payload and vectors (or the regions' MaxSim) of what came first."""
        alone = replace(query, rescore=None, limit=query.candidates, with_payload=False, with_regions=False, with_image=False)
        units = (
            [(1.0, 0.0, 0.0)] * (query.vector is not None)
            + [(0.0, 1.0, 0.0)] * (query.text is not None)
            + [(0.0, 0.0, 1.0)] * (query.vector is not None)
        )
        used = [(u, w) for u in units if (w := float(np.dot(u, query.weights))) > 0]
        scores = rrf([[h.id for h in self.query(replace(alone, weights=u))] for u, _ in used], tuple(w for _, w in used), query.rrf_k)
        order = sorted(scores, key=lambda i: -scores[i])[: query.candidates]
        kinds = [names.vector("regions")] * query.with_regions + [names.vector("image")] * query.with_image
        how: dict[str, Any] = {"with_payload": query.with_payload, "with_vectors": kinds or False}
        if query.rescore is not None:
            chosen = m.Filter(must=[m.HasIdCondition(has_id=[sent_id(i) for i in order])])
            vector, using = widths.cut(query.rescore, "regions"), names.vector("regions")
            found = self._try(
                lambda: self.client.query_points(self.name, query=vector, using=using, query_filter=chosen, limit=query.limit, **how)
            ).points
            scores, order = {str(p.id): float(p.score) for p in found}, [str(p.id) for p in found]
        else:
            order = order[: query.limit]
            found = self._try(lambda: self.client.retrieve(self.name, [sent_id(i) for i in order], **how))
        by_id = {str(p.id): p for p in found}
        return [
            Hit(i, scores[i], names.payload(by_id[i].payload), *found_vectors(names.vectors(by_id[i].vector))) for i in order if i in by_id
        ]

    def facet(self, key: str, limit: int) -> list[tuple[str, int]]:
        return [
            (str(h.value), h.count)
            for h in self._try(lambda: self.client.facet(self.name, self._names().field(key), limit=limit, exact=True)).hits
        ]

    def scroll(self, *, with_vectors: bool = False) -> Iterator[Point]:
        offset: Any = None
        names = self._names()
        while True:
            found, offset = self._try(
                lambda at=offset: self.client.scroll(self.name, limit=256, offset=at, with_payload=True, with_vectors=with_vectors)
            )
            for r in found:
                v = names.vectors(r.vector)
                yield Point(
                    str(r.id),
                    np.asarray(v["image"], np.float32) if with_vectors else np.zeros(0, np.float32),
                    found_vectors(v)[0],
                    names.payload(r.payload),
                )
            if offset is None:
                return

    def finish(self) -> None:
        """The server indexes in the background by itself."""

    def settled(self) -> bool:
        return self._known().status == m.CollectionStatus.GREEN

    def close(self) -> None:
        if self.alone:
            self.server.close()
