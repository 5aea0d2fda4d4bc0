"""A collection on a Qdrant server, or in qdrant-client's in-memory engine for `:memory:`.

What an older server lacks is made up for, down to 1.15: BM25 over a text index (1.20) by a sparse vector
`bm25` beside the others, made by qdrant-edge's own BM25 (the same ids and values as the server's); weighted
RRF (1.17) by fusing here; a collection's metadata (1.16) by a collection of our own, `dclip-metadata`.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from qdrant_client import models as m

from dclip_qdrant.errors import PointError, StoreError, UsageError
from dclip_qdrant.lookup import need
from dclip_qdrant.serving.collection import META, CollectionSpec, TextSpec, VectorSpec
from dclip_qdrant.serving.stores.base import (
    Payload,
    Point,
    Query,
    ScoredPoint,
    Widths,
    check_name,
    pick,
    rrf,
    stored_vectors,
    with_spec,
)
from dclip_qdrant.serving.stores.qdrant_connection import (
    METADATA,
    NEW_VECTORS,
    TEXT_SCORING,
    WEIGHTED_RRF,
    Connection,
    OverLimit,
)
from dclip_qdrant.serving.stores.qdrant_terms import QUANTISED, SPARSE, Names, bm25, conditions, sent_id

PAGE = 256  # points a scroll
FIELD_PAGE = 1000  # ... when one payload field is read
SOURCES = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))  # dense, BM25, regions, each by itself


@dataclass(frozen=True)
class Source:
    """One of the things that a query fuses: what is asked of which vector, with what weight, and the
    candidates that it orders, where it doesn't search the whole collection."""

    query: Any
    using: str
    weight: float
    candidates: m.Prefetch | None = None


class Qdrant:
    """One collection on a server."""

    def __init__(self, name: str, connection: Connection, *, alone: bool = False) -> None:
        check_name(name)
        self.name = name
        self.connection = connection
        self.client = connection.client
        self.alone = alone
        self._info: Any = None  # what the collection is, asked once
        self._aside: dict[str, Any] | None = None
        self._looked_at = 0.0  # when `metadata` was, by the monotonic clock

    def _call(self, request: Callable[[], Any]) -> Any:
        return self.connection.call(request, self.name)

    def exists(self) -> bool:
        return self._call(lambda: self.client.collection_exists(self.name))

    def create(self, spec: CollectionSpec, dim: int, metadata: dict[str, Any]) -> None:
        threshold = spec.indexing_threshold
        options: dict[str, Any] = {}
        if threshold:
            options["optimizers_config"] = m.OptimizersConfigDiff(indexing_threshold=threshold)
        spread = {
            "shard_number": spec.shards,
            "replication_factor": spec.replicas,
            "write_consistency_factor": spec.write_consistency,
        }
        options |= {name: count for name, count in spread.items() if count is not None}
        if not self._scores_text() and "bm25" in spec.payload_indexes.values():
            version = ".".join(map(str, TEXT_SCORING))
            need("qdrant_edge", f"BM25 on a Qdrant server older than {version}")
            options["sparse_vectors_config"] = {SPARSE: m.SparseVectorParams(modifier=m.Modifier.IDF)}
        metadata = {META: {**metadata[META], "spec": spec.model_dump(mode="json")}}
        if self._keeps_metadata():
            options["metadata"] = metadata
        else:
            self.connection.set_metadata_aside(self.name, metadata)
        vectors = {name: _vector_params(v, dim, threshold) for name, v in spec.vectors.items()}
        try:
            self._call(lambda: self.client.create_collection(self.name, vectors_config=vectors, **options))
        except StoreError as e:
            if not e.came.startswith(("HTTP 409", "ALREADY_EXISTS")):
                raise
            # another run made it at the same moment; whoever asks looks at who it was
        self._info = None
        self._index(spec, Names())

    def complete(self) -> None:
        spec = self._metadata().get(META, {}).get("spec")
        names, there = self._names(), self._info.payload_schema
        if spec is None or names.mark:
            return
        wish = CollectionSpec(**spec)
        missing = {key: kind for key, kind in wish.payload_indexes.items() if names.field(key) not in there}
        if missing and not self.connection.in_memory:
            self._index(wish.model_copy(update={"payload_indexes": missing}), names)

    def _scores_text(self) -> bool:
        return self.connection.version() >= TEXT_SCORING

    def _keeps_metadata(self) -> bool:
        return self.connection.version() >= METADATA

    def _index(self, spec: CollectionSpec, names: Names) -> None:
        kinds: dict[str, Any] = {
            "tenant": m.KeywordIndexParams(type=m.KeywordIndexType.KEYWORD, is_tenant=True),
            "uuid": m.PayloadSchemaType.UUID,
            "geo": m.PayloadSchemaType.GEO,
            "keyword": m.PayloadSchemaType.KEYWORD,
            "integer": m.PayloadSchemaType.INTEGER,
            "float": m.PayloadSchemaType.FLOAT,
            "bool": m.PayloadSchemaType.BOOL,
            "datetime": m.PayloadSchemaType.DATETIME,
        }
        for key, kind in spec.payload_indexes.items():
            schema: Any = kinds.get(kind)
            if kind == "bm25":
                scoring = m.TextScoringParams(type=m.TextScoringType.BM25) if self._scores_text() else None
                options: dict[str, Any] = {"scoring": scoring} if scoring else {}
                if spec.text.ascii_folding and self._keeps_metadata():  # both came with 1.16
                    options["ascii_folding"] = True
                if spec.text.language:
                    stemmer = m.SnowballLanguage(spec.text.language)
                    options["stemmer"] = m.SnowballParams(type=m.Snowball.SNOWBALL, language=stemmer)
                    options["stopwords"] = m.Language(spec.text.language)
                tokenizer = m.TokenizerType(spec.text.tokenizer)
                if self.connection.in_memory:  # this engine has no other than its default
                    tokenizer, options = m.TokenizerType.WORD, {"scoring": scoring}
                schema = m.TextIndexParams(type=m.TextIndexType.TEXT, tokenizer=tokenizer, **options)
            field = names.field(key)
            with warnings.catch_warnings():
                # the in-memory engine needs none
                warnings.filterwarnings("ignore", message=".*[Pp]ayload indexes have no effect.*")
                self._call(
                    lambda field=field, schema=schema: self.client.create_payload_index(
                        self.name, field, schema, wait=True
                    )
                )

    def metadata(self, *, max_age: float = 0.0) -> dict[str, Any]:
        if self._info is not None and time.monotonic() - self._looked_at < max_age:
            return self._metadata()
        try:
            self._info, self._aside = self._call(lambda: self.client.get_collection(self.name)), None
            self._looked_at = time.monotonic()
        except (PointError, StoreError):
            if self.exists():
                raise
            return {}
        return self._metadata()

    def _metadata(self) -> dict[str, Any]:
        """The metadata, as it was when the collection was last looked at."""
        self._params()
        if self._keeps_metadata():
            return self._info.config.metadata or {}
        if self._aside is None:
            self._aside = self.connection.metadata_aside(self.name)
        return self._aside

    def set_metadata(self, metadata: dict[str, Any]) -> None:
        if self._keeps_metadata():
            self._call(lambda: self.client.update_collection(self.name, metadata=metadata))
        else:
            self.connection.set_metadata_aside(self.name, metadata)
        self._info = self._aside = None

    def _known(self) -> Any:
        """What the server says of the collection. Raises StoreError with what there is where there is
        none."""
        if not self.exists():
            names = self.connection.collections()
            expected = f"one of {', '.join(names)}" if names else "an ingested collection"
            came = f"no collection {self.name!r}"
            raise StoreError(self.connection.url, came, expected, "dclip-qdrant ingest")
        self._info = self._call(lambda: self.client.get_collection(self.name))
        return self._info

    def _params(self) -> Any:
        """Vectors and their sizes: they don't change, so they are asked for once."""
        return (self._info or self._known()).config.params

    def _names(self) -> Names:
        return Names(self._metadata().get(META, {}).get("mark", ""))

    def _widths(self) -> Widths:
        vectors, names = self._params().vectors, self._names()
        sizes = {k: v.size for k, v in vectors.items()} if isinstance(vectors, dict) else {}
        stored = {k: sizes[names.vector(k)] for k in ("image", "regions") if names.vector(k) in sizes}
        return Widths(self._metadata().get(META, {}).get("dim") or stored.get("image", 0), stored)

    def _text_spec(self) -> TextSpec:
        return TextSpec(**self._metadata().get(META, {}).get("spec", {}).get("text", {}))

    def _vector_specs(self) -> dict[str, Any]:
        return self._metadata().get(META, {}).get("spec", {}).get("vectors", {})

    def _sparse(self) -> str | None:
        """The sparse vector that holds BM25 on an older server; None on others."""
        name = self._names().vector(SPARSE)
        return name if name in (self._params().sparse_vectors or {}) else None

    def describe(self) -> dict[str, Any]:
        info = self._known()
        spec = self._metadata().get(META, {}).get("spec", {})
        vectors = info.config.params.vectors
        dims = {k: v.size for k, v in vectors.items()} if isinstance(vectors, dict) else {"": vectors.size}
        return {
            "engine": "qdrant",
            "url": self.connection.url,
            "points": self.count(),
            "dim": dims.get("image"),
            "vectors": spec.get("vectors", dims),
            "payload_indexes": spec.get("payload_indexes", {}),
            "text": spec.get("text", {}),
            "segments": info.segments_count,
            "indexed_vectors": info.indexed_vectors_count,
        }

    def count(self) -> int:
        self._known()
        try:
            return self._call(lambda: self.client.count(self.name, exact=True)).count
        except (PointError, StoreError) as e:  # strict mode may forbid it: `search_allow_exact`
            if "exact" not in e.came.lower():
                raise
            return self._call(lambda: self.client.count(self.name, exact=False)).count

    # --- as a guest in a collection that was there before us

    def move_in(self, spec: CollectionSpec, dim: int, metadata: dict[str, Any], mark: str) -> None:
        """Adds our vectors, indexes and metadata to the collection as it stands; nothing of its owner's
        changes. Doing it again finishes it.

        Raises:
            StoreError: a server before 1.18, or a vector of ours that has another width there.
        """
        there = self._known().config.params.vectors
        theirs = dict(self._metadata())
        names = Names(mark)
        sizes = {k: v.size for k, v in there.items()} if isinstance(there, dict) else {"": there.size}
        for name, vector in spec.vectors.items():
            self._add_vector(names.vector(name), vector, min(vector.dim or dim, dim), sizes)
        if not self._scores_text() and "bm25" in spec.payload_indexes.values():
            self._add_sparse(names.vector(SPARSE))
        self._index(spec, names)
        ours = metadata[META] | {"mark": mark, "spec": spec.model_dump(mode="json")}
        self.set_metadata(theirs | {META: ours})
        if not self._scores_text():
            self._fill_sparse()

    def _add_vector(self, name: str, vector: VectorSpec, size: int, there: dict[str, int]) -> None:
        if name in there and there[name] != size:
            where = f"{self.connection.url}/{self.name}"
            came = f"a vector {name!r} of {there[name]} numbers"
            raise StoreError(where, came, str(size), "drop it, or take another mark")
        if name not in there:
            if self.connection.version() < NEW_VECTORS:
                came, expected = (
                    "a Qdrant server before 1.18",
                    "one that can add a vector to a live collection",
                )
                raise StoreError(self.connection.url, came, expected, "reindex into a new collection")
            dense = m.DenseVectorConfig(
                size=size, distance=m.Distance.COSINE, multivector_config=_multivector(vector)
            )
            config = m.DenseVectorNameConfig(dense=dense)
            self._call(lambda: self.client.create_vector_name(self.name, name, config))
        change = m.VectorParamsDiff(
            hnsw_config=None if vector.hnsw else m.HnswConfigDiff(m=0),
            on_disk=vector.on_disk,
            quantization_config=_quantisation(vector),
        )
        self._call(lambda: self.client.update_collection(self.name, vectors_config={name: change}))

    def _add_sparse(self, name: str) -> None:
        """BM25 of captions on a server whose text index doesn't score."""
        need("qdrant_edge", "BM25 on an older Qdrant server")
        if name not in (self._known().config.params.sparse_vectors or {}):
            config = m.SparseVectorNameConfig(sparse=m.SparseVectorConfig(modifier=m.Modifier.IDF))
            self._call(lambda: self.client.create_vector_name(self.name, name, config))

    def _fill_sparse(self) -> None:
        """For points that were given our vectors before there was one for BM25."""
        self._info = None
        sparse, names = self._sparse(), self._names()
        if sparse is None:
            return
        lacking = m.Filter(must_not=[m.HasVectorCondition(has_vector=sparse)])
        records = self._scroll(
            PAGE, with_payload=[names.field("caption")], with_vectors=False, scroll_filter=lacking
        )
        while some := list(islice(records, PAGE)):
            captions = {record.id: names.payload(record.payload).get("caption") for record in some}
            vectors: list[Any] = [
                m.PointVectors(id=i, vector={sparse: bm25(caption, self._text_spec(), document=True)})
                for i, caption in captions.items()
                if caption
            ]
            if vectors:
                self._in_parts(vectors, lambda part: self.client.update_vectors(self.name, part, wait=True))

    def field_values(self, field: str) -> Iterator[tuple[str, Any]]:
        """Every point's id and what it has in a payload field."""
        for record in self._scroll(FIELD_PAGE, with_payload=[field], with_vectors=False):
            value: Any = record.payload or {}
            for part in field.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            yield str(record.id), value

    def update(self, points: list[Point]) -> None:
        """Our vectors and payload of points that are there; everything else of them stays."""
        widths, names = self._widths(), self._names()

        def request(some: list[Point]) -> Any:
            vectors = [
                m.PointVectors(id=sent_id(p.id), vector=self._vectors_of(p, widths, names)) for p in some
            ]
            changes: list[Any] = [m.UpdateVectorsOperation(update_vectors=m.UpdateVectors(points=vectors))]
            for p in some:
                payload = m.SetPayload(payload=p.payload, points=[sent_id(p.id)], key=names.mark)
                changes.append(m.SetPayloadOperation(set_payload=payload))
            return self.client.batch_update_points(self.name, changes, wait=True)

        self._in_parts(points, request)

    # --- points

    def payloads(self, ids: list[str], keys: list[str] | None) -> dict[str, Payload]:
        if not ids:
            return {}
        names = self._names()
        wanted = True if keys is None else [names.field(k) for k in keys]
        records = self._retrieve(ids, with_payload=wanted, with_vectors=False)
        return {str(r.id): pick(names.payload(r.payload), keys) for r in records}

    def vectors(self, ids: list[str]) -> dict[str, np.ndarray]:
        if not ids:
            return {}
        names = self._names()
        records = self._retrieve(ids, with_payload=False, with_vectors=[names.vector("image")])
        found = {str(r.id): stored_vectors(names.vectors(r.vector))[1] for r in records}
        return {i: vector for i, vector in found.items() if vector is not None}

    def _retrieve(self, ids: list[str], **options: Any) -> list[Any]:
        asked: list[Any] = [sent_id(i) for i in ids]
        answers = self._in_parts(asked, lambda some: self.client.retrieve(self.name, some, **options))
        return [record for answer in answers for record in answer]

    def upsert(self, points: list[Point]) -> None:
        widths, names = self._widths(), Names()
        structs = [
            m.PointStruct(id=p.id, vector=self._vectors_of(p, widths, names), payload=p.payload)
            for p in points
        ]
        self._in_parts(structs, lambda some: self.client.upsert(self.name, some, wait=True))

    def _vectors_of(self, point: Point, widths: Widths, names: Names) -> dict[str, Any]:
        vectors: dict[str, Any] = {names.vector(k): v for k, v in widths.of(point).items()}
        sparse = self._sparse()
        if sparse is not None and point.payload.get("caption"):
            vectors[sparse] = bm25(point.payload["caption"], self._text_spec(), document=True)
        return vectors

    def _in_parts(self, items: list[Any], request: Callable[[list[Any]], Any]) -> list[Any]:
        """The answers to requests about these items: one, or two of half as many where a server's rate
        limiter never lets so many through."""
        try:
            return [self._call(lambda: request(items))]
        except OverLimit:
            if len(items) < 2:
                raise
            half = len(items) // 2
            return self._in_parts(items[:half], request) + self._in_parts(items[half:], request)

    def set_payloads(self, payloads: dict[str, Payload]) -> None:
        names = self._names()
        changes: list[Any] = []
        for i, payload in payloads.items():
            new = m.SetPayload(payload=payload, points=[sent_id(i)], key=names.mark)
            # under a mark the point's other payload is somebody else's
            if names.mark:
                changes.append(m.SetPayloadOperation(set_payload=new))
            else:
                changes.append(m.OverwritePayloadOperation(overwrite_payload=new))
        self._in_parts(changes, lambda some: self.client.batch_update_points(self.name, some, wait=True))

    def delete(self, ids: list[str]) -> None:
        def request(some: list[Any]) -> Any:
            points: Any = m.PointIdsList(points=some)
            return self.client.delete(self.name, points, wait=True)

        self._in_parts([sent_id(i) for i in ids], request)

    def facet(self, key: str, limit: int) -> list[tuple[str, int]]:
        field = self._names().field(key)
        answer = self._call(lambda: self.client.facet(self.name, field, limit=limit, exact=True))
        return [(str(hit.value), hit.count) for hit in answer.hits]

    def scroll(self, *, with_vectors: bool = False) -> Iterator[Point]:
        names = self._names()
        for record in self._scroll(PAGE, with_payload=True, with_vectors=with_vectors):
            regions, image = stored_vectors(names.vectors(record.vector))
            empty = np.zeros(0, np.float32)
            yield Point(
                str(record.id), empty if image is None else image, regions, names.payload(record.payload)
            )

    def _scroll(self, page: int, **options: Any) -> Iterator[Any]:
        offset: Any = None
        while True:
            try:
                records, offset = self._call(
                    lambda at=offset, limit=page: self.client.scroll(
                        self.name, limit=limit, offset=at, **options
                    )
                )
            except OverLimit:
                if page < 2:
                    raise
                page //= 2
                continue
            yield from records
            if offset is None:
                return

    # --- queries

    def query(self, query: Query) -> list[ScoredPoint]:
        widths, names = self._widths(), self._names()
        query = with_spec(replace(query, candidates=self._allowed(query)), self._vector_specs())
        params = _search_params(query)
        where = conditions(tuple(replace(c, key=names.field(c.key)) for c in query.where), query.exclude)
        sources = self._sources(query, widths, names, where, params)
        if len(sources) > 1 and self.connection.version() < WEIGHTED_RRF:
            return self._fused_here(query, widths, names)
        options = self._answer_options(query, names)
        prefetch = [
            m.Prefetch(
                query=s.query,
                using=s.using,
                limit=query.candidates,
                filter=None if s.candidates else where,
                prefetch=s.candidates,
                params=params,
            )
            for s in sources
        ]
        fusion = m.RrfQuery(rrf=m.Rrf(k=query.rrf_k, weights=[s.weight for s in sources]))
        if query.rescore is not None:
            inner = prefetch
            if len(prefetch) > 1:
                inner = [m.Prefetch(prefetch=prefetch, query=fusion, limit=query.candidates)]
            request = {
                "prefetch": inner,
                "query": widths.cut(query.rescore, "regions"),
                "using": names.vector("regions"),
            }
        elif query.mmr is not None:
            mmr = m.Mmr(diversity=1 - query.mmr, candidates_limit=query.candidates)
            nearest = m.NearestQuery(nearest=sources[0].query, mmr=mmr)
            request = {"query": nearest, "using": sources[0].using, "query_filter": where}
        elif len(sources) == 1:
            (source,) = sources
            request = {
                "prefetch": source.candidates,
                "query": source.query,
                "using": source.using,
                "query_filter": None if source.candidates else where,
            }
        else:
            request = {"prefetch": prefetch, "query": fusion}
        try:
            answer = self._call(lambda: self.client.query_points(self.name, **request, **options))
        except (PointError, StoreError):
            self._known()  # says it better where the collection has gone
            raise
        return [_scored(p, float(p.score), names) for p in answer.points]

    def _allowed(self, query: Query) -> int:
        """How many candidates the collection's strict mode lets a query have."""
        strict = self._info.config.strict_mode_config
        most = strict.max_query_limit if strict is not None and strict.enabled else None
        return query.candidates if most is None else max(query.limit, min(query.candidates, most))

    def _sources(
        self,
        query: Query,
        widths: Widths,
        names: Names,
        where: m.Filter | None,
        params: m.SearchParams | None,
    ) -> list[Source]:
        """What the query fuses: sources with a weight."""
        dense_weight, text_weight, regions_weight = query.weights
        sources = []
        if query.vector is not None:
            image, regions = names.vector("image"), names.vector("regions")
            dense = widths.cut(query.vector, "image")
            nearest = m.Prefetch(
                query=dense, using=image, limit=query.candidates, filter=where, params=params
            )
            sources.append(Source(dense, image, dense_weight))
            by_region = [widths.cut(query.vector, "regions")]
            sources.append(Source(by_region, regions, regions_weight, nearest))
        sparse = self._sparse() if query.text is not None else None
        if query.text is not None and sparse is not None:
            sources.append(Source(bm25(query.text, self._text_spec()), sparse, text_weight))
        elif query.text is not None:
            if not self._scores_text():
                came = f"{self.name} has no BM25 vector, and this server (before 1.20) no scored text index"
                raise UsageError("`mode` hybrid", came, do="ingest with `into_existing` again, which adds it")
            text = m.TextQuery(text=m.TextQueryInput(query=query.text))
            sources.append(Source(text, names.field("caption"), text_weight))
        return [source for source in sources if source.weight > 0]

    def _answer_options(self, query: Query, names: Names) -> dict[str, Any]:
        """How much, with which payload and vectors, and how a quantised search looks."""
        vectors = []
        if query.with_regions:
            vectors.append(names.vector("regions"))
        if query.with_image:
            vectors.append(names.vector("image"))
        options: dict[str, Any] = {
            "limit": query.limit,
            "with_payload": query.with_payload,
            "with_vectors": vectors or False,
        }
        if (params := _search_params(query)) is not None:
            options["search_params"] = params
        return options

    def _fused_here(self, query: Query, widths: Widths, names: Names) -> list[ScoredPoint]:
        """Each source by itself, weighted RRF in this process, then payload and vectors (or the regions'
        MaxSim) of what came first."""
        plain = replace(
            query,
            rescore=None,
            limit=query.candidates,
            with_payload=False,
            with_regions=False,
            with_image=False,
        )
        lists, weights = [], []
        for unit, weight in zip(SOURCES, query.weights, strict=True):
            asks_text = unit[1] > 0
            there = query.text is not None if asks_text else query.vector is not None
            if there and weight > 0:
                lists.append([hit.id for hit in self.query(replace(plain, weights=unit))])
                weights.append(weight)
        scores = rrf(lists, tuple(weights), query.rrf_k)
        order = sorted(scores, key=lambda i: -scores[i])[: query.candidates]
        options = self._answer_options(query, names)
        if query.rescore is not None:
            chosen = m.Filter(must=[m.HasIdCondition(has_id=[sent_id(i) for i in order])])
            vector, using = widths.cut(query.rescore, "regions"), names.vector("regions")
            answer = self._call(
                lambda: self.client.query_points(
                    self.name, query=vector, using=using, query_filter=chosen, **options
                )
            )
            return [_scored(p, float(p.score), names) for p in answer.points]
        del options["limit"]
        options.pop("search_params", None)
        order = order[: query.limit]
        by_id = {str(r.id): r for r in self._retrieve(order, **options)}
        return [_scored(by_id[i], scores[i], names) for i in order if i in by_id]

    def finish(self) -> None:
        """The server indexes in the background by itself."""

    def settled(self) -> bool:
        return self._known().status == m.CollectionStatus.GREEN

    def close(self) -> None:
        if self.alone:
            self.connection.close()


def _search_params(query: Query) -> m.SearchParams | None:
    """How a quantised search and HNSW look; None: as the engine likes."""
    quantisation = None
    if query.oversampling is not None:
        quantisation = m.QuantizationSearchParams(
            rescore=query.oversampling > 0, oversampling=query.oversampling or None
        )
    if quantisation is None and query.ef is None:
        return None
    return m.SearchParams(hnsw_ef=query.ef, quantization=quantisation)


def _multivector(vector: VectorSpec) -> m.MultiVectorConfig | None:
    return m.MultiVectorConfig(comparator=m.MultiVectorComparator.MAX_SIM) if vector.multivector else None


def _quantisation(vector: VectorSpec) -> Any:
    return QUANTISED[vector.quantization]() if vector.quantization != "none" else None


def _vector_params(vector: VectorSpec, dim: int, threshold: int | None) -> m.VectorParams:
    hnsw = m.HnswConfigDiff(full_scan_threshold=max(10, threshold)) if threshold else None
    return m.VectorParams(
        size=min(vector.dim or dim, dim),
        distance=m.Distance.COSINE,
        on_disk=vector.on_disk,
        hnsw_config=hnsw if vector.hnsw else m.HnswConfigDiff(m=0),
        datatype=m.Datatype.FLOAT16 if vector.datatype == "float16" else None,
        multivector_config=_multivector(vector),
        quantization_config=_quantisation(vector),
    )


def _scored(point: Any, score: float, names: Names) -> ScoredPoint:
    """A point of the client, under the names that the rest of the product knows."""
    vectors = stored_vectors(names.vectors(point.vector))
    return ScoredPoint(str(point.id), score, names.payload(point.payload), *vectors)
