"""The streamed reader: batches that come and go, in memory that doesn't hang on the number of pairs.

The feature stage is cut into pieces, row groups of whole pictures. An `Order` deals them out to ranks, anew
each epoch, and says which pieces make a window: what is read together, and shuffled. All of it follows from
(seed, epoch, rank), so that a resumed run sees the batches that the unbroken one would have seen:
checkpoints hold how far each rank has come.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

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
from dclip_qdrant.training.reading import Nothing, Rows

WINDOW_ROWS = 4096  # of the features that are read together and shuffled, or fewer: pictures may be large
WINDOW_BYTES = 128e6
FEW = 64  # pieces a rank: of fewer, every rank reads a share of each
OF_VIEWS = ("key", "view", "crop", "flip", "trunk", "image", "captions")
AGAIN = "run it again with `from_scratch`"


@dataclass(frozen=True)
class Piece:
    """One row group of the features stage, and of the teacher cache made from it. Plain values alone: it
    travels to Ray's tasks."""

    features: str  # a part's file
    group: int  # of that file
    first: int  # the number of its first row, over the whole stage
    rows: int
    size: int  # bytes of all its columns
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
            own = metadata.row_group(group)
            into = None if taught is None else str(taught)
            pieces.append(Piece(str(file), group, first, own.num_rows, own.total_byte_size, into))
            first += own.num_rows
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


class Place(NamedTuple):
    """How far a rank has come."""

    epoch: int
    window: int  # of the epoch
    row: int  # of the window; those before it have been learned from

    @staticmethod
    def of_all(state: Mapping[str, Any], world: int) -> "list[Place] | None":
        """One a rank, from what `Streamed.state` wrote; None where other ranks than these wrote it."""
        places = [Place(*place) for place in state["places"].tolist()] if "places" in state else []
        return places if len(places) == world else None


@dataclass(frozen=True)
class Order:
    """Which pictures one rank reads in an epoch, and in which order: the same whoever asks."""

    pieces: tuple[Piece, ...]
    seed: int
    rank: int
    world: int

    @property
    def _shared(self) -> bool:
        """Whether each rank takes a share of every piece; else whole pieces are dealt out."""
        return len(self.pieces) < FEW * self.world

    @cached_property
    def _of_a_window(self) -> int:
        rows, size = sum(p.rows for p in self.pieces), sum(p.size for p in self.pieces)
        count = min(
            len(self.pieces) * WINDOW_ROWS / max(1, rows), len(self.pieces) * WINDOW_BYTES / max(1, size)
        )
        return max(1, int(count * (self.world if self._shared else 1)))

    def _of_epoch(self, epoch: int) -> np.ndarray:
        mixed = np.random.default_rng([self.seed, epoch]).permutation(len(self.pieces))
        return mixed if self._shared else mixed[self.rank :: self.world]

    @cached_property
    def windows(self) -> int:
        """Of an epoch."""
        return -(-len(self._of_epoch(0)) // self._of_a_window)

    def read(self, epoch: int, window: int, columns: tuple[str, ...]) -> pa.Table:
        """The pictures of one window, as `read_piece` gives them, shuffled; each with its `Place`."""
        first = window * self._of_a_window
        tables: list[pa.Table] = []
        for i in self._of_epoch(epoch)[first : first + self._of_a_window]:
            table = read_piece(self.pieces[i], columns)
            # another share each epoch, so that it isn't always the same pictures that come together
            share = slice((self.rank + epoch + int(i)) % self.world, None, self.world)
            tables.append(table.take(np.arange(table.num_rows)[share]) if self._shared else table)
        whole = pa.concat_tables(tables)
        mixed = np.random.default_rng([self.seed, epoch, self.rank, window]).permutation(whole.num_rows)
        place = {"epoch": np.full(len(mixed), epoch), "window": np.full(len(mixed), window)}
        place["row"] = np.arange(len(mixed))
        table = whole.take(mixed)
        for name, values in place.items():
            table = table.append_column(name, pa.array(values, pa.int64()))
        return table


OpenStream = Callable[[], Iterator[pa.Table]]  # a rank's windows, from a place before the run's own on


class Streamed:
    """See `reading.Reader`."""

    even = False

    def __init__(
        self,
        open_stream: OpenStream,
        size: int,
        *,
        need: tuple[str, ...],
        regions: int,
        where: object,
    ) -> None:
        """`open_stream`: what `Order.read` gives, window after window and epoch after epoch."""
        self.size = size
        self._open, self._need, self._regions, self._where = open_stream, need, regions, where
        self._stream: Iterator[pa.Table] | None = None
        self._next: pa.Table | None = None  # of the epoch after this one
        self._at = Place(0, 0, 0)
        self._drawn: deque[Place] = deque()  # where batches end that are not learned from yet

    def batches(self, epoch: int, first: int, batch: int, comm: Comm) -> Iterator[Rows]:
        if first == 0:
            self._at = Place(epoch, 0, 0)
        self._drawn.clear()
        size = batch // comm.world
        waiting: list[pa.Table] = []
        count = 0
        for table in self._tables(epoch):
            waiting.append(table)
            count += table.num_rows
            while count >= size:
                joined = pa.concat_tables(waiting)
                drawn = joined.slice(0, size)
                last = Place(**{name: drawn[name][-1].as_py() for name in Place._fields})
                self._drawn.append(last._replace(row=last.row + 1))
                yield self._rows(drawn)
                waiting, count = [joined.slice(size)], count - size

    def _tables(self, epoch: int) -> Iterator[pa.Table]:
        """Those of this epoch, from this reader's place on."""
        after = self._at
        if self._stream is None:
            self._stream = self._open()
        while True:
            table = next(self._stream, None) if self._next is None else self._next
            self._next = None
            if table is None:
                return
            of = table["epoch"][0].as_py()
            if of > epoch:
                self._next = table
                return
            if of == epoch:
                window, row = (table[name].to_numpy() for name in ("window", "row"))
                fresh = (window > after.window) | ((window == after.window) & (row >= after.row))
                if fresh.any():
                    yield table if fresh.all() else table.filter(pa.array(fresh))

    def _rows(self, table: pa.Table) -> Rows:
        table = table.drop_columns([*Place._fields]).combine_chunks()
        return rows_of(table, need=self._need, regions=self._regions, where=self._where)

    def trained(self) -> None:
        self._at = self._drawn.popleft()

    def state(self, comm: Comm) -> dict[str, Any]:
        """`places` [world, 3]: how far each rank has come."""
        places = comm.spread(range(comm.world), lambda rank: tuple(self._at))
        return {"places": torch.tensor(places, dtype=torch.int64)}

    def restore(self, state: dict[str, Any], comm: Comm) -> bool:
        places = Place.of_all(state, comm.world)
        if places is None:
            return False
        self._at = places[comm.rank]
        return True
