"""The cheapest index that still finds what an exact search finds, measured on a collection's own pictures and
the user's own queries, as a collection spec to reindex with."""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from dclip_qdrant.errors import UsageError
from dclip_qdrant.metrics import shorten
from dclip_qdrant.serving import index_recall
from dclip_qdrant.serving.collection import CollectionSpec
from dclip_qdrant.serving.golden import Golden
from dclip_qdrant.serving.index_recall import Setting
from dclip_qdrant.serving.stores import Place, Store
from dclip_qdrant.serving.student import Student

TARGET = 0.99  # of the exact float32 top 10
PICTURES = 20_000  # measured on at most so many
QUERIES = 500
# from the cheapest on; rescoring reads originals from disk, short vectors lose what no rescoring brings back
SETTINGS = (
    "binary+rescore2,binary+rescore4,binary+rescore8,turbo2+rescore2,turbo2+rescore4,turbo4,turbo4+rescore2,"
    "int8@1/2+rescore2,int8,int8+rescore2,int8+rescore2+ef256,float16,float32,float32+ef256,float32+ef512"
)


@dataclass(frozen=True)
class IndexChoice:
    """What was measured, and the cheapest setting that holds the target with and without a filter."""

    rows: list[dict[str, Any]]  # of index_recall.KEYS
    setting: Setting | None  # None: none does
    pictures: int
    queries: int

    def row(self) -> dict[str, Any]:
        chosen = self.setting.name if self.setting else None
        return {"chosen": chosen, "pictures": self.pictures, "queries": self.queries, "rows": self.rows}


def tune_index(
    store: Store,
    student: Student,
    golden: Golden,
    place: Place,
    *,
    settings: str = SETTINGS,
    target: float = TARGET,
    pictures: int = PICTURES,
) -> IndexChoice:
    """Tries the settings from the cheapest on until one holds the target, in collections of `place` that are
    dropped again.

    Args:
        pictures: At most so many of the collection's, the first by id, which follows from hashes: a draw.

    Raises:
        UsageError: an empty collection, an engine that quantises nothing, a setting that can't be meant.
    """
    image = [point.image for point in islice(store.scroll(with_vectors=True), pictures)]
    if not image:
        raise UsageError("`index`", f"{store.name} has no pictures", "a filled collection")
    image = np.stack(image)
    texts = golden.texts[:QUERIES]
    text = student.embed_texts(texts)
    text = text if text.shape[1] == image.shape[1] else shorten(text, image.shape[1])
    # which picture is the right one isn't asked here: recall is against exact search
    nobody = np.full(len(texts), -1)
    rows: list[dict[str, Any]] = []
    for setting in sorted(index_recall.parse(settings, image.shape[1]), key=_cost):
        row = index_recall.measure(image, text, nobody, [setting], place, queries=QUERIES)[0]
        del row["t2i"]
        rows.append(row)
        recall = next(key for key in row if key.startswith("recall@"))
        if min(row[recall], row[f"filtered_{recall}"]) >= target:
            return IndexChoice(rows, setting, len(image), len(texts))
    return IndexChoice(rows, None, len(image), len(texts))


def _cost(setting: Setting) -> tuple[float, float, int]:
    """Bytes that are searched, then what is read besides, then work."""
    return setting.bytes, setting.oversampling, setting.ef or 0


def spec_of(setting: Setting, spec: CollectionSpec, choice: IndexChoice) -> str:
    """TOML of a collection spec: `spec` with the chosen setting for `image`."""
    vectors = {**spec.vectors, "image": setting.vector()}
    row = choice.rows[-1]
    recall = next(key for key in row if key.startswith("recall@"))
    about = (
        f"{setting.name}: {recall} {row[recall]:.3f}, {row['filtered_' + recall]:.3f} under a filter, "
        f"{setting.bytes:.0f} bytes a vector as searched ({choice.pictures:,} pictures, {choice.queries:,} "
        "queries)"
    )
    lines = [f'about = "{about}"']
    for name, vector in vectors.items():
        lines += ["", f"[vectors.{name}]", *_lines(vector.model_dump(exclude_none=True))]
    lines += ["", "[text]", *_lines(spec.text.model_dump(exclude_none=True))]
    lines += ["", "[payload_indexes]", *_lines(dict(spec.payload_indexes))]
    return "\n".join(lines) + "\n"


def _lines(table: dict[str, Any]) -> list[str]:
    shown = lambda v: str(v).lower() if isinstance(v, bool) else f'"{v}"' if isinstance(v, str) else f"{v:g}"
    quoted = lambda key: key if key.replace("_", "").isalnum() else f'"{key}"'
    return [f"{quoted(key)} = {shown(value)}" for key, value in table.items()]


def describe(choice: IndexChoice) -> list[str]:
    """For a person."""
    lines = [f"index, on {choice.pictures:,} pictures and {choice.queries:,} queries, from the cheapest on:"]
    for row in choice.rows:
        recall = next(key for key in row if key.startswith("recall@"))
        lines.append(
            f"  {row['setting']:<20} {row['bytes']:6.0f} bytes  {recall} {row[recall]:.3f}  under a filter "
            f"{row['filtered_' + recall]:.3f}  p50 {row['p50_ms']:.2f} ms"
        )
    held = f"{choice.setting.name} holds" if choice.setting else "none holds"
    return [*lines, f"  {held} {TARGET:g} of an exact search"]
