"""Many small parts become few large ones, and a kill in between changes nothing."""

import json

import pyarrow.parquet as pq
import pytest
from upath import UPath

from dclip_qdrant.tables import compact as module
from dclip_qdrant.tables.compact import compact
from dclip_qdrant.tables.contracts import REGIONS
from dclip_qdrant.tables.stages import part_files, parts, write_part


def row(i):
    return {
        "key": f"{i:03d}",
        "width": i,
        "height": 2,
        "boxes": [[0.0, 1.0, 2.0, 3.0]] * (i % 3),
        "scores": [0.5] * (i % 3),
        "labels": ["cat"] * (i % 3),
    }


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    place = UPath(tmp_path) if request.param == "local" else UPath(f"memory://{tmp_path.name}")
    place.mkdir(parents=True, exist_ok=True)
    for start in range(0, 60, 4):
        write_part(place, REGIONS, [row(i) for i in range(start, start + 4)])
    return place


def rows_of(folder):
    columns = list(REGIONS.columns)
    return sorted((r for t in parts(folder, REGIONS, columns) for r in t.to_pylist()), key=lambda r: r["key"])


WANTED = [row(i) for i in range(60)]


def test_every_row_is_there_once_in_few_parts(folder):
    compact(folder, REGIONS, rows=25)
    assert rows_of(folder) == WANTED
    sizes = sorted(t.num_rows for t in parts(folder, REGIONS, ["key"]))
    assert sizes == [4, 28, 28]
    with part_files(folder)[0].open("rb") as f:
        assert pq.read_schema(f).metadata[b"dclip.contract"] == b"regions/1"
    compact(folder, REGIONS, rows=25)  # again: nothing to do
    assert sorted(t.num_rows for t in parts(folder, REGIONS, ["key"])) == sizes
    assert not list(folder.glob("merge-*"))


@pytest.mark.parametrize("moment", ["before the part", "before the old ones go", "while the old ones go"])
def test_a_kill_in_between_loses_and_doubles_nothing(folder, moment, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "before the part":
            patch.setattr(module.pq, "ParquetWriter", killed)
        else:
            patch.setattr(module, "_finish", killed)
        with pytest.raises(KeyboardInterrupt):
            compact(folder, REGIONS, rows=25)
    (note,) = folder.glob("merge-*.json")
    if moment == "while the old ones go":
        (folder / json.loads(note.read_text())["parts"][0]).unlink()
    compact(folder, REGIONS, rows=25)
    assert rows_of(folder) == WANTED
    assert not list(folder.glob("merge-*"))
