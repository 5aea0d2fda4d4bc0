"""A run's features as a Ray Data stream: pieces in a new order each epoch, read by Ray's tasks, shuffled
again in each rank's buffer."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from upath import UPath

from dclip_qdrant.jobs.cluster import quiet_data_context
from dclip_qdrant.training.runs import Run, needs
from dclip_qdrant.training.streaming import BUFFER, OpenEpoch, Piece, columns_for, pieces_of, read_piece

MOST_BLOCKS = 2048  # of a dataset; Ray keeps an account of each


def dataset_of(run: Run) -> Any:
    """The `ray.data.Dataset` of a run: one row a picture of train, as `read_piece` gives it."""
    import ray

    quiet_data_context()
    columns = columns_for(needs(run), pictures=run.kind == "student")
    teacher = UPath(run.teacher) if run.teacher else None
    pieces = [asdict(piece) for piece in pieces_of(UPath(run.features), teacher)]

    def read(table: pa.Table) -> Iterator[pa.Table]:
        for values in table.to_pylist():
            rows = read_piece(Piece(**values), columns)
            if rows.num_rows:
                yield rows

    # neighbours go apart once; then whole blocks change places each epoch, which moves no data
    np.random.default_rng(run.seed).shuffle(pieces)  # pyright: ignore[reportArgumentType]
    blocks = min(len(pieces), MOST_BLOCKS)
    dataset = ray.data.from_items(pieces, override_num_blocks=blocks).randomize_block_order()
    return dataset.map_batches(read, batch_format="pyarrow", batch_size=None, zero_copy_batch=True)


def opened(shard: Any, seed: int) -> OpenEpoch:
    """A shard of the dataset (or the whole) as `Streamed` reads it."""

    def open_epoch(rows: int) -> Iterator[pa.Table]:
        return iter(
            shard.iter_batches(
                batch_size=rows,
                batch_format="pyarrow",
                prefetch_batches=1,
                local_shuffle_buffer_size=max(BUFFER, 2 * rows),
                local_shuffle_seed=seed,
                drop_last=False,
            )
        )

    return open_epoch
