"""Queries: text or picture in, hits out, with the region that matched."""

import datetime
import logging
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from dclip_qdrant.errors import PointError, UsageError
from dclip_qdrant.metrics import shorten
from dclip_qdrant.pictures import images
from dclip_qdrant.serving.collection import META, check_student
from dclip_qdrant.serving.examples import Example, Wanted, query_vector
from dclip_qdrant.serving.relevance import Relevance
from dclip_qdrant.serving.stores import Condition, Query, ScoredPoint, Store
from dclip_qdrant.serving.stores.base import check_unicode, mmr
from dclip_qdrant.serving.student import Student

logger = logging.getLogger(__name__)

REMEMBERED = 10.0  # seconds that a collection's metadata is taken for the same
TIES = 10  # hits beyond those asked for
SAME = 6  # digits of a score; float32 has seven
LOOKED_AT = 256  # pictures, when nothing was found under a filter
MODES = ("dense", "regions", "hybrid")
SHOWN = ("key", "uri", "caption", "labels", "width", "height")  # of a payload, in a hit's row


@dataclass(frozen=True)
class Hit:
    """One picture that was found. `region` is the index of the box that matched best, None when the whole
    picture did (or regions weren't asked)."""

    id: str
    score: float
    payload: dict[str, Any]
    region: int | None = None
    # with explain: its rank in each stage, from 1; None where the stage didn't have it
    ranks: dict[str, int | None] | None = None
    # that the collection has something for a text whose best hit is this one; None: `tune` wasn't run
    probability: float | None = None

    @property
    def box(self) -> list[float] | None:
        """x0, y0, x1, y1 in pixels of the upright picture."""
        return self.payload["boxes"][self.region] if self.region is not None else None

    @property
    def label(self) -> str | None:
        return self.payload["labels"][self.region] if self.region is not None else None

    def row(self) -> dict[str, Any]:
        """For JSON: what people look at first, then the whole payload."""
        shown = {key: self.payload.get(key) for key in SHOWN}
        row = {"id": self.id, "score": self.score, **shown, "payload": self.payload}
        if self.region is not None:
            row["region"] = {"box": self.box, "label": self.label}
        if self.ranks is not None:
            row["ranks"] = self.ranks
        if self.probability is not None:
            row["probability"] = self.probability
        return row


def parse_filter(text: str) -> Condition:
    """`label=dog`, `labels=dog|cat` (any), `labels!=cat`, `caption~red ball` (all words), `width>=640`,
    `taken<2024-07-01` (a date or a time as ISO 8601 has it).

    Raises:
        UsageError: anything else.
    """
    check_unicode("`where`", text)
    m = re.fullmatch(r"\s*([\w.\[\]-]+)\s*(!=|>=|<=|=|~|>|<)\s*(.+?)\s*", text)
    if not m:
        raise UsageError("`where`", repr(text), "key=value, key=a|b, key!=value, key~words, key>=number")
    key, op, value = m.groups()
    if op in (">=", "<=", ">", "<"):
        return Condition(key, op, (_bound(value, text, op),))
    return Condition(
        key, op, (value,) if op == "~" else tuple(v for t in value.split("|") for v in _values(t))
    )


def _bound(value: str, text: str, op: str) -> float | datetime.datetime:
    with suppress(ValueError):
        return float(value)
    with suppress(ValueError):
        date = datetime.datetime.fromisoformat(value)
        return date if date.tzinfo else date.replace(tzinfo=datetime.UTC)
    raise UsageError("`where`", repr(text), f"a number or a date such as 2024-07-31 after {op}")


def _values(text: str) -> tuple[Any, ...]:
    """What may be stored where a person writes `text`: CSV files and apps keep years, codes and yes or no as
    numbers or as words. In quotation marks it is a word."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return (text[1:-1],)
    if re.fullmatch(r"-?(0|[1-9]\d*)", text):
        return (int(text), text)
    if re.fullmatch(r"-?\d+\.\d+", text):
        return (float(text), text)
    return ({"true": True, "false": False}[text], text) if text in ("true", "false") else (text,)


@dataclass(frozen=True)
class Fusion:
    """How hybrid search weighs its sources. `tune.py` finds it on the user's pairs; a collection's metadata
    remembers it."""

    dense: float = 1.0
    bm25: float = 1.0
    regions: float = 0.0
    k: int = 60  # of reciprocal rank fusion

    def __post_init__(self) -> None:
        weights = (self.dense, self.bm25, self.regions)
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            came = ",".join(f"{w:g}" for w in weights)
            raise UsageError("`weights`", came, "numbers of 0 and more, one of them above 0")

    @classmethod
    def of(cls, metadata: dict[str, Any]) -> "Fusion":
        """What was tuned for a collection, or the default."""
        tuned = metadata.get(META, {}).get("search", {})
        return cls(**{f: tuned[f] for f in ("dense", "bm25", "regions", "k") if f in tuned})


def search(
    store: Store,
    student: Student,
    *,
    text: str | None = None,
    image: images.Picture | None = None,
    like: Sequence[Example] = (),
    unlike: Sequence[Example] = (),
    minus: str | None = None,
    mode: str = "dense",
    where: Sequence[Condition | str] = (),
    limit: int = 10,
    candidates: int = 100,
    fusion: Fusion | None = None,
    diversity: float = 0.0,
    explain: bool = False,
    exclude: Sequence[str] = (),
    min_probability: float | None = None,
) -> list[Hit]:
    """Pictures for a text, a picture, examples, or all of them together (`examples.query_vector`).

    Args:
        image: A path, URI, bytes or PIL image.
        like: More like these: pictures of the collection by key or id, others as Path, bytes or PIL image.
            Pictures of the collection are not found again.
        unlike: Less like these.
        minus: A text of what is not wanted.
        mode: `dense`: nearest whole pictures. `regions`: their best regions decide (MaxSim over
            `candidates`). `hybrid`: dense, BM25 over captions and (where it has a weight) regions, fused by
            weighted RRF; a picture has no words, so hybrid with a picture alone is refused.
        where: Conditions that must all hold, as `parse_filter` reads them.
        fusion: Of hybrid; default: what `dclip-qdrant tune` left in the collection.
        diversity: 0 to 1: maximal marginal relevance among the candidates (Carbonell & Goldstein 1998); 0
            leaves the order alone.
        explain: Fills `Hit.ranks`; costs a query a stage.
        exclude: Ids of points that are never found.
        min_probability: 0 to 1: leaves out hits of a lower `Hit.probability`, so that a text that the
            collection has nothing for finds nothing. For texts in mode dense, after `tune`.

    Raises:
        UsageError: no query, hybrid without text, an example that isn't there, `min_probability` where there
            is none. MismatchError: another student filled the collection. ImageError: a picture that can't be
            read. StoreError.
    """
    wanted = Wanted(text, image, like, unlike, minus)
    wanted.check()
    _check(text, mode, limit, diversity)
    metadata = store.metadata(max_age=REMEMBERED)
    if not metadata and not store.exists():
        store.describe()  # raises, and names the collections there are
    check_student(metadata, student, store.name)
    relevance = Relevance.of(metadata) if mode == "dense" and wanted.is_text_alone else None
    if min_probability is not None:
        _check_probability(min_probability, relevance, store, mode, wanted)
    vector, examples = query_vector(store, student, wanted)
    fusion = fusion or Fusion.of(metadata)
    hybrid, by_regions = mode == "hybrid", mode == "regions"
    query = Query(
        limit=limit,
        vector=vector,
        text=text if hybrid else None,
        rescore=vector[None] if by_regions else None,
        weights=(fusion.dense, fusion.bm25, fusion.regions) if hybrid else (1.0, 0.0, 0.0),
        rrf_k=fusion.k,
        candidates=max(candidates, limit),
        where=tuple(parse_filter(c) if isinstance(c, str) else c for c in where),
        with_regions=by_regions or (hybrid and fusion.regions > 0),
        exclude=(*exclude, *examples),
    )

    def ask() -> list[ScoredPoint]:
        if diversity > 0:
            return _diverse_points(store, query, diversity)
        points = store.query(replace(query, limit=limit + 1))
        if len(points) > limit and round(points[limit - 1].score - points[limit].score, SAME) == 0:
            points = store.query(replace(query, limit=limit + TIES))  # equals at the end have an order, too
        return _ties_by_id(points)[:limit]

    points = _asked_of_the_same(store, student, ask)
    if not points:
        _say_what_filters_miss(store, query.where)
    if query.with_regions and points and not any(_has_regions(point) for point in points):
        # the order would be the dense one under another name
        came = f"{store.name} has no regions: the pictures found were ingested whole"
        raise UsageError(f"`mode` {mode}", came, do="ingest with a `detector`, or search with `mode` dense")
    if hybrid and points and not _has_captions(store, points):
        came = f"none of the pictures in {store.name} that were looked at has a caption"
        do = "ingest with captions beside the pictures, or search with `mode` dense"
        raise UsageError("`mode` hybrid", came, do=do)
    stages = _stages(store, query) if explain else None
    hits = []
    for point in points:
        ranks = {name: order.get(point.id) for name, order in stages.items()} if stages is not None else None
        region = _best_region(point.regions, vector)
        probability = relevance.probability(point.score) if relevance is not None else None
        if min_probability is None or (probability or 0.0) >= min_probability:
            hits.append(Hit(point.id, point.score, point.payload, region, ranks, probability))
    return hits


def _check_probability(
    least: float, relevance: Relevance | None, store: Store, mode: str, wanted: Wanted
) -> None:
    """Raises UsageError where there is no probability to compare with."""
    if not 0 <= least <= 1:
        raise UsageError("`min_probability`", str(least), "0 to 1")
    if mode != "dense" or not wanted.is_text_alone:
        came = f"`mode` {mode}" if mode != "dense" else "pictures or examples"
        expected = "a text and `mode` dense: it is learned from their cosines"
        raise UsageError("`min_probability`", came, expected)
    if relevance is None:
        came = f"{store.name} doesn't know how near is near enough"
        raise UsageError("`min_probability`", came, "a tuned collection", "dclip-qdrant tune")


def _asked_of_the_same(
    store: Store, student: Student, ask: Callable[[], list[ScoredPoint]]
) -> list[ScoredPoint]:
    """What is found, once it is sure that this student filled what was asked. The collection's metadata may
    be REMEMBERED from before an alias was moved: points know their student themselves, so that a query costs
    one call."""
    try:
        points = ask()
    except PointError:  # such as vectors of another width
        check_student(store.metadata(), student, store.name)
        points = ask()
    if not points or any(p.payload.get("student") != student.model_name for p in points):
        check_student(store.metadata(), student, store.name)
    return points


def _ties_by_id(points: list[ScoredPoint]) -> list[ScoredPoint]:
    """Points of the same score in the order of their ids: engines, shards and copies of a collection have
    orders of their own, and ranks fused are often equal."""
    return sorted(points, key=lambda p: (-round(p.score, SAME), p.id))


def _say_what_filters_miss(store: Store, where: Sequence[Condition]) -> None:
    """Warns of filters on a field that no picture has: a typo finds nothing, too."""
    if not where:
        return
    payloads = [point.payload for point in islice(store.scroll(), LOOKED_AT)]
    fields = {name for payload in payloads for name, value in payload.items() if value not in (None, [], "")}
    for name in {re.split(r"[.\[]", c.key)[0] for c in where} - fields:
        came = f"{store.name}: none of its first {len(payloads):,} pictures has {name!r}"
        if name in ("labels", "boxes", "scores"):
            logger.warning("%s: regions are found by a detector (ingest again with one)", came)
        elif payloads:
            logger.warning("%s; they have %s", came, ", ".join(sorted(fields)))


def _check(text: str | None, mode: str, limit: int, diversity: float) -> None:
    """Raises UsageError for what can't be meant."""
    if mode not in MODES:
        raise UsageError("`mode`", repr(mode), ", ".join(MODES))
    if mode == "hybrid" and text is None:
        raise UsageError("`mode` hybrid", "a picture", "a text: BM25 needs words", "`mode` dense or regions")
    if limit < 1:
        raise UsageError("`limit`", str(limit), "1 or more")
    if not 0 <= diversity <= 1:
        raise UsageError("`diversity`", str(diversity), "0 to 1")


def _has_regions(point: ScoredPoint) -> bool:
    """Whether regions were looked for in this picture: its vectors are its own and theirs. A detector may
    have found none."""
    return bool(point.payload.get("detector")) or (point.regions is not None and len(point.regions) > 1)


def _has_captions(store: Store, points: Sequence[ScoredPoint]) -> bool:
    """Whether there are words that hybrid search could have found; looks further only where what was found
    has none."""
    if any(point.payload.get("caption") for point in points):
        return True
    return any(point.payload.get("caption") for point in islice(store.scroll(), LOOKED_AT))


def _diverse_points(store: Store, query: Query, diversity: float) -> list[ScoredPoint]:
    """Maximal marginal relevance, relevance scaled to 0..1 over the candidates: cosines between texts and
    pictures spread far less than those between pictures. The engine's own where it can be asked for: its
    weight then makes up for the scale."""
    by_vector_alone = query.text is None and query.rescore is None and query.weights[1:] == (0.0, 0.0)
    if by_vector_alone:
        bare = replace(query, limit=query.candidates, with_payload=False)
        scores = np.array([point.score for point in store.query(bare)])
        if len(scores) == 0:
            return []
        return store.query(replace(query, mmr=_weight(scores, diversity)))
    points = store.query(replace(query, limit=query.candidates, with_image=True))
    if not points:
        return []
    vectors = np.stack([p.image for p in points if p.image is not None])
    scores = np.array([p.score for p in points])
    return [points[i] for i in mmr(vectors, scores, query.limit, _weight(scores, diversity))]


def _weight(scores: np.ndarray, diversity: float) -> float:
    """Of relevance in MMR over plain scores, so that it chooses as MMR over scores scaled to 0..1 does with 1
    - diversity."""
    spread = float(np.ptp(scores))
    return (1 - diversity) / (1 - diversity + diversity * spread) if spread > 0 else 1 - diversity


def _stages(store: Store, query: Query) -> dict[str, dict[str, int]]:
    """Ranks of the candidates in each stage that the query has."""
    alone = {"dense": (1.0, 0.0, 0.0)}
    if query.text is not None:
        alone["bm25"] = (0.0, 1.0, 0.0)
    if query.rescore is not None or query.weights[2] > 0:
        alone["regions"] = (0.0, 0.0, 1.0)
    out = {}
    for name, weights in alone.items():
        points = store.query(
            replace(
                query,
                weights=weights,
                rescore=None,
                limit=query.candidates,
                with_regions=False,
                with_payload=False,
            )
        )
        out[name] = {h.id: rank for rank, h in enumerate(points, 1)}
    return out


def _best_region(regions: np.ndarray | None, vector: np.ndarray) -> int | None:
    """Which box matched: the argmax of MaxSim, computed again here because engines don't say. Row 0 is the
    whole picture."""
    if regions is None or len(regions) < 2:
        return None
    width = regions.shape[1]
    if width > len(vector):  # an example's vector, where regions are stored longer than pictures
        return None
    best = int(np.argmax(regions @ (vector if width == len(vector) else shorten(vector, width))))
    return best - 1 if best > 0 else None
