"""The streamed reader: batches that come and go, in memory that doesn't hang on the number of pairs.

The feature stage is cut into pieces, row groups of whole pictures, which are read in another order each
epoch and shuffled again in a buffer. Which pictures come together, and which rank gets them, is not
reproducible; that none comes twice in an epoch is, also after a restart: checkpoints hold the numbers of
those that were learned from.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image
from upath import UPath

from dclip_qdrant.errors import InputError
from dclip_qdrant.pictures import images
from dclip_qdrant.tables import storage
from dclip_qdrant.tables.contracts import FEATURES
from dclip_qdrant.tables.stages import part_files
from dclip_qdrant.training.data import REGION_COLUMNS, build_cache
from dclip_qdrant.training.distributed import Comm
from dclip_qdrant.training.reading import Drawn, Nothing, Rows

BUFFER = 4096  # pictures that are shuffled among each other, a rank
OF_VIEWS = ("key", "view", "crop", "flip", "trunk", "image", "captions")
AGAIN = "run it again with `from_scratch`"


@dataclass(frozen=True)
class Piece:
    """One row group of the features stage, and of the teacher cache made from it. Plain values alone: it
    travels to Ray's tasks."""

    features: str  # a part's file
    group: int  # of that file
    first: int  # the number of its first row, over the whole stage
    teacher: str | None = None


def pieces_of(features: UPath, teacher: UPath | None = None) -> list[Piece]:
    """The pieces of a stage, in order.

    Raises:
        InputError: a part of the features that the teacher cache doesn't have.
    """
    pieces: list[Piece] = []
    first = 0
    for file in part_files(features):
        taught = None if teacher is None else teacher / file.name
        if taught is not None and not taught.exists():
            raise InputError(teacher, f"no {file.name}", "the teacher's vectors of every part", AGAIN)
        with storage.open_for_arrow(file) as f:
            metadata = pq.ParquetFile(f).metadata
        for group in range(metadata.num_row_groups):
            pieces.append(Piece(str(file), group, first, None if taught is None else str(taught)))
            first += metadata.row_group(group).num_rows
    return pieces


def read_piece(piece: Piece, columns: tuple[str, ...]) -> pa.Table:
    """One row a picture of train: its number, and a list over its views of each of `columns` (and of
    `teacher_image`).

    Raises:
        InputError: a row group that doesn't begin with a picture's plain view, or that the teacher cache
            doesn't fit.
    """
    file = UPath(piece.features)
    table = _group(file, piece.group, [*columns, "split"])
    FEATURES.check(table.schema, file, columns)
    numbers = piece.first + np.arange(table.num_rows)
    views = table["view"].to_numpy()
    if len(views) and views[0] != 0:
        raise InputError(file, f"row group {piece.group} begins inside a picture", "whole pictures", AGAIN)
    is_train = np.array([split == "train" for split in table["split"].to_pylist()], bool)
    table = table.filter(pa.array(is_train)).drop_columns(["split"])
    if piece.teacher is not None:
        taught = _group(UPath(piece.teacher), piece.group, ["key", "view", "teacher_image"])
        if not (taught["key"].equals(table["key"]) and taught["view"].equals(table["view"])):
            raise InputError(piece.teacher, "other pictures than the features have", "the same", AGAIN)
        table = table.append_column("teacher_image", taught["teacher_image"])
    begins = np.flatnonzero(table["view"].to_numpy() == 0)
    offsets = pa.array([*begins, table.num_rows], pa.int32())
    lists = {name: pa.ListArray.from_arrays(offsets, _one_chunk(table[name])) for name in table.column_names}
    own = numbers[is_train][begins]
    return pa.table({"number": pa.array(own, pa.int64()), **lists})


def columns_for(need: tuple[str, ...], *, pictures: bool) -> tuple[str, ...]:
    """The columns of a piece that `build_cache` takes these from, with or without the pictures."""
    boxes = {"region_boxes"} if set(need) & set(REGION_COLUMNS) else set()
    return (*OF_VIEWS, *sorted({*need} | boxes), *(("uri", "picture") if pictures else ()))


def _group(file: UPath, group: int, columns: list[str]) -> pa.Table:
    with storage.open_for_arrow(file) as f:
        return pq.ParquetFile(f).read_row_group(group, columns=columns)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _flat(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Lists over views -> the views."""
    kind: Any = column.type
    return pa.chunked_array([chunk.flatten() for chunk in column.chunks], kind.value_type)


def rows_of(table: pa.Table, *, need: tuple[str, ...], regions: int, where: object) -> Rows:
    """Rows of `read_piece` as what a batch is made from; each picture has room for `regions` regions, so
    that all ranks' fit together."""
    views = pa.table({name: _flat(table[name]) for name in table.column_names if name != "number"})
    plain = views.filter(pc.field("view") == 0)
    captions = plain["captions"].to_pylist()
    give = lambda columns: [views.select(columns)]
    cache = build_cache(
        plain["key"].to_pylist(),
        [len(c) for c in captions],
        give,
        give if "teacher_image" in views.column_names else None,
        where=where,
        need=need,
        regions=regions,
    )
    numbers = table["number"].to_numpy()
    pictures = _Encoded(plain) if "picture" in plain.column_names else Nothing()
    return Rows(cache, captions, pictures, numbers)


def first_rows(features: UPath, teacher: UPath | None, *, need: tuple[str, ...], regions: int) -> Rows:
    """The pictures of the first piece that has any: what the rest is like.

    Raises:
        InputError: no picture of train at all.
    """
    columns = columns_for(need, pictures=True)
    for piece in pieces_of(features, teacher):
        table = read_piece(piece, columns)
        if table.num_rows:
            return rows_of(table, need=need, regions=regions, where=features)
    raise InputError(features, "no pictures of train", "features of some", AGAIN)


class _Encoded:
    """Pictures of a streamed batch, from where they are or from the bytes that came with them."""

    def __init__(self, plain: pa.Table) -> None:
        self._uris, self._pictures = plain["uri"], plain["picture"]

    def load(self, i: int) -> Image.Image:
        uri, data = self._uris[i].as_py(), self._pictures[i].as_py()
        return images.open_rgb(images.read(uri) if data is None else data, uri)


OpenEpoch = Callable[[int], Iterator[pa.Table]]  # rows a batch -> this rank's tables of an epoch, anew


class Streamed:
    """See `reading.Reader`. `open_epoch` begins an epoch of rows of `read_piece`, in another order each
    time."""

    even = False

    def __init__(
        self,
        open_epoch: OpenEpoch,
        size: int,
        *,
        need: tuple[str, ...],
        regions: int,
        where: object,
    ) -> None:
        self.size = size
        self._open, self._need, self._regions, self._where = open_epoch, need, regions, where
        self._before = np.zeros(0, np.int64)  # numbers that a checkpoint had, sorted
        self._own: list[np.ndarray] = []  # and those of this rank since

    def batches(self, epoch: int, first: int, batch: int, comm: Comm) -> Iterator[Rows]:
        if first == 0:
            self._before = np.zeros(0, np.int64)
        self._own = []
        size = batch // comm.world
        waiting: list[pa.Table] = []
        count = 0
        for table in self._open(size):
            fresh = ~np.isin(table["number"].to_numpy(), self._before, assume_unique=True)
            waiting.append(table if fresh.all() else table.filter(pa.array(fresh)))
            count += waiting[-1].num_rows
            while count >= size:
                joined = pa.concat_tables(waiting)
                yield self._rows(joined.slice(0, size))
                waiting, count = [joined.slice(size)], count - size

    def _rows(self, table: pa.Table) -> Rows:
        return rows_of(table.combine_chunks(), need=self._need, regions=self._regions, where=self._where)

    def trained(self, drawn: Drawn) -> None:
        assert isinstance(drawn, Rows)
        self._own.append(drawn.numbers)

    def state(self, comm: Comm) -> dict[str, Any]:
        """The numbers of all pictures that any rank has learned from in this epoch."""
        own = np.concatenate([np.zeros(0, np.int64), *self._own])
        shares = comm.spread(range(comm.world), lambda rank: own)
        return {"seen": torch.from_numpy(np.unique(np.concatenate([self._before, *shares])))}

    def restore(self, state: dict[str, Any]) -> None:
        self._before = state["seen"].numpy()
