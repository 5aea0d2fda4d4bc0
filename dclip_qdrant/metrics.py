"""Retrieval and classification figures from vectors; numpy alone, so that both wings use the same ones.

Ranks are pessimistic: an item that ties with the right one stands before it, so that a model which says the
same of everything scores nothing. `mrr` is what DCLIP's code calls MAP: the mean over both directions of 1 /
(rank of the best right item).
"""

import math
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict, cast

import numpy as np

KS = (1, 5, 10)

# The figures of one direction and of one evaluation, in the shape of schemas/evaluation.json.
DirectionFigures = TypedDict(
    "DirectionFigures", {"r@1": float, "r@5": float, "r@10": float, "mrr": float, "map": float}
)
RetrievalFigures = TypedDict(
    "RetrievalFigures",
    {
        "t2i": DirectionFigures,
        "i2t": DirectionFigures,
        "mrr": float,
        "map": float,
        "mean_r@1": float,
        "n_images": int,
        "n_texts": int,
        "ci": NotRequired[dict[str, Any]],
    },
)


def normalise(x: np.ndarray) -> np.ndarray:
    """[N, D] -> unit rows; a zero row stays zero."""
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def shorten(x: np.ndarray, dim: int | None) -> np.ndarray:
    """[..., D] -> unit vectors of the first `dim` components; None leaves them whole."""
    return x if dim is None else normalise(x[..., :dim])


@dataclass(frozen=True)
class Ranks:
    """Where the right items came out, from 1.

    t2i [M]: rank of the caption's picture among all pictures. i2t: for each picture the ascending ranks of
    its captions among all captions.
    """

    t2i: np.ndarray
    i2t: list[np.ndarray]
    owner: np.ndarray


def ranks(image: np.ndarray, text: np.ndarray, owner: np.ndarray, *, block: int = 1024) -> Ranks:
    """image [N, D], text [M, D] unit rows, owner [M] = index of each caption's picture. Memory: block x
    max(N, M) floats."""
    owner = np.asarray(owner)
    if not (np.isfinite(image).all() and np.isfinite(text).all()):
        raise ValueError("embeddings hold NaN or infinity")
    t2i = np.empty(len(text), np.int64)
    for start in range(0, len(text), block):
        s = text[start : start + block] @ image.T
        right = s[np.arange(len(s)), owner[start : start + block]]
        t2i[start : start + block] = (s >= right[:, None]).sum(1)
    i2t: list[np.ndarray] = []
    captions: list[list[int]] = [[] for _ in range(len(image))]
    for m, n in enumerate(owner):
        captions[n].append(m)
    for start in range(0, len(image), block):
        s = image[start : start + block] @ text.T
        for row, own in zip(s, captions[start : start + block], strict=True):
            mine = np.sort(row[own])[::-1]
            others = np.delete(row, own)
            i2t.append(np.array([(others >= v).sum() for v in mine]) + np.arange(1, len(mine) + 1))
    return Ranks(t2i, i2t, owner)


def per_picture(r: Ranks) -> dict[str, np.ndarray]:
    """Every figure as one number a picture [N] (captions of a picture averaged), so that means and bootstraps
    are sums over pictures."""
    n = len(r.i2t)
    count = np.maximum(np.bincount(r.owner, minlength=n), 1)
    mean = lambda v: np.bincount(r.owner, weights=v, minlength=n) / count
    best = np.array([x[0] if len(x) else np.iinfo(np.int64).max for x in r.i2t])
    out = {f"t2i.r@{k}": mean(r.t2i <= k) for k in KS} | {f"i2t.r@{k}": (best <= k).astype(float) for k in KS}
    # one right picture a caption: average precision is the reciprocal rank
    out["t2i.mrr"] = out["t2i.map"] = mean(1.0 / r.t2i)
    out["i2t.mrr"] = 1.0 / best
    out["i2t.map"] = np.array([np.mean(np.arange(1, len(x) + 1) / x) if len(x) else 0.0 for x in r.i2t])
    return out


def mean_recall(figures: RetrievalFigures) -> float:
    """The mean of R@1, 5 and 10 of both directions. R@1 alone is one picture in a hundred of noise on small
    splits: what is chosen is chosen by all three."""
    directions: tuple[Any, ...] = (figures["t2i"], figures["i2t"])
    return float(np.mean([way[f"r@{k}"] for way in directions for k in KS]))


def retrieval(r: Ranks, *, bootstrap: int = 1000, seed: int = 0) -> RetrievalFigures:
    """The figures of one evaluation; `ci` holds 95% percentile intervals from resampling pictures with their
    captions."""
    each = per_picture(r)
    weights = np.bincount(r.owner, minlength=len(r.i2t)).astype(float)
    keys = list(each)
    values = np.stack([each[k] for k in keys])  # [F, N]
    by_caption = np.array([k.startswith("t2i") for k in keys])

    def means(take: np.ndarray) -> np.ndarray:
        w = weights[take]
        plain = values[:, take].mean(1)
        # t2i averages over captions
        return np.where(by_caption, (values[:, take] * w).sum(1) / w.sum(), plain)

    out: dict[str, Any] = {"t2i": {}, "i2t": {}}
    point = means(np.arange(len(weights)))
    for key, v in zip(keys, point, strict=True):
        way, figure = key.split(".")
        out[way][figure] = float(v)
    for figure in ("mrr", "map"):
        out[figure] = (out["t2i"][figure] + out["i2t"][figure]) / 2
    out["mean_r@1"] = (out["t2i"]["r@1"] + out["i2t"]["r@1"]) / 2
    out["n_images"], out["n_texts"] = len(r.i2t), len(r.t2i)
    if bootstrap:
        rng = np.random.default_rng(seed)
        drawn = np.stack([means(rng.integers(0, len(weights), len(weights))) for _ in range(bootstrap)])
        low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
        intervals: dict[str, Any] = {"t2i": {}, "i2t": {}}
        for key, a, b in zip(keys, low, high, strict=True):
            way, figure = key.split(".")
            intervals[way][figure] = [float(a), float(b)]
        mean_r1 = (drawn[:, keys.index("t2i.r@1")] + drawn[:, keys.index("i2t.r@1")]) / 2
        intervals["mean_r@1"] = [float(v) for v in np.percentile(mean_r1, [2.5, 97.5])]
        out["ci"] = intervals
    return cast(RetrievalFigures, out)


def mean_r1(r: Ranks) -> np.ndarray:
    """Recall@1 of each picture [N], the mean of both directions: what runs are compared by."""
    each = per_picture(r)
    return (each["t2i.r@1"] + each["i2t.r@1"]) / 2


def paired_difference(
    a: np.ndarray, b: np.ndarray, *, bootstrap: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """b minus a, scores of the same pictures (`mean_r1`), with its 95% paired-bootstrap interval: [N], or
    [S, N] of S models that differ by their seed.

    Pictures are drawn again, and so are seeds where there are several: one fewer than there are, which makes
    the variance of a mean of few right (Rao & Wu 1988, Resampling Inference With Complex Survey Data). As
    many on both sides are the same seeds, and drawn together.
    """
    a, b = np.atleast_2d(a), np.atleast_2d(b)
    pictures = a.shape[1]
    rng = np.random.default_rng(seed)

    def seeds_of(scores: np.ndarray) -> np.ndarray:
        count = len(scores)
        return rng.integers(0, count, max(count - 1, 1))

    drawn = []
    for _ in range(bootstrap):
        take = rng.integers(0, pictures, pictures)
        of_b = seeds_of(b)
        of_a = of_b if len(a) == len(b) else seeds_of(a)
        drawn.append(b[:, take].mean(1)[of_b].mean() - a[:, take].mean(1)[of_a].mean())
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"difference": float(b.mean() - a.mean()), "ci": [float(low), float(high)]}


def pictures_needed(difference: np.ndarray) -> int | None:
    """How many pictures it takes until the 95% interval of a mean difference [N] as large as this one leaves
    0 out: (1.96 sd / mean)^2, rounded up. None where there is no difference at all."""
    mean = float(np.mean(difference))
    if mean == 0 or len(difference) < 2:
        return None
    return math.ceil((1.96 * float(np.std(difference, ddof=1)) / mean) ** 2)


def ratio_interval(
    base: np.ndarray, own: np.ndarray, *, bootstrap: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The 95% paired-bootstrap interval of mean(own) / mean(base), right or wrong [N] on the same
    pictures."""
    rng = np.random.default_rng(seed)
    ratios = []
    for _ in range(bootstrap):
        drawn = rng.integers(0, len(base), len(base))
        ratios.append(own[drawn].mean() / max(base[drawn].mean(), 1e-9))
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def ratio_error(base: np.ndarray, own: np.ndarray) -> float:
    """The standard error of mean(own) / mean(base), right or wrong [N] on the same pictures: the delta method
    for a ratio of paired means (Cochran 1977, Sampling Techniques, eq. 2.46)."""
    most = max(float(base.mean()), 1e-9)
    left = own.astype(float) - own.mean() / most * base.astype(float)
    return float(left.std() / (most * len(base) ** 0.5))


def zero_shot_right(image: np.ndarray, label: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Which of image [N, D] are nearest to their own class of [C, D]; label [N]. Ties count as wrong."""
    s = image @ classes.T
    right = s[np.arange(len(s)), label]
    return (s >= right[:, None]).sum(1) == 1


def zero_shot(image: np.ndarray, label: np.ndarray, classes: np.ndarray) -> float:
    """Top-1 accuracy: the mean of `zero_shot_right`."""
    return float(zero_shot_right(image, label, classes).mean())
