"""A run's features as Ray Data streams, one a rank: windows of row groups in an order of the run's own,
read by Ray's tasks."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pyarrow as pa
from upath import UPath

from dclip_qdrant.jobs.cluster import cpus, quiet_data_context
from dclip_qdrant.training.checkpoint import Checkpoints
from dclip_qdrant.training.run import Run, needs
from dclip_qdrant.training.streaming import OpenStream, Order, Place, columns_for, pieces_of

MOST_BLOCKS = 4096  # of a dataset; Ray keeps an account of each


def name_of(run: Run, rank: int) -> str:
    """Of a rank's dataset among those that Ray Train is given."""
    return f"{run.stage.path.name}-{rank}"


def datasets_of(run: Run, workers: int) -> dict[str, Any]:
    """One `ray.data.Dataset` a rank, made each time that Ray Train starts its workers: it begins where the
    newest checkpoint ends and goes on to the end of the training."""
    teacher = UPath(run.teacher) if run.teacher else None
    pieces = pieces_of(UPath(run.features), teacher)
    orders = [Order(tuple(pieces), run.seed, rank, workers) for rank in range(workers)]
    return {name_of(run, order.rank): _Dataset(run, order) for order in orders}


class _Dataset:
    """What Ray Train calls for a rank's dataset."""

    def __init__(self, run: Run, order: Order) -> None:
        self._run, self._order = run, order

    def __call__(self) -> Any:
        import ray

        quiet_data_context()
        run, order = self._run, self._order
        folder = run.stage.path / "checkpoints"
        first = _places(str(folder), order.world, Checkpoints(folder).newest())[order.rank]
        epochs = run.recipe["train" if run.kind == "student" else "teacher"]["epochs"]
        numbers = range(first.epoch * order.windows + first.window, epochs * order.windows)
        # readers of all ranks run at any time: one that waits for its buffer to empty must not hold the CPU
        # that another rank's needs
        free = max(1, cpus() - order.world)
        tasks = max(1, free // order.world)
        return ray.data.from_items(
            list(numbers), override_num_blocks=max(1, min(len(numbers), MOST_BLOCKS))
        ).map_batches(
            _Read(order, columns_for(needs(run), pictures=run.kind == "student")),
            batch_format="pyarrow",
            batch_size=None,
            zero_copy_batch=True,
            num_cpus=min(1.0, free / (order.world * tasks)),
            compute=ray.data.TaskPoolStrategy(tasks),
        )


class _Read:
    """Numbers of windows, over all epochs -> what they hold."""

    def __init__(self, order: Order, columns: tuple[str, ...]) -> None:
        self._order, self._columns = order, columns

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for number in table["item"].to_pylist():
            epoch, window = divmod(number, self._order.windows)
            rows = self._order.read(epoch, window, self._columns)
            if rows.num_rows:
                yield rows


@lru_cache(maxsize=8)
def _places(folder: str, world: int, newest: int | None) -> list[Place]:
    """Where each rank begins; looked up once for all ranks, as a checkpoint is as large as a model."""
    saved = Checkpoints(UPath(folder)).load() if newest is not None else None
    epoch = saved["epoch"] if saved else 0
    places = Place.of_all(saved["reader"], world) if saved else None
    return places or [Place(epoch, 0, 0)] * world


def alone(run: Run) -> OpenStream:
    """What the only worker of a run reads, without Ray Train."""

    def open_stream() -> Iterator[pa.Table]:
        (make,) = datasets_of(run, 1).values()
        dataset = make()
        dataset.context.execution_options.preserve_order = True
        return opened(dataset)

    return open_stream


def opened(shard: Any) -> Iterator[pa.Table]:
    """What a rank's dataset gives, in order."""
    quiet_data_context()
    return iter(shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
