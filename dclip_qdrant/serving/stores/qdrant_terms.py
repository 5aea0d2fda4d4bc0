"""What requests to Qdrant are made of: names, filters, sparse words, quantisers."""

from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

from qdrant_client import models as m

from dclip_qdrant.lookup import need
from dclip_qdrant.serving.collection import TextSpec
from dclip_qdrant.serving.stores.base import EXACT, Condition, Payload, readings

SPARSE = "bm25"
OWN_FIELDS = frozenset(
    [
        "key",
        "uri",
        "content_hash",
        "file_state",
        "caption",
        "width",
        "height",
        "boxes",
        "scores",
        "labels",
        "detector",
        "student",
        "split",
    ]
)
BOUNDS = {">=": "gte", "<=": "lte", ">": "gt", "<": "lt"}
QUANTISED = {
    "int8": lambda: m.ScalarQuantization(
        scalar=m.ScalarQuantizationConfig(type=m.ScalarType.INT8, quantile=0.99, always_ram=True)
    ),
    "turbo4": lambda: m.TurboQuantization(
        turbo=m.TurboQuantQuantizationConfig(bits=m.TurboQuantBitSize.BITS4, always_ram=True)
    ),
    "turbo2": lambda: m.TurboQuantization(
        turbo=m.TurboQuantQuantizationConfig(bits=m.TurboQuantBitSize.BITS2, always_ram=True)
    ),
    "binary": lambda: m.BinaryQuantization(binary=m.BinaryQuantizationConfig(always_ram=True)),
}


@dataclass(frozen=True)
class Names:
    """What our vectors and payload are called in a collection: their plain names in one of ours, under a mark
    in one that was there before us."""

    mark: str = ""

    def vector(self, name: str) -> str:
        return f"{self.mark}_{name}" if self.mark else name

    def field(self, key: str) -> str:
        """A payload key in a filter: ours are nested."""
        return f"{self.mark}.{key}" if self.mark and key.split("[")[0] in OWN_FIELDS else key

    def payload(self, stored: Payload | None) -> Payload:
        """A stored payload as the rest of the product reads it."""
        payload = dict(stored or {})
        return payload | payload.pop(self.mark, {}) if self.mark else payload

    def vectors(self, stored: Any) -> dict[str, Any]:
        """Stored vectors under their plain names."""
        if not isinstance(stored, dict):
            return {}
        return {k: stored[self.vector(k)] for k in ("image", "regions") if self.vector(k) in stored}


def sent_id(text: str) -> int | str:
    """A point's id as the API takes it: one of digits is a number there."""
    return int(text) if text.isdigit() else text


def bm25(text: str, words: TextSpec, *, document: bool = False) -> m.SparseVector:
    model = _bm25_model(words.model_dump_json())
    v = model.embed_document(text) if document else model.embed_query(text)
    return m.SparseVector(indices=list(v.indices), values=list(v.values))


@cache
def _bm25_model(words: str) -> Any:
    need("qdrant_edge", "BM25 on an older Qdrant server")
    import qdrant_edge

    from dclip_qdrant.serving.stores.edge_words import words_options

    return qdrant_edge.Bm25(qdrant_edge.Bm25Config(**words_options(TextSpec.model_validate_json(words))))


def conditions(where: tuple[Condition, ...], exclude: tuple[str, ...]) -> m.Filter | None:
    """Conditions, all of which must hold, as Qdrant's filter; points of `exclude` never match."""
    must: list[Any] = []
    must_not: list[Any] = []
    for c in where:
        if c.op in ("=", "!="):
            each: list[Any] = [_equals(c.key, value) for value in c.values]
            condition = each[0] if len(each) == 1 else m.Filter(should=each)
            (must if c.op == "=" else must_not).append(condition)
        elif c.op == "~":
            texts = readings(str(c.values[0]))
            each = [m.FieldCondition(key=c.key, match=m.MatchText(text=text)) for text in texts]
            must.append(each[0] if len(each) == 1 else m.Filter(should=each))
        else:
            bound: dict[str, Any] = {BOUNDS[c.op]: c.values[0]}
            among = m.DatetimeRange if isinstance(c.values[0], datetime) else m.Range
            must.append(m.FieldCondition(key=c.key, range=among(**bound)))
    if exclude:
        must_not.append(m.HasIdCondition(has_id=[sent_id(i) for i in exclude]))
    return m.Filter(must=must or None, must_not=must_not or None) if must or must_not else None


def _equals(key: str, value: Any) -> m.FieldCondition:
    # an exact match is for words, booleans and numbers that are stored as whole ones; 10 is also 10.0
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < EXACT:
        return m.FieldCondition(key=key, range=m.Range(gte=float(value), lte=float(value)))
    whole: Any = value
    return m.FieldCondition(key=key, match=m.MatchValue(value=whole))
