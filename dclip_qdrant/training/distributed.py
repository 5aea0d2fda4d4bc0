"""Everything that knows of ranks: gathering a batch and summing gradients.

Each rank holds a part of the batch and computes the whole batch's loss from gathered vectors, where only its
own part carries gradient. Summed over ranks, tower gradients are then exactly the single-process gradient,
for any loss over the whole batch and with gradient caching, which DistributedDataParallel's averaging of
per-rank losses is not. Parameters inside objectives see the whole batch on every rank: theirs are equal
already.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Comm:
    """This process's place among the workers; (0, 1) is alone."""

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> "Comm":
        return (
            cls(dist.get_rank(), dist.get_world_size())
            if dist.is_available() and dist.is_initialized()
            else cls()
        )

    def gather(self, x: Tensor) -> Tensor:
        """[B, ...] of each rank -> [world * B, ...], rank by rank; gradient flows to this rank's own rows
        only. Parts must be of one size."""
        if self.world == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(parts, x.detach().contiguous())
        parts[self.rank] = x
        return torch.cat(parts)

    def sum_gradients(self, params: Iterable[nn.Parameter]) -> None:
        """Sums gradients over ranks in one flat message; a parameter without gradient counts as zero."""
        self._reduce(params, 1.0)

    def mean_gradients(self, params: Iterable[nn.Parameter]) -> None:
        self._reduce(params, 1.0 / self.world)

    def _reduce(self, params: Iterable[nn.Parameter], factor: float) -> None:
        params = list(params)
        if self.world == 1 or not params:
            return
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in params]
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat)
        flat *= factor
        for p, piece in zip(params, flat.split([g.numel() for g in grads]), strict=True):
            p.grad = piece.view_as(p)

    def spread(self, items: Sequence[T], do: Callable[[T], R]) -> list[R]:
        """`do` of every item, in order: each rank does its own share, all get all answers."""
        own = [do(item) for item in items[self.rank :: self.world]]
        if self.world == 1:
            return own
        shares: list[list[R]] = [[] for _ in range(self.world)]
        dist.all_gather_object(shares, own)
        return [shares[i % self.world][i // self.world] for i in range(len(items))]

    def agree(self, all_of: bool, any_of: bool, device: str = "cpu") -> tuple[bool, bool]:
        """Whether every rank says the first, and whether any rank says the second."""
        if self.world == 1:
            return all_of, any_of
        said = torch.tensor([int(all_of), int(not any_of)], device=device)
        dist.all_reduce(said, dist.ReduceOp.MIN)
        return bool(said[0]), not bool(said[1])

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()
