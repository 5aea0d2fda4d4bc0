"""Queries: text or picture in, hits out, with the region that matched."""

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from dclip_qdrant.collection import META, check_student
from dclip_qdrant.errors import UsageError
from dclip_qdrant.stores import Condition, Query, Store
from dclip_qdrant.student import Student

MODES = ("dense", "regions", "hybrid")


@dataclass(frozen=True)
class Found:
    """One hit. `region` is the index of the box that matched best, None when the whole picture did (or regions weren't asked)."""

    id: str
    score: float
    payload: dict[str, Any]
    region: int | None = None
    ranks: dict[str, int | None] | None = None  # with explain: its rank in each stage, from 1; None where the stage didn't have it

    @property
    def box(self) -> list[float] | None:
        return self.payload["boxes"][self.region] if self.region is not None else None

    @property
    def label(self) -> str | None:
        return self.payload["labels"][self.region] if self.region is not None else None

    def row(self) -> dict[str, Any]:
        """For JSON: what a caller can't look up without the collection."""
        out = {"id": self.id, "score": self.score} | {
            k: self.payload.get(k) for k in ("key", "uri", "caption", "labels", "width", "height")
        }
        if self.region is not None:
            out["region"] = {"box": self.box, "label": self.label}
        return out | ({"ranks": self.ranks} if self.ranks is not None else {})


def parse_filter(text: str) -> Condition:
    """`label=dog`, `labels=dog|cat` (any), `labels!=cat`, `caption~red ball` (all words), `width>=640`.

    Raises:
        UsageError: anything else.
    """
    m = re.fullmatch(r"\s*([\w.\[\]-]+)\s*(!=|>=|<=|=|~|>|<)\s*(.+?)\s*", text)
    if not m:
        raise UsageError("--filter", repr(text), "key=value, key=a|b, key!=value, key~words, key>=number")
    key, op, value = m.groups()
    if op in (">=", "<=", ">", "<"):
        try:
            return Condition(key, op, (float(value),))
        except ValueError:
            raise UsageError("--filter", repr(text), f"a number after {op}") from None
    return Condition(key, op, (value,) if op == "~" else tuple(_value(v) for v in value.split("|")))


def _value(text: str) -> Any:
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if re.fullmatch(r"-?\d+\.\d+", text):
        return float(text)
    return {"true": True, "false": False}.get(text, text.strip("\"'"))


@dataclass(frozen=True)
class Fusion:
    """How hybrid search weighs its sources. `tune.py` finds it on the user's pairs; a collection's metadata remembers it."""

    dense: float = 1.0
    bm25: float = 1.0
    regions: float = 0.0
    k: int = 60  # of reciprocal rank fusion

    @classmethod
    def of(cls, metadata: dict[str, Any]) -> "Fusion":
        """What was tuned for a collection, or the default."""
        said = metadata.get(META, {}).get("search", {})
        return cls(**{f: said[f] for f in ("dense", "bm25", "regions", "k") if f in said})


def search(
    store: Store,
    student: Student,
    *,
    text: str | None = None,
    image: Image.Image | None = None,
    mode: str = "dense",
    where: tuple[Condition, ...] = (),
    limit: int = 10,
    candidates: int = 100,
    fusion: Fusion | None = None,
    diversity: float = 0.0,
    explain: bool = False,
    exclude: tuple[str, ...] = (),
) -> list[Found]:
    """Pictures for a text or a picture.

    Args:
        mode: `dense`: nearest whole pictures. `regions`: their best regions decide (MaxSim over `candidates`). `hybrid`: dense, BM25 over captions
            and (where it has a weight) regions, fused by weighted RRF; a picture has no words, so hybrid with a picture alone is refused.
        fusion: Of hybrid; default: what `dclip-qdrant tune` left in the collection.
        diversity: 0 to 1: maximal marginal relevance among the candidates (Carbonell & Goldstein 1998); 0 leaves the order alone.
        explain: Fills `Found.ranks`; costs a query a stage.

    Raises:
        UsageError: no query or two of them, hybrid without text. MismatchError: another student filled the collection. StoreError.
    """
    if (text is None) == (image is None):
        raise UsageError("query", "both text and a picture" if text else "nothing to search for", "a text, or --image PATH")
    if text is not None and not text.strip():
        raise UsageError("query", "an empty text", "words to search for")
    if mode not in MODES:
        raise UsageError("--mode", repr(mode), ", ".join(MODES))
    if mode == "hybrid" and text is None:
        raise UsageError("--mode hybrid", "a picture", "a text: BM25 needs words", "--mode dense or regions")
    if limit < 1:
        raise UsageError("--limit", str(limit), "1 or more")
    if not 0 <= diversity <= 1:
        raise UsageError("--diversity", str(diversity), "0 to 1")
    metadata = store.metadata()
    if not metadata and not store.exists():
        store.describe()  # raises, and names the collections there are
    check_student(metadata, student, store.name)
    vector = student.embed_texts([text])[0] if text is not None else student.embed_images([image])[0]
    f = fusion or Fusion.of(metadata)
    query = Query(
        limit=limit, vector=vector, text=text if mode == "hybrid" else None, rescore=vector[None] if mode == "regions" else None,
        weights=(f.dense, f.bm25, f.regions) if mode == "hybrid" else (1.0, 0.0, 0.0), rrf_k=f.k,
        candidates=max(candidates, limit), where=where, with_regions=mode == "regions" or (mode == "hybrid" and f.regions > 0), exclude=exclude,
    )  # fmt: skip
    if diversity > 0:
        hits = store.query(replace(query, limit=query.candidates, with_image=True))
        hits = (
            [hits[i] for i in _diverse(np.stack([h.image for h in hits]), np.array([h.score for h in hits]), limit, diversity)]
            if hits
            else []
        )
    else:
        hits = store.query(query)
    stages = _stages(store, query) if explain else None
    ranks = lambda i: {name: order.get(i) for name, order in stages.items()} if stages is not None else None
    return [Found(h.id, h.score, h.payload, _best_region(h.regions, vector), ranks(h.id)) for h in hits]


def _stages(store: Store, query: Query) -> dict[str, dict[str, int]]:
    """Ranks of the candidates in each stage that the query has."""
    alone = {"dense": (1.0, 0.0, 0.0)}
    if query.text is not None:
        alone["bm25"] = (0.0, 1.0, 0.0)
    if query.rescore is not None or query.weights[2] > 0:
        alone["regions"] = (0.0, 0.0, 1.0)
    out = {}
    for name, weights in alone.items():
        found = store.query(replace(query, weights=weights, rescore=None, limit=query.candidates, with_regions=False, with_payload=False))
        out[name] = {h.id: rank for rank, h in enumerate(found, 1)}
    return out


def _diverse(vectors: np.ndarray, scores: np.ndarray, limit: int, diversity: float) -> list[int]:
    """Greedy MMR: (1 - diversity) x relevance - diversity x likeness to what is chosen already. vectors [N, D] unit rows; relevance is the score
    scaled to 0..1, because RRF's and cosine's differ by an order of magnitude."""
    spread = np.ptp(scores)
    relevance = (scores - scores.min()) / spread if spread > 0 else np.ones(len(scores))
    alike = vectors @ vectors.T
    chosen: list[int] = []
    nearest = np.zeros(len(scores))
    left = set(range(len(scores)))
    while left and len(chosen) < limit:
        best = max(left, key=lambda i: ((1 - diversity) * relevance[i] - diversity * nearest[i], -i))
        chosen.append(best)
        left.remove(best)
        nearest = np.maximum(nearest, alike[best])
    return chosen


def _best_region(regions: np.ndarray | None, vector: np.ndarray) -> int | None:
    """Which box matched: the argmax of MaxSim, computed again here because engines don't say. Row 0 is the whole picture."""
    if regions is None or len(regions) < 2:
        return None
    best = int(np.argmax(regions @ vector))
    return best - 1 if best > 0 else None
