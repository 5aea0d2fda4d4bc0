"""Base-to-novel, cross-dataset and domain generalisation over any labelled pictures (the protocols of CoOp,
CoCoOp and PromptKD)."""

from dataclasses import dataclass

import numpy as np

from dclip_qdrant.errors import InputError
from dclip_qdrant.pairs.labelled import Labelled


@dataclass(frozen=True)
class Split:
    """Indices into one labelled set.

    `base` and `novel`: class numbers. `shots`: the labelled training pictures, of base classes alone;
    `unlabelled`: training pictures of all classes, whose labels nobody looks at (the lineage is
    transductive); `test`: the rest.
    """

    base: np.ndarray
    novel: np.ndarray
    shots: np.ndarray
    unlabelled: np.ndarray
    test: np.ndarray


def base_to_novel(data: Labelled, *, shots: int = 16, test: float = 0.5, seed: int = 0) -> Split:
    """The first half of the classes by name is base (the larger one, where they are odd), the other novel;
    half of each class's pictures is for testing.

    Raises:
        InputError: fewer than two classes, or a class with fewer than two pictures.
    """
    labels = np.array(data.labels)
    half = (len(data.names) + 1) // 2
    base, novel = np.arange(half), np.arange(half, len(data.names))
    return Split(base, novel, *_draw(data, labels, base, shots, test, seed))


def all_classes(data: Labelled, *, shots: int = 16, test: float = 0.5, seed: int = 0) -> Split:
    """Every class is base: the source of cross-dataset and domain-generalisation protocols."""
    labels = np.array(data.labels)
    every = np.arange(len(data.names))
    return Split(every, every[:0], *_draw(data, labels, every, shots, test, seed))


def _draw(
    data: Labelled, labels: np.ndarray, base: np.ndarray, shots: int, test: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    few, rest, held = [], [], []
    for c, name in enumerate(data.names):
        mine = np.random.default_rng([seed, c]).permutation(np.flatnonzero(labels == c))
        cut = round(len(mine) * (1 - test))
        if not 0 < cut < len(mine):
            raise InputError(
                name,
                f"{len(mine)} pictures of this class",
                "two or more: some to learn from, some to test on",
            )
        rest += mine[:cut].tolist()
        held += mine[cut:].tolist()
        if c in base:
            few += mine[: min(shots, cut)].tolist()
    return np.array(few), np.array(rest), np.array(held)


def harmonic_mean(base: float, novel: float) -> float:
    """2 b n / (b + n); 0 where either is 0."""
    return 2 * base * novel / (base + novel) if base > 0 and novel > 0 else 0.0


def accuracy(logits: np.ndarray, labels: np.ndarray, among: np.ndarray) -> float:
    """Top-1 of logits [N, C] for pictures of the classes `among`, which alone are the choice; ties count as
    wrong. NaN where no picture is of them."""
    mine = np.isin(labels, among)
    if not mine.any():
        return float("nan")
    scores = logits[mine][:, among]
    right = scores[np.arange(len(scores)), np.searchsorted(among, labels[mine])]
    return float(((scores >= right[:, None]).sum(1) == 1).mean())


def figures(logits: np.ndarray, labels: np.ndarray, split: Split) -> dict[str, float]:
    """base, novel and harmonic mean of one model over the test pictures' logits [N, C]; base alone where
    there are no novel classes."""
    b = accuracy(logits, labels, split.base)
    if not len(split.novel):
        return {"base": b}
    n = accuracy(logits, labels, split.novel)
    return {"base": b, "novel": n, "harmonic_mean": harmonic_mean(b, n)}
