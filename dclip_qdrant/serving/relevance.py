"""The probability that a collection holds what a text asks for, from how near its best hit is: what "nothing
found" hangs on.

A nearest picture there always is. `tune` looks at the best hit of golden queries, whose pictures are known to
be there, and at that of off-topic queries, which have nothing to do with the collection, and fits a logistic
curve through both (Platt 1999), each kind weighing as much as the other: the probability is that of a query
which is as likely to have an answer as not. It rises with the cosine alone, so that a hit further down has a
lower one, and no hit a higher one than the best.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dclip_qdrant.errors import InputError, UsageError
from dclip_qdrant.serving.collection import META
from dclip_qdrant.serving.stores import Query, Store
from dclip_qdrant.serving.student import Student

if TYPE_CHECKING:  # reading golden pairs takes pyarrow, which a query does without
    from dclip_qdrant.serving.golden import Golden

CUTOFF = 0.5  # at and above it something was found, as far as the page and the table go
LEAST = 20  # queries of each kind, on each half
BINS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
STEPS = 50  # of Newton's method; a handful does
WORD = re.compile(r"\w{4,}")  # shorter ones are mostly articles and prepositions


@dataclass(frozen=True)
class Relevance:
    """probability = 1 / (1 + exp(-(slope x cosine + offset)))."""

    slope: float
    offset: float

    @classmethod
    def of(cls, metadata: dict[str, Any]) -> "Relevance | None":
        """What `tune` left in a collection's metadata; None where it wasn't run."""
        known = metadata.get(META, {}).get("relevance")
        return cls(known["slope"], known["offset"]) if known else None

    def probability(self, cosine: float) -> float:
        return float(_logistic(np.array(self.slope * cosine + self.offset)))


@dataclass(frozen=True)
class Bin:
    """Queries whose probability lay between `low` and `high`: what was promised and what was so, both kinds
    of queries weighing the same."""

    low: float
    high: float
    queries: int
    promised: float
    observed: float


@dataclass(frozen=True)
class Calibration:
    """The curve, and how it did on queries that it wasn't fitted on."""

    relevance: Relevance
    fitted_on: tuple[int, int]  # golden, off-topic
    measured_on: tuple[int, int]
    too_close: int  # off-topic texts of ours whose words the golden ones have, too
    answered: float  # golden queries whose best hit is at CUTOFF or above
    empty: float  # off-topic queries whose best hit is below it
    bins: list[Bin]

    @property
    def error(self) -> float:
        """Expected calibration error: the mean of |promised - observed| over queries."""
        total = sum(b.queries for b in self.bins)
        return sum(b.queries * abs(b.promised - b.observed) for b in self.bins) / max(1, total)

    def row(self) -> dict[str, Any]:
        row = asdict(self)
        return row.pop("relevance") | row | {"error": self.error}


def fit(cosines: np.ndarray, answered: np.ndarray) -> Relevance:
    """Logistic regression of `answered` [N] (bool) on the cosines [N] of best hits, both kinds of the same
    weight, with Platt's targets (N+ + 1) / (N+ + 2) and 1 / (N- + 2) in place of 1 and 0, which keep the
    curve finite where the kinds don't overlap."""
    positive, negative = int(answered.sum()), int((~answered).sum())
    target = np.where(answered, (positive + 1) / (positive + 2), 1 / (negative + 2))
    weight = np.where(answered, 0.5 / positive, 0.5 / negative)
    middle, spread = float(cosines.mean()), float(cosines.std()) or 1.0
    x = np.stack([(cosines - middle) / spread, np.ones(len(cosines))], 1)
    w = np.zeros(2)
    for _ in range(STEPS):
        p = _logistic(x @ w)
        gradient = x.T @ (weight * (p - target))
        curvature = (x * (weight * p * (1 - p))[:, None]).T @ x + 1e-9 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        w -= step * min(1.0, 5.0 / max(1e-12, float(np.abs(step).max())))  # no leap out of the flat ends
    return Relevance(float(w[0] / spread), float(w[1] - w[0] * middle / spread))


def _logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


def calibrate(
    store: Store, student: Student, golden: "Golden", off_topic: str | Path | None = None
) -> Calibration:
    """Fits the curve on one half of the queries and measures it on the other.

    Args:
        off_topic: A file of texts that the collection has nothing for, one a line. None: ours, of many
            trades, without those that share most of their words with the golden texts.

    Raises:
        UsageError: fewer than LEAST queries of a kind on a half. InputError: a file that can't be read.
    """
    texts, too_close = off_topic_texts(golden, off_topic)
    first, second = golden.halves()
    mine, rest = texts[::2], texts[1::2]
    for kind, count in (("golden", min(len(first), len(second))), ("off-topic", len(rest))):
        if count < LEAST:
            came = f"{count} {kind} queries on a half"
            raise UsageError("`golden`" if kind == "golden" else "`off_topic`", came, f"{LEAST} or more")
    relevance = fit(*_best_hits(store, student, first.texts, mine))
    cosines, answered = _best_hits(store, student, second.texts, rest)
    p = _logistic(relevance.slope * cosines + relevance.offset)
    return Calibration(
        relevance,
        (len(first), len(mine)),
        (len(second), len(rest)),
        too_close,
        float((p[answered] >= CUTOFF).mean()),
        float((p[~answered] < CUTOFF).mean()),
        bins(p, answered),
    )


def bins(p: np.ndarray, answered: np.ndarray) -> list[Bin]:
    """Promised and observed by BINS; p [N], answered [N]."""
    weight = np.where(answered, 0.5 / max(1, answered.sum()), 0.5 / max(1, (~answered).sum()))
    out = []
    for low, high in pairwise(BINS):
        inside = (p >= low) & ((p < high) | (high == BINS[-1]))
        if inside.any():
            promised = float(np.average(p[inside], weights=weight[inside]))
            observed = float(np.average(answered[inside], weights=weight[inside]))
            out.append(Bin(low, high, int(inside.sum()), promised, observed))
    return out


def _best_hits(
    store: Store, student: Student, golden: Sequence[str], off_topic: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """The cosine of each query's best hit [N], and which of the queries are golden [N]."""
    vectors = student.embed_texts([*golden, *off_topic])
    hits = [store.query(Query(limit=1, vector=vector, with_payload=False)) for vector in vectors]
    cosines = np.array([found[0].score if found else -1.0 for found in hits])
    return cosines, np.arange(len(hits)) < len(golden)


def off_topic_texts(golden: "Golden", file: str | Path | None = None) -> tuple[list[str], int]:
    """Texts that a collection has nothing for, and how many of ours were left out because the golden texts
    have most of their words."""
    if file is not None:
        try:
            own = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(file, f"can't be read: {e}", "UTF-8 text, one query a line") from e
        return [line.strip() for line in own if line.strip()], 0
    ours = files("dclip_qdrant.serving").joinpath("off_topic.txt").read_text(encoding="utf-8").splitlines()
    known = {word for text in golden.texts for word in WORD.findall(text.lower())}
    far = [text for text in ours if _share_of(text, known) <= 0.5]
    return far, len(ours) - len(far)


def _share_of(text: str, known: set[str]) -> float:
    words = WORD.findall(text.lower())
    return sum(word in known for word in words) / max(1, len(words))


def describe(calibration: Calibration) -> list[str]:
    """For a person."""
    c = calibration
    note = f" ({c.too_close} of ours left out: golden queries have their words)" if c.too_close else ""
    lines = [
        f"nothing found: fitted on {c.fitted_on[0]:,} golden and {c.fitted_on[1]:,} off-topic queries{note}, "
        f"measured on {c.measured_on[0]:,} and {c.measured_on[1]:,} others",
        f"  at {CUTOFF:g} and above: {c.answered * 100:.1f}% of the golden queries are answered, "
        f"{c.empty * 100:.1f}% of the off-topic ones are not",
    ]
    lines += [
        f"  {b.low:.1f} to {b.high:.1f}: {b.queries:5,} queries, promised {b.promised * 100:5.1f}%, observed "
        f"{b.observed * 100:5.1f}%"
        for b in c.bins
    ]
    return lines
