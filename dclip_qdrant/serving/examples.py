"""What a query is made of, as one vector: texts and pictures that are wanted, and some that are not."""

import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dclip_qdrant.errors import UsageError
from dclip_qdrant.metrics import normalise, shorten
from dclip_qdrant.pictures import images
from dclip_qdrant.serving.stores import Store
from dclip_qdrant.serving.stores.base import check_unicode
from dclip_qdrant.serving.student import Student

# a picture of the collection, by its key or its point's id, or one of elsewhere
Example = str | Path | bytes | Image.Image


@dataclass(frozen=True)
class Wanted:
    """The parts of a query: what is looked for and, with `unlike` and `minus`, what is not."""

    text: str | None = None
    image: images.Picture | None = None
    like: Sequence[Example] = ()
    unlike: Sequence[Example] = ()
    minus: str | None = None  # a text

    @property
    def is_text_alone(self) -> bool:
        return self.text is not None and self.image is None and not (self.like or self.unlike or self.minus)

    def check(self) -> None:
        """Raises UsageError for nothing to look for, and for empty texts."""
        if self.text is None and self.image is None and not self.like:
            came = "only what isn't wanted" if self.unlike or self.minus else "nothing to search for"
            raise UsageError("query", came, "`text`, `image` or `like`")
        for name, text in (("query", self.text), ("`minus`", self.minus)):
            if text is not None and not text.strip():
                raise UsageError(name, "an empty text", "words to search for")
            check_unicode(name, text or "")
        for example in (*self.like, *self.unlike):
            check_unicode("example", example if isinstance(example, str) else "")


def query_vector(store: Store, student: Student, wanted: Wanted) -> tuple[np.ndarray, list[str]]:
    """The unit vector [D] to search with, and the points that are examples themselves.

    As Qdrant's `average_vector` recommends: the mean of what is wanted; where something is not wanted, twice
    that mean minus the mean of the other. D is what the collection stores where examples come from it.

    Raises:
        UsageError: an example that isn't there. ImageError: a picture that can't be read.
    """
    ids = {name: _id_of(store, name) for name in (*wanted.like, *wanted.unlike) if isinstance(name, str)}
    stored = store.vectors(list(ids.values())) if ids else {}

    def of(example: Example) -> np.ndarray:
        if isinstance(example, str):
            return stored[ids[example]]
        return student.embed_images([example])[0]

    positive = [of(example) for example in wanted.like]
    negative = [of(example) for example in wanted.unlike]
    if wanted.text is not None:
        positive.append(student.embed_texts([wanted.text])[0])
    if wanted.image is not None:
        positive.append(student.embed_images([wanted.image])[0])
    if wanted.minus is not None:
        negative.append(student.embed_texts([wanted.minus])[0])
    width = min(len(vector) for vector in positive + negative)
    mean = _mean(positive, width)
    if negative:
        mean = 2 * mean - _mean(negative, width)
    return normalise(mean), list(ids.values())


def _mean(vectors: list[np.ndarray], width: int) -> np.ndarray:
    return np.mean([v if len(v) == width else shorten(v, width) for v in vectors], axis=0)


def _id_of(store: Store, name: str) -> str:
    """The point of a key, or the one that has this id."""
    from dclip_qdrant.serving.items import point_id  # its module reads sources: not for every query

    candidates = [point_id(name)]
    with suppress(ValueError):
        candidates.append(str(uuid.UUID(name)))
    if name.isdigit():
        candidates.append(name)  # of a collection that somebody else made
    there = store.payloads(candidates, ["key"])
    found = next((point for point in candidates if point in there), None)
    if found is None:
        expected = "the key or the id of a picture in it, or a picture's file"
        raise UsageError("example", f"{store.name} has no picture {name!r}", expected)
    return found
