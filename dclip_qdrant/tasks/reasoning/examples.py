"""One example of any of the three tasks, and the splits that CLIP-TD's protocol asks for.

The paper's own low-shot and domain-shift splits are not published; these are ours: low-shot takes a part of
the training examples by a hash of their id (a larger part holds the smaller one), domain shift holds whole
groups out (VCR's movies, VQA's question types).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Example:
    """`text` is asked of the picture. `choices`: answers to pick from (VCR), or empty: the answer is one of
    the task's (VQA, SNLI-VE), scored by `soft`.

    `label`: the right choice. `soft`: answer -> 0..1. `group`: what domain shift holds out. `statement`: a
    sentence that is true of the picture if the right answer is, for the teacher's confidence; `truth`:
    whether it is (SNLI-VE's contradictions are not, its neutrals neither: None).
    """

    id: str
    picture: str | bytes
    text: str
    choices: tuple[str, ...] = ()
    label: int | None = None
    soft: dict[str, float] = field(default_factory=dict)
    group: str = ""
    statement: str = ""
    truth: bool | None = True
    answers: tuple[str, ...] = ()  # VQA: what ten people said


def unit(name: str, salt: str) -> float:
    """A number in 0..1 that follows from the name."""
    return int.from_bytes(hashlib.sha256(f"{salt}-{name}".encode()).digest()[:8]) / 2**64


def low_shot(examples: Sequence[Example], part: float, *, seed: int = 0) -> list[Example]:
    """That part of the examples; by id, so that 10% holds the 1%."""
    if not 0 < part <= 1:
        raise ValueError(f"part {part} must be above 0, at most 1")
    return [e for e in examples if unit(e.id, f"low-shot-{seed}") < part]


def domain_shift(
    examples: Sequence[Example], *, held_out: float = 0.2, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """(stay, shifted): whole groups are held out, about that part of the groups, at least one of several.

    Raises:
        ValueError: all examples are of one group.
    """
    groups = sorted({e.group for e in examples})
    if len(groups) < 2:
        raise ValueError(f"one group ({groups[0] if groups else 'none'}): nothing to shift to")
    ordered = sorted(groups, key=lambda g: unit(g, f"shift-{seed}"))
    out = set(ordered[: min(len(groups) - 1, max(1, round(len(groups) * held_out)))])
    return [e for e in examples if e.group not in out], [e for e in examples if e.group in out]


def vocabulary(examples: Sequence[Example], size: int = 3129) -> list[str]:
    """The answers that stand for most, most frequent first (VQA's practice keeps 3,129); ties by name."""
    total: dict[str, float] = {}
    for e in examples:
        for answer, score in e.soft.items():
            total[answer] = total.get(answer, 0.0) + score
    return sorted(total, key=lambda a: (-total[a], a))[:size]


def targets(examples: Sequence[Example], answers: Sequence[str]) -> np.ndarray:
    """[N, A] soft scores of the answers."""
    at = {a: i for i, a in enumerate(answers)}
    out = np.zeros((len(examples), len(answers)), np.float32)
    for n, e in enumerate(examples):
        for answer, score in e.soft.items():
            if answer in at:
                out[n, at[answer]] = score
    return out
