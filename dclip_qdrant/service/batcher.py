"""Micro-batching without waiting: while one batch is embedded the next one gathers.

An idle service answers a lone request at once; a busy one embeds whatever came meanwhile in one go. There is
no timer to tune.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import numpy as np

from dclip_qdrant.service.limits import Refused


class Line:
    """How many inputs wait in the whole service; beyond `most` a request is told to come back."""

    def __init__(self, most: int) -> None:
        self.most, self.now = most, 0

    def enter(self, count: int) -> None:
        if self.now + count > self.most:
            raise Refused(
                429, f"{self.now:,} inputs are waiting; come back in a second", {"Retry-After": "1"}
            )
        self.now += count

    def leave(self, count: int) -> None:
        self.now -= count


class Batcher:
    """`await batcher(items)` -> one vector an item. `embed` (blocking, on `pool`) gets up to `most` items of
    any callers."""

    def __init__(
        self,
        embed: Callable[[list[Any]], np.ndarray],
        pool: Executor,
        *,
        most: int,
        seen: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._embed, self._pool, self._most, self._seen = embed, pool, most, seen
        self._waiting: deque[tuple[Any, asyncio.Future]] = deque()
        self._running = False

    async def __call__(self, items: list[Any]) -> list[np.ndarray]:
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in items]
        self._waiting.extend(zip(items, futures, strict=True))
        if not self._running:
            self._running = True
            task = loop.create_task(self._run())
            task.add_done_callback(lambda t: t.exception())
        try:
            return await asyncio.gather(*futures)
        finally:
            for f in futures:
                f.cancel()  # of a caller that went away; a finished one doesn't mind

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch = []
                while self._waiting and len(batch) < self._most:
                    item, future = self._waiting.popleft()
                    if not future.cancelled():
                        batch.append((item, future))
                if not batch:
                    continue
                self._seen(len(batch))
                try:
                    vectors = await asyncio.get_running_loop().run_in_executor(
                        self._pool, self._embed, [i for i, _ in batch]
                    )
                    if not np.isfinite(vectors).all():
                        raise FloatingPointError("the model gave NaN or infinity")
                except Exception as e:
                    for _, future in batch:
                        if not future.done():
                            future.set_exception(Refused(500, f"embedding failed: {type(e).__name__}"))
                    continue
                for (_, future), vector in zip(batch, vectors, strict=True):
                    if not future.done():
                        future.set_result(vector)
        finally:
            self._running = False
