"""Output projections in closed form: the ridge regression of targets on what the trunks below them say.

    W = argmin mean |x W - y|^2 + lambda s |W|^2,   s the features' mean variance

One pass of linear algebra says what hundreds of steps of a projection on a resting trunk would look for. The
strength lambda is chosen on a tenth of the rows that the others are fitted without.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dclip_qdrant import metrics
from dclip_qdrant.training.data import Cache
from dclip_qdrant.training.models.two_tower import TwoTower

STRENGTHS = (0.001, 0.01, 0.1, 0.3, 1.0)
HELD_OUT = 10  # every so many rows
BLOCK = 8192  # rows


@dataclass(frozen=True)
class Fit:
    """weights [F, D], offset [D] (zero where there is to be none); the strength, and the mean cosine of
    held-out rows to their targets."""

    weights: np.ndarray
    offset: np.ndarray
    strength: float
    cosine: float


def ridge(features: np.ndarray, targets: np.ndarray, *, offset: bool) -> Fit:
    """features [N, F], targets [N, D] -> the fit on all rows, at the strength that is best on held-out
    rows."""
    held = np.arange(len(features)) % HELD_OUT == HELD_OUT - 1
    if not held.any():
        held[-1] = True
    learned = _Moments.of(features, targets, ~held, offset)
    x, y = features[held].astype(np.float64), metrics.normalise(targets[held])

    def cosine(strength: float) -> float:
        weights, shift = learned.solve(strength)
        return float((metrics.normalise(x @ weights + shift) * y).sum(1).mean())

    cosines = [cosine(strength) for strength in STRENGTHS]
    best = int(np.argmax(cosines))
    every = _Moments.of(features, targets, np.ones(len(features), bool), offset)
    return Fit(*every.solve(STRENGTHS[best]), STRENGTHS[best], cosines[best])


@dataclass(frozen=True)
class _Moments:
    """The normal equations of chosen rows, with the features' moment as its eigenvectors and -values: one
    decomposition serves all strengths."""

    vectors: np.ndarray  # [F, F]
    values: np.ndarray  # [F]
    cross: np.ndarray  # [F, D]
    mean_x: np.ndarray  # [F], 0 without an offset
    mean_y: np.ndarray  # [D], 0 without an offset
    variance: float  # of a feature, on average

    @classmethod
    def of(cls, features: np.ndarray, targets: np.ndarray, chosen: np.ndarray, offset: bool) -> "_Moments":
        rows = np.flatnonzero(chosen)
        width, dim, n = features.shape[1], targets.shape[1], len(rows)
        moment, cross = np.zeros((width, width)), np.zeros((width, dim))
        mean_x, mean_y = np.zeros(width), np.zeros(dim)
        for start in range(0, n, BLOCK):
            at = rows[start : start + BLOCK]
            x, y = features[at].astype(np.float64), targets[at].astype(np.float64)
            moment += x.T @ x / n
            cross += x.T @ y / n
            mean_x += x.sum(0) / n
            mean_y += y.sum(0) / n
        variance = float((np.trace(moment) - mean_x @ mean_x) / width)
        if offset:
            moment -= np.outer(mean_x, mean_x)
            cross -= np.outer(mean_x, mean_y)
        else:
            mean_x, mean_y = np.zeros(width), np.zeros(dim)
        values, vectors = np.linalg.eigh(moment)
        return cls(vectors, values, cross, mean_x, mean_y, variance)

    def solve(self, strength: float) -> tuple[np.ndarray, np.ndarray]:
        """The weights and the offset."""
        damped = np.maximum(self.values, 0) + max(strength * self.variance, 1e-12)
        weights = self.vectors @ ((self.vectors.T @ self.cross) / damped[:, None])
        return weights, self.mean_y - self.mean_x @ weights


def fit(model: TwoTower, own: Cache, targets: Cache, log: Callable[[str], None]) -> None:
    """Puts into both output projections what brings the student nearest to `targets`.

    own: what the student says of the same pictures and captions: features below each projection where the
    tower gives them (a timm image trunk), else its embeddings, of which a linear map is fitted and folded in.
    """
    pieces = (
        ("image", own.trunk, own.image, targets.teacher[:, :, 0]),
        ("text", own.text_trunk, own.texts, targets.texts),
    )
    for place, (tower, trunk, embeddings, wanted) in enumerate(pieces):
        head = model.output_projections()[place]
        below = trunk is not None and trunk.shape[-1] == _width_in(head)
        features = embeddings if trunk is None or not below else trunk
        offset = below and isinstance(head, nn.Linear) and head.bias is not None
        best = ridge(_rows(features), _rows(wanted), offset=offset)
        if below:
            _put(head, best)
        else:
            maps = [torch.eye(model.dim, dtype=torch.float64)] * 2
            maps[place] = torch.from_numpy(best.weights)
            model.map_outputs(*maps)
        log(f"{tower} projection fitted: cosine {best.cosine:.3f} to held-out targets ({best.strength:g})")


@torch.no_grad()
def _put(head: nn.Linear | Tensor, best: Fit) -> None:
    if isinstance(head, Tensor):
        head.copy_(torch.from_numpy(best.weights))
        return
    head.weight.copy_(torch.from_numpy(best.weights.T.copy()))
    if head.bias is not None:
        head.bias.copy_(torch.from_numpy(best.offset))


def _width_in(head: nn.Linear | Tensor) -> int:
    return head.shape[0] if isinstance(head, Tensor) else head.in_features


def _rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])
