"""Finds hybrid search's weights on the user's own pairs: chosen on one half of the pictures, measured on the other."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import numpy as np

from dclip_qdrant.collection import META, check_student
from dclip_qdrant.golden import Golden, Scores, by_picture
from dclip_qdrant.metrics import paired_difference
from dclip_qdrant.search import Fusion
from dclip_qdrant.stores import Query, Store
from dclip_qdrant.student import Student

WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)  # of BM25 and of regions; dense has 1
KS = (2, 10, 60)  # RRF's k: small trusts the first ranks, 60 is Qdrant's default
CANDIDATES = 100


def tune(store: Store, student: Student, golden: Golden, *, say: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
    """The best Fusion and what it is worth, stored in the collection's metadata, where search finds it.

    Raises:
        MismatchError: another student filled the collection.
    """
    metadata = store.metadata()
    check_student(metadata, student, store.name)
    lists = [_lists(store, vector, text) for vector, text in _asked(student, golden, say)]
    has_regions = any(r for _, _, r in lists)
    candidates = Candidates.of(lists, golden.right)
    choose, measure = (np.isin(golden.picture, half.picture) for half in golden.halves())
    scores = {f: candidates.scores(f) for f in _grid(regions=has_regions)}
    # the plainest of those within a hair of the best: fewer sources, then weights nearest to even
    value = {f: float(s.together[choose].mean()) for f, s in scores.items()}
    top = max(value.values())
    best = min(
        (f for f in value if value[f] >= top - 1e-9),
        key=lambda f: ((f.bm25 > 0) + (f.regions > 0), abs(f.bm25 - 1) + abs(f.regions - 1), -f.k),
    )
    rest = golden.take(np.flatnonzero(measure).tolist())
    alone = {"dense": Fusion(1, 0, 0), "bm25": Fusion(0, 1, 0), "regions": Fusion(0, 0, 1), "untuned": Fusion()}
    compared, rows = [], {"tuned": _part(scores[best], measure).row()}
    for name, f in alone.items():
        if f.regions and not has_regions:
            continue
        theirs = _part(scores.get(f) or candidates.scores(f), measure)
        rows[name] = theirs.row()
        compared.append(
            {"than": name} | paired_difference(by_picture(theirs.together, rest), by_picture(_part(scores[best], measure).together, rest))
        )
    result = {"dense": best.dense, "bm25": best.bm25, "regions": best.regions, "k": best.k, "queries": {"chosen_on": int(choose.sum()), "measured_on": int(measure.sum()),
              "left_out": golden.left_out}, "rows": rows, "compared": compared, "golden": golden.fingerprint}  # fmt: skip
    store.set_metadata(metadata | {META: metadata[META] | {"search": result}})
    return result


def _asked(student: Student, golden: Golden, say: Callable[[int], None]) -> Any:
    for start in range(0, len(golden), 64):
        texts = golden.texts[start : start + 64]
        yield from zip(student.embed_texts(texts), texts, strict=True)
        say(min(start + 64, len(golden)))


def _lists(store: Store, vector: np.ndarray, text: str) -> tuple[list[str], list[str], list[str]]:
    """Candidates of each source, best first; every fusion is then arithmetic."""
    one = lambda *weights, **how: [
        h.id for h in store.query(Query(limit=CANDIDATES, candidates=CANDIDATES, weights=weights, with_payload=False, **how))
    ]
    return one(1.0, 0.0, 0.0, vector=vector), one(0.0, 1.0, 0.0, text=text), one(0.0, 0.0, 1.0, vector=vector)


def _grid(*, regions: bool) -> list[Fusion]:
    out = [Fusion(1.0, b, r, k) for b, r, k in product(WEIGHTS, WEIGHTS if regions else (0.0,), KS) if b or r or k == 60]
    return [*out, Fusion(0.0, 1.0, 0.0)]


@dataclass(frozen=True)
class Candidates:
    """Everything that the sources found for Q queries, at most U things each: what every fusion is computed from at once.

    ranks [3, Q, U]: from 0, infinity where a source didn't have it; right [Q, U].
    """

    ranks: np.ndarray
    right: np.ndarray

    @classmethod
    def of(cls, lists: list[tuple[list[str], list[str], list[str]]], right: list[set[str]]) -> "Candidates":
        each = [list(dict.fromkeys(chain(*found))) for found in lists]  # in the order in which `rrf` meets them: that breaks ties
        shape = (len(lists), max(1, *(len(ids) for ids in each)))
        ranks, good = np.full((3, *shape), np.inf), np.zeros(shape, bool)
        for n, (ids, found) in enumerate(zip(each, lists, strict=True)):
            place = {i: u for u, i in enumerate(ids)}
            for source, one in enumerate(found):
                ranks[source, n, [place[i] for i in one]] = np.arange(len(one))
            good[n, : len(ids)] = [i in right[n] for i in ids]
        return cls(ranks, good)

    def scores(self, f: Fusion) -> Scores:
        """As searching with this fusion would score."""
        weights = (f.dense, f.bm25, f.regions)
        total = sum(1.0 / ((r + 1) / w + f.k - 1) for r, w in zip(self.ranks, weights, strict=True) if w > 0)  # stores.rrf
        own = np.where(self.right, total, 0.0)
        at = own.argmax(1)
        best = own[np.arange(len(own)), at][:, None]
        before = (total > best) | ((total == best) & (np.arange(total.shape[1]) < at[:, None]))
        return Scores.of_ranks(np.where(best[:, 0] > 0, before.sum(1) + 1.0, np.inf))


def _part(s: Scores, where: np.ndarray) -> Scores:
    return Scores(s.r1[where], s.r5[where], s.r10[where], s.rr[where])


def describe(result: dict[str, Any]) -> str:
    """For a person."""
    q = result["queries"]
    lines = [f"dense {result['dense']:g}, BM25 {result['bm25']:g}, regions {result['regions']:g}, k {result['k']}: chosen on {q['chosen_on']:,} queries, measured on {q['measured_on']:,} others"
             + (f" ({q['left_out']:,} left out: they stand in the collection word for word)" if q["left_out"] else "")]  # fmt: skip
    lines += [
        f"  {name:<8} R@1 {r['r@1'] * 100:5.1f}  R@5 {r['r@5'] * 100:5.1f}  R@10 {r['r@10'] * 100:5.1f}  MRR@10 {r['mrr@10'] * 100:5.1f}"
        for name, r in result["rows"].items()
    ]
    lines += [
        f"  tuned minus {c['than']}, mean of R@1, 5, 10: {c['difference'] * 100:+.1f} points, 95% [{c['ci'][0] * 100:+.1f}, {c['ci'][1] * 100:+.1f}]"
        for c in result["compared"]
    ]
    return "\n".join(lines)
