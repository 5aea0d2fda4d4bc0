"""Finds hybrid search's weights, and from which cosine on something was found, on the user's own pairs:
chosen on one half of the pictures, measured on the other."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain, product
from typing import Any

import numpy as np

from dclip_qdrant.errors import UsageError
from dclip_qdrant.metrics import paired_difference
from dclip_qdrant.serving import relevance
from dclip_qdrant.serving.collection import META, check_student
from dclip_qdrant.serving.golden import Golden, Scores, by_picture
from dclip_qdrant.serving.relevance import Calibration, calibrate
from dclip_qdrant.serving.search import Fusion
from dclip_qdrant.serving.stores import Query, Store
from dclip_qdrant.serving.student import Student

WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)  # of BM25 and of regions; dense has 1
KS = (2, 10, 60)  # RRF's k: small trusts the first ranks, 60 is Qdrant's default
CANDIDATES = 100


@dataclass(frozen=True)
class Versus:
    """Tuned minus another way to search, in the mean of recall at 1, 5 and 10; `ci` is its 95% interval."""

    than: str
    difference: float
    ci: tuple[float, float]


@dataclass(frozen=True)
class Tuning:
    """The fusion that was chosen, on how many queries, and what it and the others reach on the rest."""

    fusion: Fusion
    chosen_on: int
    measured_on: int
    left_out: int  # queries that stand in the collection word for word
    figures: dict[str, dict[str, float]]  # tuned, dense, ... -> r@1, r@5, r@10, mrr@10
    versus: list[Versus]
    golden: str  # fingerprint of the queries
    calibration: Calibration | None = None  # None: too few queries for one
    not_calibrated: str = ""  # why

    def row(self) -> dict[str, Any]:
        """What the collection's metadata keeps."""
        return asdict(self.fusion) | {
            "queries": {
                "chosen_on": self.chosen_on,
                "measured_on": self.measured_on,
                "left_out": self.left_out,
            },
            "rows": self.figures,
            "compared": [asdict(v) for v in self.versus],
            "golden": self.golden,
        }


def tune(
    store: Store,
    student: Student,
    golden: Golden,
    *,
    off_topic: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Tuning:
    """The best Fusion and what it is worth, and the probability that something was found (`relevance.py`),
    stored in the collection's metadata, where search finds them.

    Args:
        off_topic: A file of texts that the collection has nothing for, one a line. None: ours.

    Raises:
        MismatchError: another student filled the collection. UsageError: an `off_topic` of a few lines.
    """
    metadata = store.metadata()
    check_student(metadata, student, store.name)
    lists = [_lists(store, vector, text) for vector, text in _asked(student, golden, progress)]
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
    alone = {
        "dense": Fusion(1, 0, 0),
        "bm25": Fusion(0, 1, 0),
        "regions": Fusion(0, 0, 1),
        "untuned": Fusion(),
    }
    tuned = _part(scores[best], measure)
    versus, figures = [], {"tuned": tuned.row()}
    for name, f in alone.items():
        if f.regions and not has_regions:
            continue
        theirs = _part(scores.get(f) or candidates.scores(f), measure)
        figures[name] = theirs.row()
        gain = paired_difference(by_picture(theirs.together, rest), by_picture(tuned.together, rest))
        low, high = gain["ci"]
        versus.append(Versus(name, gain["difference"], (low, high)))
    calibration, why = None, ""
    try:
        calibration = calibrate(store, student, golden, off_topic)
    except UsageError as e:  # too few golden queries
        if off_topic is not None:
            raise
        why = e.came
    tuning = Tuning(
        best,
        chosen_on=int(choose.sum()),
        measured_on=int(measure.sum()),
        left_out=golden.left_out,
        figures=figures,
        versus=versus,
        golden=golden.fingerprint,
        calibration=calibration,
        not_calibrated=why,
    )
    learned: dict[str, Any] = {"search": tuning.row(), "relevance": calibration and calibration.row()}
    store.set_metadata(metadata | {META: metadata[META] | learned})
    return tuning


def _asked(student: Student, golden: Golden, progress: Callable[[int], None]) -> Any:
    for start in range(0, len(golden), 64):
        texts = golden.texts[start : start + 64]
        yield from zip(student.embed_texts(texts), texts, strict=True)
        progress(min(start + 64, len(golden)))


def _lists(store: Store, vector: np.ndarray, text: str) -> tuple[list[str], list[str], list[str]]:
    """Candidates of each source, best first; every fusion is then arithmetic."""

    def ask(weights: tuple[float, float, float], **of: Any) -> list[str]:
        query = Query(limit=CANDIDATES, candidates=CANDIDATES, weights=weights, with_payload=False, **of)
        return [hit.id for hit in store.query(query)]

    dense = ask((1.0, 0.0, 0.0), vector=vector)
    bm25 = ask((0.0, 1.0, 0.0), text=text)
    return dense, bm25, ask((0.0, 0.0, 1.0), vector=vector)


def _grid(*, regions: bool) -> list[Fusion]:
    out = [
        Fusion(1.0, b, r, k)
        for b, r, k in product(WEIGHTS, WEIGHTS if regions else (0.0,), KS)
        if b or r or k == 60
    ]
    return [*out, Fusion(0.0, 1.0, 0.0)]


@dataclass(frozen=True)
class Candidates:
    """Everything that the sources found for Q queries, at most U things each: what every fusion is computed
    from at once.

    ranks [3, Q, U]: from 0, infinity where a source didn't have it; right [Q, U].
    """

    ranks: np.ndarray
    right: np.ndarray

    @classmethod
    def of(cls, lists: list[tuple[list[str], list[str], list[str]]], right: list[set[str]]) -> "Candidates":
        # in the order in which `rrf` meets them: that breaks ties
        union = [list(dict.fromkeys(chain(*of_query))) for of_query in lists]
        shape = (len(lists), max(1, *(len(ids) for ids in union)))
        ranks, good = np.full((3, *shape), np.inf), np.zeros(shape, bool)
        for n, (ids, of_query) in enumerate(zip(union, lists, strict=True)):
            place = {point: u for u, point in enumerate(ids)}
            for source, ranked in enumerate(of_query):
                ranks[source, n, [place[point] for point in ranked]] = np.arange(len(ranked))
            good[n, : len(ids)] = [point in right[n] for point in ids]
        return cls(ranks, good)

    def scores(self, f: Fusion) -> Scores:
        """As searching with this fusion would score."""
        weights = (f.dense, f.bm25, f.regions)
        parts = (1.0 / ((r + 1) / w + f.k - 1) for r, w in zip(self.ranks, weights, strict=True) if w > 0)
        total = sum(parts, np.zeros_like(self.right, float))  # as stores.rrf
        own = np.where(self.right, total, 0.0)
        at = own.argmax(1)
        best = own[np.arange(len(own)), at][:, None]
        before = (total > best) | ((total == best) & (np.arange(total.shape[1]) < at[:, None]))
        return Scores.of_ranks(np.where(best[:, 0] > 0, before.sum(1) + 1.0, np.inf))


def _part(s: Scores, where: np.ndarray) -> Scores:
    return Scores(s.r1[where], s.r5[where], s.r10[where], s.rr[where])


def describe(tuning: Tuning) -> str:
    """For a person."""
    fusion, left_out = tuning.fusion, ""
    if tuning.left_out:
        left_out = f" ({tuning.left_out:,} left out: they stand in the collection word for word)"
    lines = [
        f"dense {fusion.dense:g}, BM25 {fusion.bm25:g}, regions {fusion.regions:g}, k {fusion.k}: chosen on "
        f"{tuning.chosen_on:,} queries, measured on {tuning.measured_on:,} others{left_out}"
    ]
    lines += [
        f"  {name:<8} R@1 {r['r@1'] * 100:5.1f}  R@5 {r['r@5'] * 100:5.1f}  R@10 "
        f"{r['r@10'] * 100:5.1f}  MRR@10 {r['mrr@10'] * 100:5.1f}"
        for name, r in tuning.figures.items()
    ]
    lines += [
        f"  tuned minus {v.than}, mean of R@1, 5, 10: {v.difference * 100:+.1f} points, "
        f"95% [{v.ci[0] * 100:+.1f}, {v.ci[1] * 100:+.1f}]"
        for v in tuning.versus
    ]
    if tuning.calibration is None:
        return "\n".join([*lines, f"nothing found: not learned, {tuning.not_calibrated}"])
    return "\n".join(lines + relevance.describe(tuning.calibration))
