"""Old vectors in a new student's space, without embedding a picture: a linear map, learned on pictures that
both students embedded. A new collection can be searched with the new student at once and gets its true
vectors while it serves."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from dclip_qdrant.errors import UsageError
from dclip_qdrant.metrics import normalise
from dclip_qdrant.serving.stores import Point, Store
from dclip_qdrant.serving.student import Student

BRIDGED = "bridged"  # the payload field of a point whose vectors are mapped
LEAST = 100  # pictures to learn from
WRITTEN_TOGETHER = 64  # points a request
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # of the ridge, over the mean power of a component


@dataclass(frozen=True)
class Bridge:
    """new = normalise((old - old_mean) @ weight + new_mean); weight [D_old, D_new]."""

    weight: np.ndarray
    old_mean: np.ndarray
    new_mean: np.ndarray
    likeness: float  # mean cosine of mapped and true vectors, on pictures that taught nothing

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors of the old student [N, D_old] -> unit vectors in the new one's space [N, D_new]."""
        return normalise((vectors - self.old_mean) @ self.weight + self.new_mean)


def learn(old: np.ndarray, new: np.ndarray) -> Bridge:
    """Ridge regression from what the old student made of N pictures [N, D_old] to what the new one makes of
    them [N, D_new]; its strength is chosen on every fifth picture, and the map then learned on all."""
    if len(old) < LEAST:
        raise UsageError("`bridge`", f"{len(old)} pictures that both students embedded", f"{LEAST} or more")
    held_out = np.arange(len(old)) % 5 == 0
    likeness = {}
    for strength in STRENGTHS:
        bridge = _ridge(old[~held_out], new[~held_out], strength)
        likeness[strength] = float((bridge(old[held_out]) * normalise(new[held_out])).sum(1).mean())
    best = max(likeness, key=lambda strength: likeness[strength])
    learned = _ridge(old, new, best)
    return Bridge(learned.weight, learned.old_mean, learned.new_mean, likeness[best])


def _ridge(old: np.ndarray, new: np.ndarray, strength: float) -> Bridge:
    old_mean, new_mean = old.mean(0), new.mean(0)
    x, y = (old - old_mean).astype(np.float64), (new - new_mean).astype(np.float64)
    gram = x.T @ x
    penalty = strength * float(np.trace(gram)) / len(gram) * np.eye(len(gram))
    weight = np.linalg.solve(gram + penalty, x.T @ y)
    return Bridge(weight.astype(np.float32), old_mean, new_mean, 0.0)


def learn_from(old: Store, new: Store, ids: Sequence[str]) -> Bridge:
    """The bridge between two collections, from those of the points that both have with true vectors."""
    ours, theirs = old.vectors(list(ids)), new.vectors(list(ids))
    mapped = {i for i, payload in new.payloads(list(ids), [BRIDGED]).items() if payload.get(BRIDGED)}
    both = [i for i in ids if i in ours and i in theirs and i not in mapped]
    if not both:
        raise UsageError("`bridge`", "no pictures that both students embedded", f"{LEAST} or more")
    return learn(np.stack([ours[i] for i in both]), np.stack([theirs[i] for i in both]))


def fill(bridge: Bridge, old: Store, new: Store, student: Student) -> int:
    """Mapped vectors for all points that the new collection lacks; how many. Payload is carried over, and
    says so (BRIDGED)."""
    count = 0
    points = iter(old.scroll(with_vectors=True))
    while batch := list(islice(points, WRITTEN_TOGETHER)):
        there = new.payloads([point.id for point in batch], [BRIDGED])
        mapped = list(_mapped(bridge, (point for point in batch if point.id not in there), student))
        if mapped:
            new.upsert(mapped)
        count += len(mapped)
    new.finish()
    return count


def _mapped(bridge: Bridge, points: Iterator[Point], student: Student) -> Iterator[Point]:
    for point in points:
        if len(point.image) != len(bridge.old_mean):
            continue  # a point without a picture's vector is left to be embedded
        fits = point.regions is not None and point.regions.shape[1] == len(bridge.old_mean)
        regions = bridge(point.regions) if fits and point.regions is not None else None
        payload = point.payload | {"student": student.model_name, BRIDGED: True}
        yield Point(point.id, bridge(point.image[None])[0], regions, payload)
