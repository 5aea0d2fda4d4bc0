"""The tables that stages hand to each other: Arrow schemas with a name and a version, checked at every read.

`schemas/*.json` are generated from here (`make schemas`) for other programs to read.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

from dclip_qdrant.errors import SchemaError

_BOXES = pa.list_(pa.list_(pa.float32()))


@dataclass(frozen=True)
class Contract:
    name: str
    version: int
    about: str
    columns: dict[str, tuple[pa.DataType, str]]

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema, its name and version in the metadata."""
        return pa.schema(
            [pa.field(n, t) for n, (t, _) in self.columns.items()],
            metadata={"dclip.contract": f"{self.name}/{self.version}"},
        )

    def table(self, rows: list[dict]) -> pa.Table:
        return pa.Table.from_pylist(rows, schema=self.schema)

    def check(
        self, schema: pa.Schema, where: object, columns: Iterable[str] | None = None, *, do: str | None = None
    ) -> None:
        """Raises SchemaError unless `schema` has our columns (or just those named) with fitting types."""
        declared = (schema.metadata or {}).get(b"dclip.contract", b"").decode()
        if declared and declared != f"{self.name}/{self.version}":
            raise SchemaError(where, f"a table of {declared}", f"{self.name}/{self.version}", do)
        for name in columns or self.columns:
            kind = self.columns[name][0]
            if name not in schema.names:
                raise SchemaError(
                    where,
                    f"no column {name!r} (has: {', '.join(schema.names) or 'none'})",
                    f"the {self.name} contract: {name} {kind}",
                    do,
                )
            came = schema.field(name).type
            if not _fits(came, kind):
                raise SchemaError(where, f"column {name!r} of type {came}", str(kind), do)

    def describe(self) -> dict:
        columns = [{"name": n, "type": str(t), "about": about} for n, (t, about) in self.columns.items()]
        return {
            "name": self.name,
            "version": self.version,
            "about": self.about,
            "metadata": {"dclip.contract": f"{self.name}/{self.version}"},
            "columns": columns,
        }


def _fits(came: pa.DataType, wanted: pa.DataType) -> bool:
    """Equal up to the width of offsets and numbers: large_string fits string, list<double> fits
    list<float>."""
    t = pa.types
    if came == wanted or t.is_null(came):
        return True
    if (t.is_list(wanted)) and (t.is_list(came) or t.is_large_list(came) or t.is_fixed_size_list(came)):
        return _fits(came.value_type, wanted.value_type)
    same = (
        (t.is_string, t.is_large_string),
        (t.is_binary, t.is_large_binary),
        (t.is_integer,),
        (t.is_floating,),
    )
    return any(any(f(wanted) for f in kinds) and any(f(came) for f in kinds) for kinds in same)


PAIRS = Contract(
    "pairs",
    1,
    "one picture with its captions",
    {
        "key": (pa.string(), "unique name of the picture; point ids are made from it"),
        "uri": (pa.string(), "where the picture came from; read from there when `image` is null"),
        "image": (pa.binary(), "the encoded picture, or null"),
        "width": (pa.int32(), "pixels, upright"),
        "height": (pa.int32(), "pixels, upright"),
        "captions": (pa.list_(pa.string()), "one or more; none where pictures alone are distilled from"),
        "split": (pa.string(), "train, val or test"),
        "pixel_hash": (pa.string(), "sha256 over size and decoded pixels"),
    },
)

REGIONS = Contract(
    "regions",
    1,
    "what a detector found in one picture; no boxes is normal",
    {
        "key": (pa.string(), "the picture's key"),
        "width": (pa.int32(), "pixels, upright"),
        "height": (pa.int32(), "pixels, upright"),
        "boxes": (_BOXES, "x0, y0, x1, y1 in pixels of the upright picture"),
        "scores": (pa.list_(pa.float32()), "confidence, 0..1"),
        "labels": (pa.list_(pa.string()), "class names"),
    },
)

_VIEW = {
    "key": (pa.string(), "the picture's key"),
    "view": (pa.int16(), "0 is the plain picture; others are augmented"),
    "crop": (pa.list_(pa.float32()), "x0, y0, x1, y1 of the view as parts of width and height"),
    "flip": (pa.bool_(), "the view is mirrored"),
    "trunk": (
        pa.list_(pa.float32()),
        "the student's frozen trunk features of the view, or empty when the trunk learns",
    ),
}

FEATURES = Contract(
    "features",
    3,
    "what the frozen base model sees in one stored view of one picture",
    {
        **_VIEW,
        "split": (pa.string(), "train, val or test"),
        "captions": (pa.list_(pa.string()), "the picture's captions; in view 0 alone"),
        "uri": (pa.string(), "where the picture is"),
        "picture": (
            pa.binary(),
            "the encoded picture, where training streams and decodes it and the pairs hold it; in view 0 "
            "alone, else null",
        ),
        "image": (pa.list_(pa.float32()), "the base model's feature of the view, not normalised"),
        "regions": (
            pa.list_(pa.list_(pa.float32())),
            "its features of the region crops (first the whole picture, where that is a "
            "region); in view 0 alone",
        ),
        "region_boxes": (
            pa.list_(pa.list_(pa.float32())),
            "what was cropped for each, x0, y0, x1, y1 as parts of width and height",
        ),
        "region_trunk": (
            pa.list_(pa.list_(pa.float32())),
            "the student's frozen trunk features of each, or empty when the trunk learns",
        ),
        "texts": (
            pa.list_(pa.list_(pa.float32())),
            "its sentence vectors of the captions, not normalised; in view 0 alone",
        ),
        "text_trunk": (
            pa.list_(pa.list_(pa.float32())),
            "the student's features of the captions below its projection, or empty when they aren't read; "
            "in view 0 alone",
        ),
    },
)

TEACHER_CACHE = Contract(
    "teacher_cache",
    1,
    "what the teacher says of one stored view of one picture",
    {
        **_VIEW,
        "teacher_image": (
            pa.list_(pa.list_(pa.float32())),
            "one unit vector for each caption, or a single one that holds for all",
        ),
    },
)

EMBEDDINGS = Contract(
    "embeddings",
    1,
    "one picture, embedded, on its way to a collection",
    {
        "key": (pa.string(), "the picture's key"),
        "uri": (pa.string(), "where the picture is"),
        "image": (pa.list_(pa.float32()), "unit vector of the whole picture; empty unless embedded"),
        "regions": (pa.list_(pa.list_(pa.float32())), "unit vectors: the whole picture, then each box"),
        "payload": (
            pa.string(),
            "JSON of the payload: key, uri, content_hash, caption, boxes, labels, scores, "
            "width, height, student, ...",
        ),
        "status": (
            pa.string(),
            "embedded, updated (there already, with another payload), unchanged (there already) or rejected",
        ),
        "reason": (pa.string(), "why it was rejected, or null"),
    },
)

ALL = (PAIRS, REGIONS, FEATURES, TEACHER_CACHE, EMBEDDINGS)
