"""The streamed reader: what the stages hold, each picture once an epoch, and the same after a restart."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from feature_rows import KEYS, NEED, D, N, check, regions_of, vector, write_stages
from feature_rows import rows_of as feature_rows
from upath import UPath

from dclip_qdrant.errors import InputError
from dclip_qdrant.tables.compact import compact
from dclip_qdrant.tables.contracts import FEATURES
from dclip_qdrant.tables.stages import part_files, write_part
from dclip_qdrant.training import streaming
from dclip_qdrant.training.checkpoint import Checkpoints
from dclip_qdrant.training.distributed import Comm
from dclip_qdrant.training.loop import fit
from dclip_qdrant.training.reading import InMemory
from dclip_qdrant.training.streaming import (
    OF_VIEWS,
    Order,
    Place,
    Streamed,
    pieces_of,
    read_piece,
    rows_of,
)

COLUMNS = (*OF_VIEWS, *NEED)


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """Features of three parts, and a teacher cache with the same parts."""
    features, loose, teacher = (UPath(tmp_path_factory.mktemp(n)) for n in ("features", "loose", "teacher"))
    write_stages(features, loose)
    for file in part_files(features):
        keys = pq.read_table(str(file), columns=["key"])["key"].to_pylist()
        taught = [pq.read_table(str(f)) for f in part_files(loose)]
        own = next(t for t in taught if t["key"].to_pylist() == keys)
        pq.write_table(own, str(teacher / file.name))
    return features, teacher


def tables(stages):
    return [read_piece(piece, COLUMNS) for piece in pieces_of(*stages)]


def test_a_stream_gives_what_the_parts_hold(aligned):
    rows = rows_of(pa.concat_tables(tables(aligned)), need=NEED, regions=3, where="here")
    order = [rows.cache.keys.index(key) for key in KEYS]
    by_key = rows_of(pa.concat_tables(tables(aligned)).take(order), need=NEED, regions=3, where="here")
    check(by_key.cache)
    assert by_key.captions[2] == ["2 0", "2 1", "2 2"]
    assert sorted(rows.numbers.tolist()) == list(range(0, 2 * N, 2))  # its plain view's row in the stage


def test_pictures_of_other_splits_are_left_out_and_row_groups_hold_whole_pictures(tmp_path):
    folder = UPath(tmp_path)
    for i in range(N):
        write_part(folder, FEATURES, feature_rows(i, "train" if i % 3 else "val"))
    compact(folder, FEATURES, rows=18)
    (file,) = part_files(folder)
    assert pq.ParquetFile(str(file)).metadata.num_rows == 2 * N
    (table,) = [read_piece(piece, COLUMNS) for piece in pieces_of(folder)]
    keys = sorted(views[0] for views in table["key"].to_pylist())
    assert keys == [KEYS[i] for i in range(N) if i % 3]


def test_batches_of_any_pictures_have_arrays_of_one_shape(aligned):
    table = pa.concat_tables(tables(aligned))
    keys = [views[0] for views in table["key"].to_pylist()]
    bare = [keys.index(KEYS[i]) for i in range(N) if regions_of(i) == 0]
    cache = rows_of(table.take(bare), need=NEED, regions=3, where="here").cache
    assert cache.regions.shape == (len(bare), 3, D)
    assert not cache.region_mask.any()


def test_a_row_group_that_cuts_a_picture_is_refused(tmp_path):
    rows = [row for i in range(3) for row in feature_rows(i)]
    pq.write_table(FEATURES.table(rows), tmp_path / "part-a.parquet", row_group_size=3)
    pieces = pieces_of(UPath(tmp_path))
    assert [piece.first for piece in pieces] == [0, 3]
    with pytest.raises(InputError, match="begins inside a picture"):
        read_piece(pieces[1], COLUMNS)


def test_a_teacher_cache_of_other_pictures_is_refused(aligned, tmp_path):
    features, teacher = aligned
    files = part_files(teacher)
    other = UPath(tmp_path)
    for file, instead in zip(files, [*files[1:], files[0]], strict=True):
        (other / file.name).write_bytes(instead.read_bytes())
    with pytest.raises(InputError, match="other pictures"):
        tables((features, other))
    (other / files[0].name).unlink()
    with pytest.raises(InputError, match=f"no {files[0].name}"):
        pieces_of(features, other)


def order(stages, rank=0, world=1, **more):
    return Order(tuple(pieces_of(*stages)), **{"seed": 7, "rank": rank, "world": world} | more)


def numbers_of(own, epoch):
    tables = [own.read(epoch, window, COLUMNS) for window in range(own.windows)]
    return np.concatenate([table["number"].to_numpy() for table in tables]).tolist()


@pytest.mark.parametrize("few", [64, 1], ids=["shares of each piece", "whole pieces"])
def test_ranks_have_each_picture_once_an_epoch_between_them(aligned, few, monkeypatch):
    monkeypatch.setattr(streaming, "FEW", few)
    monkeypatch.setattr(streaming, "WINDOW_ROWS", 4)  # several windows
    ranks = [order(aligned, rank, 2) for rank in range(2)]
    assert sum(rank.windows for rank in ranks) > 2
    for epoch in range(3):
        both = [numbers_of(rank, epoch) for rank in ranks]
        assert sorted([*both[0], *both[1]]) == list(range(0, 2 * N, 2))
        assert both == [numbers_of(order(aligned, rank, 2), epoch) for rank in range(2)]  # whoever asks
    epochs = [tuple(numbers_of(order(aligned), epoch)) for epoch in range(4)]
    assert len(set(epochs)) == 4


def test_a_rank_s_share_is_another_one_each_epoch(aligned):
    shares = {frozenset(numbers_of(order(aligned, 0, 2), epoch)) for epoch in range(2)}
    assert len(shares) == 2


def reader(stages, rank=0, world=1, first=0):
    """A stream that begins at this epoch."""
    own = order(stages, rank, world)

    def windows():
        for epoch in range(first, 9):
            for window in range(own.windows):
                table = own.read(epoch, window, COLUMNS)
                yield from (table.slice(at, 3) for at in range(0, table.num_rows, 3))  # Ray cuts large ones

    return Streamed(windows, N, need=NEED, regions=3, where="here")


def learned(stream, epoch, first=0, most=99):
    """Numbers of the batches that a reader gives; `most` of them are learned from, and one more is read."""
    seen = []
    for batch in stream.batches(epoch, first, 2, Comm()):
        if len(seen) == most:
            break
        seen.append(batch.numbers.tolist())
        stream.trained()
    return seen


def test_a_restart_sees_what_the_unbroken_run_would_have_seen(aligned):
    unbroken = reader(aligned)
    wanted = [learned(unbroken, epoch) for epoch in range(3)]
    assert [len(batches) for batches in wanted] == [N // 2] * 3
    killed = reader(aligned)
    assert learned(killed, 0) == wanted[0]
    begun = learned(killed, 1, most=2)
    state = killed.state(Comm())
    again = reader(aligned, first=1)
    assert again.restore(state, Comm())
    assert begun + learned(again, 1, first=2) == wanted[1]
    assert learned(again, 2) == wanted[2]


def test_other_workers_than_those_that_began_an_epoch_begin_it_again(aligned, tmp_path):
    state = {"places": torch.tensor([[1, 0, 2], [1, 0, 2]])}
    assert Place.of_all(state, 2) == [(1, 0, 2), (1, 0, 2)]
    assert Place.of_all(state, 1) is None
    assert not reader(aligned).restore(state, Comm())
    checkpoints, lines = Checkpoints(UPath(tmp_path)), []
    options = OPTIONS | {"epochs": 1, "checkpoint_s": -1}
    fit(Line(), reader=reader(aligned), checkpoints=checkpoints, **options)
    whole = Line()
    fit(whole, reader=reader(aligned), **OPTIONS | {"epochs": 1})
    (tmp_path / "step-4.pt").unlink()  # the end of the epoch; step 3 is in the middle of it
    saved = checkpoints.load()
    assert saved["step"] == 3
    checkpoints.save(3, saved | {"reader": state})
    other = Line()
    fit(other, reader=reader(aligned), checkpoints=checkpoints, log=lines.append, **OPTIONS | {"epochs": 1})
    assert lines[0] == "epoch 1 begins again: other workers than these 1 had begun it"
    assert other.drawn == whole.drawn


class Line:
    """y = w x, fitted to y = 2 x; x is the first number of a picture's cached vector."""

    size = N

    def __init__(self):
        self.modules = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.modules.weight)
        self.objectives = torch.nn.Module()
        self.drawn = []

    def groups(self):
        return [{"params": list(self.modules.parameters()), "lr": 0.1, "weight_decay": 0.0}]

    def begin(self, epoch):
        """Everything learns."""

    def batch(self, drawn, epoch):
        if isinstance(drawn, np.ndarray):
            x = np.stack([vector(D, i, 5, 0) for i in drawn])[:, :1]
        else:
            x = drawn.cache.image[:, 0, :1].astype(np.float32)
        self.drawn.append(x[:, 0].tolist())
        return torch.from_numpy(x)

    def part(self, batch, start, stop):
        return batch[start:stop]

    def encode(self, part):
        return {"y": self.modules(part)}

    def fixed(self, batch):
        return {"y": 2 * batch}

    def loss(self, live, fixed):
        return (live["y"] - fixed["y"]).pow(2).mean(), {}


OPTIONS = {
    "epochs": 3,
    "batch_size": 2,
    "chunk_size": 8,
    "warmup": 0.0,
    "schedule": "constant",
    "clip_norm": None,
    "checkpoint_s": 1e9,
    "seed": 5,
}


def placed(table, epoch):
    """With the places that `Order.read` gives."""
    for name, values in (
        ("epoch", [epoch] * len(table)),
        ("window", [0] * len(table)),
        ("row", range(len(table))),
    ):
        table = table.append_column(name, pa.array(list(values), pa.int64()))
    return table


def test_the_loop_learns_the_same_from_both_readers(aligned):
    in_memory, streamed = Line(), Line()
    wanted = fit(in_memory, **OPTIONS)
    whole = pa.concat_tables(tables(aligned))
    keys = [views[0] for views in whole["key"].to_pylist()]
    position = [keys.index(key) for key in KEYS]
    epochs = iter(
        np.concatenate(list(InMemory(N, OPTIONS["seed"]).batches(e, 0, 2, Comm()))) for e in range(3)
    )
    tables_in_memory_s_order = (placed(whole.take([position[i] for i in e]), n) for n, e in enumerate(epochs))
    stream = Streamed(lambda: tables_in_memory_s_order, N, need=NEED, regions=3, where="here")
    got = fit(streamed, reader=stream, **OPTIONS)
    assert streamed.drawn == in_memory.drawn
    assert [row["loss"] for row in got] == [row["loss"] for row in wanted]


def test_an_epoch_ends_where_the_stream_ends_and_says_so(aligned):
    whole = pa.concat_tables(tables(aligned))
    lines = []
    stream = Streamed(lambda: iter([placed(whole.slice(0, 5), 0)]), N, need=NEED, regions=3, where="here")
    history = fit(Line(), reader=stream, log=lines.append, **OPTIONS | {"epochs": 1})
    assert len(history) == 1
    assert "epoch 1/1: 2 of 4 batches, the rest is left for others" in lines
