"""Queries: text or picture in, hits out, with the region that matched."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from dclip_qdrant.collection import check_student
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
        return out | ({"region": {"box": self.box, "label": self.label}} if self.region is not None else {})


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
    weights: tuple[float, float] = (1.0, 1.0),
    exclude: tuple[str, ...] = (),
) -> list[Found]:
    """`dense`: nearest whole pictures. `regions`: their best regions decide (MaxSim over `candidates`). `hybrid`: dense and BM25 over captions, fused by
    weighted RRF; a picture has no words, so hybrid with a picture alone is refused.

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
    if not store.exists():
        store.describe()  # raises, and names the collections there are
    check_student(store.metadata(), student, store.name)
    vector = student.embed_texts([text])[0] if text is not None else student.embed_images([image])[0]
    hits = store.query(Query(
        limit=limit, vector=vector, text=text if mode == "hybrid" else None, rescore=vector[None] if mode == "regions" else None, weights=weights,
        candidates=max(candidates, limit), where=where, with_regions=mode == "regions", exclude=exclude,
    ))  # fmt: skip
    return [Found(h.id, h.score, h.payload, _best_region(h.regions, vector)) for h in hits]


def _best_region(regions: np.ndarray | None, vector: np.ndarray) -> int | None:
    """Which box matched: the argmax of MaxSim, computed again here because engines don't say. Row 0 is the whole picture."""
    if regions is None or len(regions) < 2:
        return None
    best = int(np.argmax(regions @ vector))
    return best - 1 if best > 0 else None
