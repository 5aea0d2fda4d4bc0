"""What is left of a student's answers once its vectors are short, rounded and searched through the engine's
index: recall over bytes a vector.

A setting is `KIND[@DIM][+rescore[N]][+efN]`: float32, float16, int8, turbo4, turbo2 or binary; @128 stores
the first 128 components; +rescore compares N times as many candidates (2 unless said) with the stored
originals; +ef256 lets HNSW keep 256 candidates while it searches.
Each setting becomes a collection of its own, searched through HNSW however small it is, and dropped
afterwards.
"""

import logging
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dclip_qdrant.errors import StoreError, UsageError
from dclip_qdrant.lookup import need
from dclip_qdrant.metrics import KS, normalise
from dclip_qdrant.serving.collection import META, CollectionSpec, VectorSpec
from dclip_qdrant.serving.items import point_id
from dclip_qdrant.serving.stores import Condition, Place, Point, Query, Store

logger = logging.getLogger(__name__)

WRITTEN_TOGETHER = 256
PART, PARTS = "part", 10  # a payload field for filters: a tenth of the pictures has 0
BITS = {"float32": 32, "float16": 16, "int8": 8, "turbo4": 4, "turbo2": 2, "binary": 1}
DEFAULT = "float32,float16,int8,turbo4,binary,binary+rescore,float32@1/2,int8@1/2,int8@1/4,binary@1/2+rescore"
KEYS = {
    "setting": "KIND[@DIM][+rescore[N]][+efN]",
    "dim": "components stored",
    "bytes": (
        "of a vector as it is searched, without the index's links; originals that +rescore reads come on top"
    ),
    "recall@k": "part of the exact float32 top k of the whole vectors that the index found",
    "filtered_recall@k": "likewise under a filter that a tenth of the pictures pass",
    "t2i": "r@1, r@5, r@10 of the right picture, through the index",
    "p50_ms": "search alone, one query at a time, median",
    "p95_ms": "likewise, 95th percentile",
}


@dataclass(frozen=True)
class Setting:
    """One way to store and search vectors of `whole` components."""

    name: str
    kind: str
    dim: int
    oversampling: float  # 0: the originals stay untouched
    ef: int | None = None  # None: the engine's own

    @property
    def bytes(self) -> float:
        return BITS[self.kind] * self.dim / 8

    def vector(self) -> VectorSpec:
        """Of a collection that stores and searches its vectors so."""
        quantised = self.kind not in ("float32", "float16")
        return VectorSpec.model_validate(
            {
                "dim": self.dim,
                "on_disk": quantised,
                "quantization": self.kind if quantised else "none",
                "datatype": "float16" if self.kind == "float16" else "float32",
                "oversampling": self.oversampling if quantised else None,
                "ef": self.ef,
            }
        )

    def spec(self) -> CollectionSpec:
        # 10 KB: any collection gets its index
        indexes: Any = {PART: "integer"}
        return CollectionSpec(
            vectors={"image": self.vector()}, payload_indexes=indexes, indexing_threshold=10
        )


def parse(text: str, whole: int) -> list[Setting]:
    """Comma-separated settings; @1/2 is half of the `whole` components.

    Raises:
        UsageError: an unknown kind, a length beyond the student's, a second setting of the same name.
    """
    out: list[Setting] = []
    for name in (t.strip() for t in text.split(",")):
        m = re.fullmatch(
            r"(\w+?)(?:@(?:(\d+)|1/(\d+)))?(\+rescore(\d+(?:\.\d+)?)?)?(?:\+ef([1-9]\d*))?", name
        )
        if not m or m.group(1) not in BITS:
            expected = f"KIND[@DIM][+rescore][+efN], KIND one of {', '.join(BITS)}"
            raise UsageError("`settings`", repr(name), expected)
        kind, fixed, part, again, factor, ef = m.groups()
        dim = int(fixed) if fixed else whole // (int(part) or 2 * whole) if part else whole
        if not 0 < dim <= whole:
            raise UsageError("`settings`", repr(name), f"1 to {whole} components, the student's")
        if again and kind.startswith("float"):
            raise UsageError(
                "`settings`", repr(name), "+rescore with int8, turbo or binary", "nothing was rounded"
            )
        setting = Setting(
            name.replace(f"@1/{part}", f"@{dim}") if part else name,
            kind,
            dim,
            float(factor or 2) if again else 0.0,
            int(ef) if ef else None,
        )
        if any(
            (s.kind, s.dim, s.oversampling, s.ef)
            == (setting.kind, setting.dim, setting.oversampling, setting.ef)
            for s in out
        ):
            raise UsageError("`settings`", f"{setting.name} twice", "different settings")
        out.append(setting)
    return out


def measure(
    image: np.ndarray,
    text: np.ndarray,
    owner: np.ndarray,
    settings: Sequence[Setting],
    place: Place,
    *,
    k: int = 10,
    queries: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows of `KEYS`, one a setting. image [N, D], text [M, D], owner [M]; `queries` of the texts are drawn.

    Raises:
        UsageError: an engine that quantises nothing. StoreError.
    """
    if place.where == ":memory:":
        raise UsageError(
            "`through`",
            ":memory:",
            "edge or a server's URL",
            "the in-memory engine neither quantises nor indexes",
        )
    image, text = normalise(image), normalise(text)
    passing = np.flatnonzero(np.arange(len(image)) % PARTS == 0)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(text))[:queries])
    k = min(k, len(image))
    truth = _nearest(text[chosen], image, k)
    of_part = [set(passing[list(best)]) for best in _nearest(text[chosen], image[passing], k)]
    rows = []
    for setting in settings:
        answers, filtered, times = _ask(place, setting, image, text[chosen], most=max(k, *KS))
        ranks = [
            answer.index(int(owner[i])) if owner[i] in answer else np.inf
            for answer, i in zip(answers, chosen, strict=True)
        ]
        recalls, under_filter = (
            [len(right & set(answer[:k])) / len(right) for right, answer in zip(best, found, strict=True)]
            for best, found in ((truth, answers), (of_part, filtered))
        )
        row = {
            "setting": setting.name,
            "dim": setting.dim,
            "bytes": setting.bytes,
            f"recall@{k}": float(np.mean(recalls)),
            f"filtered_recall@{k}": float(np.mean(under_filter)),
            "t2i": {f"r@{n}": float(np.mean([rank < n for rank in ranks])) for n in KS},
            "p50_ms": float(np.percentile(times, 50) * 1000),
            "p95_ms": float(np.percentile(times, 95) * 1000),
        }
        logger.info("%s: recall@%d %.3f at %.0f bytes", setting.name, k, row[f"recall@{k}"], setting.bytes)
        rows.append(row)
    return rows


def _nearest(queries: np.ndarray, image: np.ndarray, k: int) -> list[set[int]]:
    """The numbers of the k images [N, D] that are nearest to each of the queries [Q, D]; all, of fewer."""
    k = min(k, len(image))
    return [set(np.argpartition(-s, k - 1)[:k].tolist()) for s in queries @ image.T]


def _ask(
    place: Place, setting: Setting, image: np.ndarray, queries: np.ndarray, *, most: int
) -> tuple[list[list[int]], list[list[int]], list[float]]:
    """The pictures that a collection of this setting finds for each query [Q, D], by number: among all, and
    among those that pass a filter; and the seconds that each of the first took. The collection is dropped
    afterwards."""
    name = f"dclip-eval-{secrets.token_hex(4)}"
    ids = [point_id(str(i)) for i in range(len(image))]
    number_of = {point: number for number, point in enumerate(ids)}
    store = place.open(name)
    answers, filtered, times = [], [], []
    only = (Condition(PART, "=", (0,)),)
    try:
        dim = image.shape[1]
        remembered = {META: {"dim": dim, "for": "measuring recall through an index; may be deleted"}}
        store.create(setting.spec(), dim, remembered)
        points = [
            Point(point, vector, None, {PART: number % PARTS})
            for number, (point, vector) in enumerate(zip(ids, image, strict=True))
        ]
        for start in range(0, len(points), WRITTEN_TOGETHER):
            store.upsert(points[start : start + WRITTEN_TOGETHER])
        store.finish()
        _settle(store)
        for vector in queries:
            query = Query(
                limit=most,
                vector=vector,
                oversampling=setting.oversampling,
                ef=setting.ef,
                with_payload=False,
            )
            began = time.perf_counter()
            hits = store.query(query)
            times.append(time.perf_counter() - began)
            answers.append([number_of[hit.id] for hit in hits])
            filtered.append([number_of[hit.id] for hit in store.query(replace(query, where=only))])
    finally:
        store.close()
        place.drop(name)
    return answers, filtered, times


def _settle(store: Store, patience: float = 600) -> None:
    """Waits until the engine has built its index: a server does so in the background."""
    until = time.monotonic() + patience
    while not store.settled():
        if time.monotonic() > until:
            raise StoreError(
                store.name,
                f"still being indexed after {patience:.0f} s",
                "an index",
                "try again when the server is idle",
            )
        time.sleep(0.2)


def table(series: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a row a setting, the students side by side."""
    recall = next(key for key in next(iter(series.values()))[0] if key.startswith("recall@"))
    columns = (recall, "filtered", "R@1", "R@10", "p50 / p95 ms")
    head = ["index", "bytes"]
    for name in series:
        head += [f"{name}: {column}" if len(series) > 1 else column for column in columns]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for rows in zip(*series.values(), strict=True):
        cells = [rows[0]["setting"], f"{rows[0]['bytes']:.0f}"]
        for r in rows:
            cells += [
                f"{r[recall]:.3f}",
                f"{r['filtered_' + recall]:.3f}",
                f"{r['t2i']['r@1'] * 100:.1f}",
                f"{r['t2i']['r@10'] * 100:.1f}",
                f"{r['p50_ms']:.2f} / {r['p95_ms']:.2f}",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(series: dict[str, list[dict[str, Any]]], path: str) -> None:
    """Recall over bytes a vector, one line a student; the file's ending decides its form (.svg, .png, .pdf).

    Raises:
        MissingExtra: matplotlib isn't installed. UsageError: an ending that it doesn't know.
    """
    need("matplotlib", "a plot")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    recall = next(key for key in next(iter(series.values()))[0] if key.startswith("recall@"))
    for name, rows in series.items():
        rows = sorted(rows, key=lambda r: (r["bytes"], r[recall]))
        best = np.maximum.accumulate([r[recall] for r in rows])
        drawn = axes.scatter(
            [r["bytes"] for r in rows], [r[recall] for r in rows], s=28, label=name, zorder=3
        )
        axes.plot(
            [r["bytes"] for r in rows],
            best,
            drawstyle="steps-post",
            alpha=0.35,
            color=drawn.get_facecolor()[0],
        )
    longest = next(iter(series.values()))
    for i, r in enumerate(longest):
        top = max(row[recall] for rows in series.values() for row in rows if row["setting"] == r["setting"])
        axes.annotate(
            r["setting"],
            (r["bytes"], top),
            textcoords="offset points",
            xytext=(0, 6 + 9 * (i % 2)),
            ha="center",
            fontsize=7,
        )
    axes.set_xscale("log", base=2)
    ticks = sorted({r["bytes"] for r in longest})
    axes.set_xticks(ticks, [f"{t:.0f}" for t in ticks])
    axes.minorticks_off()
    axes.margins(0.08, 0.08)
    axes.set(xlabel="bytes a vector, as searched", ylabel=f"{recall} against exact float32 search")
    axes.grid(alpha=0.25)
    if len(series) > 1:
        axes.legend()
    try:
        figure.savefig(path)
    except ValueError as e:
        raise UsageError(
            "`plot_file`", str(e).splitlines()[0][:120], "a file ending in .svg, .png or .pdf"
        ) from e
    finally:
        plt.close(figure)
