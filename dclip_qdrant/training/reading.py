"""What a run reads while it trains: two readers behind one interface.

`InMemory` gives positions within arrays that hold a whole split, `streaming.Streamed` batches that come and
go, for what doesn't fit. With both a resumed run sees the batches that the unbroken one would have seen;
in memory any number of workers sees the same ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from dclip_qdrant.training.data import Cache
from dclip_qdrant.training.distributed import Comm


class Loads(Protocol):
    """Pictures by position."""

    def load(self, i: int) -> Image.Image: ...


class Nothing:
    """Pictures of a run that reads none: its trunk rests."""

    def load(self, i: int) -> Image.Image:
        raise ValueError("a run whose trunk rests reads no pictures")


@dataclass(frozen=True)
class Rows:
    """Pictures that batches are made from: those of a whole split, or those of one streamed batch.

    `numbers` [N]: what each picture's random draws follow from.
    """

    cache: Cache
    captions: Sequence[list[str]]
    pictures: Loads
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.captions)


Drawn = np.ndarray | Rows  # a batch before it is made: positions within a task's own rows, or rows of its own


class Reader(Protocol):
    """Where batches come from."""

    size: int  # pictures of an epoch
    even: bool  # every rank is sure to have the same number of batches

    def batches(self, epoch: int, first: int, batch: int, comm: Comm) -> Iterator[Drawn]:
        """This rank's parts of the epoch's batches of `batch` pictures, from step `first` on."""
        ...

    def trained(self) -> None:
        """The next of the batches that were given has been learned from."""
        ...

    def state(self, comm: Comm) -> dict[str, Any]:
        """What a checkpoint needs beside the step. All ranks must call it where a reader isn't even."""
        ...

    def restore(self, state: dict[str, Any], comm: Comm) -> bool:
        """Whether it can go on in mid-epoch from what `state` gave; else the epoch begins again."""
        ...


def order(n: int, batch: int, *, seed: int, epoch: int) -> np.ndarray:
    """[steps, batch] picture indices of an epoch; what doesn't fill a batch waits for another epoch's
    shuffle."""
    shuffled = np.random.default_rng([seed, epoch]).permutation(n)
    return shuffled[: n // batch * batch].reshape(-1, batch)


class InMemory:
    """See `Reader`. Nothing hangs on how many read."""

    even = True

    def __init__(self, size: int, seed: int) -> None:
        self.size, self._seed = size, seed

    def batches(self, epoch: int, first: int, batch: int, comm: Comm) -> Iterator[np.ndarray]:
        yield from order(self.size, batch, seed=self._seed, epoch=epoch)[first:, comm.rank :: comm.world]

    def trained(self) -> None:
        """The step says it all."""

    def state(self, comm: Comm) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any], comm: Comm) -> bool:
        return True
