"""Regions found before, read part by part."""

import pytest

from dclip_qdrant.errors import SchemaError, UsageError
from dclip_qdrant.pairs import region_files
from dclip_qdrant.pairs.region_files import load_regions
from dclip_qdrant.tables.contracts import PAIRS, REGIONS
from dclip_qdrant.tables.stages import write_part


def row(i):
    return {
        "key": f"p/{i}.jpg",
        "width": 10,
        "height": 10,
        "boxes": [[0.0, 0.0, 1.0 + i, 2.0]] * (i % 3),
        "scores": [0.5] * (i % 3),
        "labels": ["cat"] * (i % 3),
    }


@pytest.fixture
def folder(tmp_path):
    for start in range(0, 100, 5):
        write_part(tmp_path, REGIONS, [row(i) for i in range(start, start + 5)])
    return tmp_path


def test_every_picture_has_its_own_boxes(folder):
    regions = load_regions(folder)
    assert len(regions) == 100
    assert set(regions) == {f"p/{i}.jpg" for i in range(100)}
    for i in (0, 99, 50, 7, 7, 98, 1):
        assert regions[f"p/{i}.jpg"].row()["boxes"] == row(i)["boxes"]
    assert "p/100.jpg" not in regions
    assert regions.get("other") is None
    with pytest.raises(KeyError):
        regions["p/100.jpg"]


def test_few_parts_are_held(folder, monkeypatch):
    monkeypatch.setattr(region_files, "PARTS_HELD", 3)
    regions = load_regions(folder)
    for i in range(100):
        assert f"p/{i}.jpg" in regions
    assert len(regions._held) == 3


def test_keys_of_one_hash_are_told_apart(folder, monkeypatch):
    monkeypatch.setattr(region_files, "_hash", lambda key: 5)
    regions = load_regions(folder)
    assert regions["p/34.jpg"].row()["boxes"] == row(34)["boxes"]
    assert "other" not in regions


def test_what_is_no_regions_folder_is_said(tmp_path):
    with pytest.raises(UsageError, match="a regions folder"):
        load_regions(tmp_path / "none")
    pairs_row = {"key": "a", "uri": "a", "width": 1, "height": 1, "captions": ["x"], "split": "train"}
    write_part(tmp_path, PAIRS, [pairs_row])
    with pytest.raises(SchemaError):
        load_regions(tmp_path)
