"""What requests to Qdrant are made of: names, filters, sparse words, quantisers."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from qdrant_client import models as m

from dclip_qdrant.lookup import need
from dclip_qdrant.stores import Condition

SPARSE = "bm25"
OURS = frozenset(("key", "uri", "content_hash", "caption", "width", "height", "boxes", "scores", "labels", "detector", "student", "split"))
QUANTISED = {
    "int8": lambda: m.ScalarQuantization(scalar=m.ScalarQuantizationConfig(type=m.ScalarType.INT8, quantile=0.99, always_ram=True)),
    "turbo4": lambda: m.TurboQuantization(turbo=m.TurboQuantQuantizationConfig(bits=m.TurboQuantBitSize.BITS4, always_ram=True)),
    "turbo2": lambda: m.TurboQuantization(turbo=m.TurboQuantQuantizationConfig(bits=m.TurboQuantBitSize.BITS2, always_ram=True)),
    "binary": lambda: m.BinaryQuantization(binary=m.BinaryQuantizationConfig(always_ram=True)),
}


@dataclass(frozen=True)
class Names:
    """What our vectors and payload are called in a collection: their plain names in one of ours, under a mark in one that was there before us."""

    mark: str = ""

    def vector(self, name: str) -> str:
        return f"{self.mark}_{name}" if self.mark else name

    def field(self, key: str) -> str:
        """A payload key in a filter: ours are nested."""
        return f"{self.mark}.{key}" if self.mark and key.split("[")[0] in OURS else key

    def payload(self, found: dict[str, Any] | None) -> dict[str, Any]:
        """A stored payload as the rest of the product reads it."""
        found = dict(found or {})
        return found | found.pop(self.mark, {}) if self.mark else found

    def vectors(self, found: Any) -> dict[str, Any]:
        return {k: found[self.vector(k)] for k in ("image", "regions") if self.vector(k) in found} if isinstance(found, dict) else {}


def sent_id(text: str) -> int | str:
    """A point's id as the API takes it: one of digits is a number there."""
    return int(text) if text.isdigit() else text


def bm25(text: str, *, document: bool = False) -> m.SparseVector:
    model = _bm25_model()
    v = model.embed_document(text) if document else model.embed_query(text)
    return m.SparseVector(indices=list(v.indices), values=list(v.values))


@cache
def _bm25_model() -> Any:
    need("qdrant_edge", "BM25 on an older Qdrant server")
    import qdrant_edge

    return qdrant_edge.Bm25()


def conditions(where: tuple[Condition, ...], exclude: tuple[str, ...]) -> m.Filter | None:
    must: list[Any] = []
    must_not: list[Any] = []
    for c in where:
        if c.op in ("=", "!="):
            any_of = [
                m.FieldCondition(key=c.key, match=m.MatchValue(value=v))
                if not isinstance(v, float)
                else m.FieldCondition(key=c.key, range=m.Range(gte=v, lte=v))
                for v in c.values
            ]
            (must if c.op == "=" else must_not).append(any_of[0] if len(any_of) == 1 else m.Filter(should=any_of))
        elif c.op == "~":
            must.append(m.FieldCondition(key=c.key, match=m.MatchText(text=str(c.values[0]))))
        else:
            bound = {">=": "gte", "<=": "lte", ">": "gt", "<": "lt"}[c.op]
            must.append(m.FieldCondition(key=c.key, range=m.Range(**{bound: float(c.values[0])})))
    if exclude:
        must_not.append(m.HasIdCondition(has_id=[sent_id(i) for i in exclude]))
    return m.Filter(must=must or None, must_not=must_not or None) if must or must_not else None
