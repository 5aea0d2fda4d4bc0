"""One target made of several teachers: their vectors side by side, brought to the student's width.

Two models that learned from different pictures err differently, and the mean of their similarities finds
more than either (docs/results.md). With unit vectors a_m of M teachers and weights w_m,

    y = [w_1 a_1, ..., w_M a_M] / |.|,    cos(y_i, y_t) = sum_m w_m^2 cos(a_m,i, a_m,t) / sum_m w_m^2

so that one vector says what a weighted ensemble of scores says. It is kept to its d strongest directions,
the eigenvectors of mean(y_i y_i') + mean(y_t y_t') over the training pictures and captions, and turned by the
rotation that brings it nearest to the student as it starts (orthogonal Procrustes, Schönemann 1966): the
student then has the least way to go, and weights between start and end (WiSE-FT) stay meaningful.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dclip_qdrant import metrics

ROWS = 4096  # joined at a time


@dataclass(frozen=True)
class Member:
    """What one teacher says: image [N, V, D] of each picture's views, text [T, D] of all captions."""

    image: np.ndarray
    text: np.ndarray


@dataclass(frozen=True)
class JointTarget:
    """Turns the teachers' vectors of one thing into its target.

    weights [M]: of the teachers. basis [D_1 + ... + D_M, d]: the directions that are kept, turned towards
    the student.
    """

    weights: tuple[float, ...]
    basis: np.ndarray

    def __call__(self, vectors: Sequence[np.ndarray]) -> np.ndarray:
        """Each teacher's vectors [..., D_m], not normalised -> unit targets [..., d] float16."""
        shape = vectors[0].shape[:-1]
        flat = [v.reshape(-1, v.shape[-1]) for v in vectors]
        out = np.empty((len(flat[0]), self.basis.shape[1]), np.float16)
        for start, joined in _blocks(flat, self.weights):
            out[start : start + len(joined)] = metrics.normalise(joined @ self.basis)
        return out.reshape(*shape, -1)


def side_by_side(vectors: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """M arrays [N, D_m] -> [N, sum D_m], unit rows."""
    parts = [w * metrics.normalise(v.astype(np.float32)) for v, w in zip(vectors, weights, strict=True)]
    return metrics.normalise(np.concatenate(parts, 1))


def learn(members: Sequence[Member], weights: Sequence[float], start: Member, width: int) -> JointTarget:
    """The target for a student of this width that starts as `start` [N, V, width], [T, width]."""
    images = [m.image[:, 0] for m in members]
    texts = [m.text for m in members]
    moment = sum(_second_moment(side, weights) for side in (images, texts))
    basis = np.linalg.eigh(moment)[1][:, ::-1][:, :width].astype(np.float32)
    if basis.shape[1] < width:  # the teachers' widths together are less than the student's
        basis = np.pad(basis, ((0, 0), (0, width - basis.shape[1])))
    cross = np.zeros((width, width))
    for side, own in ((images, start.image[:, 0]), (texts, start.text)):
        for at, joined in _blocks(side, weights):
            like = metrics.normalise(own[at : at + len(joined)].astype(np.float32))
            cross += (joined @ basis).T.astype(np.float64) @ like / len(own)
    left, _, right = np.linalg.svd(cross)
    return JointTarget(tuple(weights), basis @ (left @ right).astype(np.float32))


def choose_weight(
    members: Sequence[Member], candidates: Sequence[float], owner: np.ndarray
) -> tuple[float, list[float]]:
    """The weight of every teacher but the first (whose weight is 1) that finds most on validation pictures
    [N] and their captions [T]: the mean of R@1, 5 and 10 of both directions; and what each candidate
    finds."""
    found = []
    for weight in candidates:
        weights = weights_of(len(members), weight)
        image = side_by_side([m.image[:, 0] for m in members], weights)
        text = side_by_side([m.text for m in members], weights)
        ranks = metrics.ranks(image, text, owner)
        found.append(metrics.mean_recall(metrics.retrieval(ranks, bootstrap=0)))
    return candidates[int(np.argmax(found))], found


def weights_of(members: int, weight: float) -> tuple[float, ...]:
    """1 for the teacher, `weight` for every further one."""
    return (1.0, *[weight] * (members - 1))


def _second_moment(vectors: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """mean(y y') [D, D] float64."""
    width = sum(v.shape[-1] for v in vectors)
    total = np.zeros((width, width))
    for _, joined in _blocks(vectors, weights):
        total += joined.T.astype(np.float64) @ joined
    return total / len(vectors[0])


def _blocks(vectors: Sequence[np.ndarray], weights: Sequence[float]) -> Iterator[tuple[int, np.ndarray]]:
    """Where each block of rows begins, and its rows side by side."""
    for start in range(0, len(vectors[0]), ROWS):
        yield start, side_by_side([v[start : start + ROWS] for v in vectors], weights)
