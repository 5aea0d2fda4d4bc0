"""Golden queries: texts whose right pictures are known, asked through a collection as an app would ask. Tuning and the promotion gate stand on them.

A picture is indexed with one caption and queried with its others: a query that stands in the collection word for word would be found by BM25 alone,
and every figure would be worthless. Such queries are left out, and counted.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dclip_qdrant.errors import InputError, UsageError
from dclip_qdrant.ingest import point_id
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.stores import Store


@dataclass(frozen=True)
class Golden:
    """`texts[i]` should find the points `right[i]`. `picture[i]` groups the queries of one picture, so that halves and bootstraps never tear them apart."""

    texts: list[str]
    right: list[set[str]]
    picture: list[str]
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def fingerprint(self) -> str:
        rows = [[t, sorted(r)] for t, r in zip(self.texts, self.right, strict=True)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def halves(self) -> tuple["Golden", "Golden"]:
        """By picture, the same on every machine."""
        side = [hashlib.sha256(p.encode()).digest()[0] % 2 for p in self.picture]
        return tuple(self.take([i for i, s in enumerate(side) if s == k]) for k in (0, 1))

    def take(self, index: list[int]) -> "Golden":
        return Golden([self.texts[i] for i in index], [self.right[i] for i in index], [self.picture[i] for i in index])


def load(path: str, store: Store, *, split: str | None = None, prefix: str = "", limit: int | None = None) -> Golden:
    """Golden queries for a collection, from pairs (captions that aren't indexed) or JSONL with {"text", "key" or "keys"}.

    Raises:
        UsageError: none of the pictures is in the collection, or every caption is indexed. InputError: a broken line.
    """
    rows = list(_jsonl(Path(path)) if path.endswith(".jsonl") else _pairs(path, split))
    keys = sorted({prefix + k for _, ks in rows for k in ks})
    indexed: dict[str, set[str]] = {}
    for start in range(0, len(keys), 512):
        some = keys[start : start + 512]
        found = store.payloads([point_id(k) for k in some], ["caption"])
        indexed |= {k: {_plain(c) for c in (found[point_id(k)]["caption"] or "").split("\n")} for k in some if point_id(k) in found}
    if not indexed:
        raise UsageError(
            path,
            f"none of its {len(keys):,} pictures is in {store.name}",
            "queries for this collection",
            "--prefix, if it was ingested with one",
        )
    texts, right, picture, left_out = [], [], [], 0
    for text, ks in rows:
        there = [prefix + k for k in ks if prefix + k in indexed]
        if not there:
            continue
        if any(_plain(text) in indexed[k] for k in there):
            left_out += 1
            continue
        texts.append(text)
        right.append({point_id(k) for k in there})
        picture.append(there[0])
        if limit is not None and len(texts) == limit:
            break
    if not texts:
        raise UsageError(path, f"all {left_out:,} captions of these pictures are in the collection word for word", "captions that aren't indexed",
                         "ingest each picture with one caption and keep the others for queries")  # fmt: skip
    return Golden(texts, right, picture, left_out)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _pairs(path: str, split: str | None) -> Any:
    pairs = Pairs.open(path)
    have = pairs.splits()
    split = split or next((s for s in ("val", "test") if s in have), next(iter(have)))
    if split not in have:
        raise UsageError("--split", f"no {split!r} in {path}", ", ".join(have))
    for rows in pairs.rows(["key", "captions"], (split,)):
        for r in rows:
            yield from ((c, [r["key"]]) for c in r["captions"])


def _jsonl(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(str(path), "no such file", "JSONL or a pairs folder")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield row["text"], row.get("keys") or [row["key"]]
        except (json.JSONDecodeError, KeyError, TypeError) as e:
            raise InputError(f"{path}:{number}", f"{type(e).__name__}: {e}", '{"text": "...", "key": "..."}') from e


@dataclass(frozen=True)
class Scores:
    """One number a query [Q]."""

    r1: np.ndarray
    r5: np.ndarray
    r10: np.ndarray
    rr: np.ndarray

    @classmethod
    def of(cls, golden: Golden, ask: Callable[[str], list[str]]) -> "Scores":
        """`ask` gives the ids found for a text, best first."""
        best = np.array(
            [next((rank for rank, i in enumerate(ask(t), 1) if i in r), np.inf) for t, r in zip(golden.texts, golden.right, strict=True)]
        )
        return cls.of_ranks(best)

    @classmethod
    def of_ranks(cls, best: np.ndarray) -> "Scores":
        return cls(*(np.asarray(best <= k, float) for k in (1, 5, 10)), np.where(best <= 10, 1 / best, 0.0))

    @property
    def together(self) -> np.ndarray:
        """What weights are chosen by and gates compare [Q]: the mean of recall at 1, 5 and 10; R@1 alone hangs on too few queries."""
        return (self.r1 + self.r5 + self.r10) / 3

    def row(self) -> dict[str, float]:
        return {k: round(float(v.mean()), 4) for k, v in (("r@1", self.r1), ("r@5", self.r5), ("r@10", self.r10), ("mrr@10", self.rr))}


def by_picture(values: np.ndarray, golden: Golden) -> np.ndarray:
    """Means over each picture's queries [P], in order of the pictures: queries of one picture aren't independent."""
    names, at = np.unique(golden.picture, return_inverse=True)
    return np.bincount(at, values, len(names)) / np.bincount(at, minlength=len(names))
