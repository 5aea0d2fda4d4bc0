"""Golden queries: texts whose right pictures are known, asked through a collection as an app would ask.
Tuning and the promotion gate stand on them.

A picture is indexed with one caption and queried with its others: a query that stands in the collection word
for word would be found by BM25 alone, and every figure would be worthless. Such queries are left out, and
counted.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from upath import UPath

from dclip_qdrant.errors import InputError, UsageError
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.pairs.splits import pick_split
from dclip_qdrant.serving.items import point_id
from dclip_qdrant.serving.stores import Store
from dclip_qdrant.tables import storage

LOOKED_UP = 512  # points a request


@dataclass(frozen=True)
class Golden:
    """`texts[i]` should find the points `right[i]`. `picture[i]` groups the queries of one picture, so that
    halves and bootstraps never tear them apart."""

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
        first, second = ([i for i, s in enumerate(side) if s == k] for k in (0, 1))
        return self.take(first), self.take(second)

    def take(self, index: list[int]) -> "Golden":
        return Golden(
            [self.texts[i] for i in index], [self.right[i] for i in index], [self.picture[i] for i in index]
        )


Rows = Iterator[tuple[str, list[str]]]  # a text and the keys of its right pictures


def load_golden(
    path: str, store: Store, *, split: str | None = None, prefix: str = "", limit: int | None = None
) -> Golden:
    """Golden queries for a collection, from pairs (captions that aren't indexed) or JSONL with {"text", "key"
    or "keys"}.

    Raises:
        UsageError: none of the pictures is in the collection, or every caption is indexed.
        InputError: a broken line.
    """
    rows = list(_jsonl(storage.as_path(path)) if path.endswith(".jsonl") else _pairs(path, split))
    keys = {prefix + key for _, of_text in rows for key in of_text}
    indexed = _indexed_captions(store, sorted(keys))
    if not indexed:
        came = f"none of its {len(keys):,} pictures is in {store.name}"
        do = "`prefix`, if it was ingested with one"
        raise UsageError(path, came, "queries for this collection", do)
    texts: list[str] = []
    right: list[set[str]] = []
    picture: list[str] = []
    left_out = 0
    for text, of_text in rows:
        there = [prefix + key for key in of_text if prefix + key in indexed]
        if not there:
            continue
        if any(_plain(text) in indexed[key] for key in there):
            left_out += 1
            continue
        texts.append(text)
        right.append({point_id(key) for key in there})
        picture.append(there[0])
        if limit is not None and len(texts) == limit:
            break
    if not texts:
        came = f"all {left_out:,} captions of these pictures are in the collection word for word"
        do = "ingest with `captions` 1: the others are then queries"
        raise UsageError(path, came, "captions that aren't indexed", do)
    return Golden(texts, right, picture, left_out)


def _indexed_captions(store: Store, keys: list[str]) -> dict[str, set[str]]:
    """The captions that stand in the collection, by the key of those pictures that it has."""
    indexed: dict[str, set[str]] = {}
    for start in range(0, len(keys), LOOKED_UP):
        batch = {point_id(key): key for key in keys[start : start + LOOKED_UP]}
        for point, payload in store.payloads(list(batch), ["caption"]).items():
            indexed[batch[point]] = {_plain(c) for c in (payload["caption"] or "").split("\n")}
    return indexed


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _pairs(path: str, split: str | None) -> Rows:
    pairs = Pairs.open(path)
    chosen = pick_split(pairs, split, order=("val", "test"))
    for rows in pairs.rows(["key", "captions"], (chosen,)):
        for row in rows:
            yield from ((caption, [row["key"]]) for caption in row["captions"])


def _jsonl(path: UPath) -> Rows:
    if not path.is_file():
        raise UsageError(str(path), "no such file", "JSONL or a pairs folder")
    for number, line in enumerate(path.read_text().split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield row["text"], row.get("keys") or [row["key"]]
        except (json.JSONDecodeError, KeyError, TypeError) as e:
            expected = '{"text": "...", "key": "..."}'
            raise InputError(f"{path}:{number}", f"{type(e).__name__}: {e}", expected) from e


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
            [
                next((rank for rank, i in enumerate(ask(t), 1) if i in r), np.inf)
                for t, r in zip(golden.texts, golden.right, strict=True)
            ]
        )
        return cls.of_ranks(best)

    @classmethod
    def of_ranks(cls, best: np.ndarray) -> "Scores":
        r1, r5, r10 = (np.asarray(best <= k, float) for k in (1, 5, 10))
        return cls(r1, r5, r10, np.where(best <= 10, 1 / best, 0.0))

    @property
    def together(self) -> np.ndarray:
        """What weights are chosen by and gates compare [Q]: the mean of recall at 1, 5 and 10; R@1 alone
        hangs on too few queries."""
        return (self.r1 + self.r5 + self.r10) / 3

    def row(self) -> dict[str, float]:
        return {
            k: round(float(v.mean()), 4)
            for k, v in (("r@1", self.r1), ("r@5", self.r5), ("r@10", self.r10), ("mrr@10", self.rr))
        }


def by_picture(values: np.ndarray, golden: Golden) -> np.ndarray:
    """Means over each picture's queries [P], in order of the pictures: queries of one picture aren't
    independent."""
    names, at = np.unique(golden.picture, return_inverse=True)
    return np.bincount(at, values, len(names)) / np.bincount(at, minlength=len(names))
