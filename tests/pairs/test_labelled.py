"""Labelled pictures: the classes' names become prompts, so that a number is no name."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dclip_qdrant.errors import InputError
from dclip_qdrant.pairs.labelled import Labelled


def write(path: Path, labels: list, *, names: list[str] | None = None, column: str = "label") -> str:
    pictures = [{"bytes": b"x%d" % i, "path": None} for i in range(len(labels))]
    table = pa.table({"image": pictures, column: labels})
    if names is not None:
        info = {"info": {"features": {column: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({b"huggingface": json.dumps(info).encode()})
    pq.write_table(table, path / "x.parquet")
    return str(path / "x.parquet")


def test_numbers_have_the_names_of_the_files_metadata(tmp_path):
    labelled = Labelled.open(write(tmp_path, [0, 1, 0], names=["rose", "tulip"]))
    assert labelled.prompts == ["a photo of a rose.", "a photo of a tulip."]
    assert labelled.labels == (0, 1, 0)


@pytest.mark.parametrize("names", [None, ["rose"]])
@pytest.mark.parametrize("labels", [[0, 1], ["0", "1"], [0.0, 1.0]])
def test_numbers_without_names_are_refused(tmp_path, labels, names):
    with pytest.raises(InputError, match="numbers .* without names.*label_name"):
        Labelled.open(write(tmp_path, labels, names=names))


def test_a_row_without_a_class_or_picture_is_named(tmp_path):
    with pytest.raises(InputError, match="#1: no label"):
        Labelled.open(write(tmp_path, ["a", None, "b"]))
    pq.write_table(pa.table({"image": [b"x", None], "label_name": ["a", "b"]}), tmp_path / "y.parquet")
    with pytest.raises(InputError, match="#1: no picture"):
        Labelled.open(str(tmp_path / "y.parquet"))


def test_pictures_by_path_lie_beside_the_file(tmp_path):
    pictures = [{"bytes": None, "path": f"{i}.jpg"} for i in range(2)]
    pq.write_table(pa.table({"image": pictures, "label_name": ["a", "b"]}), tmp_path / "x.parquet")
    assert Labelled.open(str(tmp_path / "x.parquet")).pictures == tuple(
        str(tmp_path / f"{i}.jpg") for i in range(2)
    )


def test_halves_are_disjoint_and_have_every_class(labelled_folder):
    labelled = Labelled.open(str(labelled_folder))
    choosing, reported = labelled.halves()
    assert sorted([*choosing, *reported]) == list(range(len(labelled)))
    labels = np.array(labelled.labels)
    for number in range(len(labelled.names)):
        mine, others = (int((labels[half] == number).sum()) for half in (choosing, reported))
        assert 0 <= mine - others <= 1


def test_one_picture_a_class_can_not_be_halved(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    with pytest.raises(InputError, match="2 labelled pictures in 2 classes.*half of them choose"):
        Labelled.open(str(tmp_path)).halves()


def test_folders_of_a_nas_are_no_classes(tmp_path):
    for name in ("rose", "tulip", "@eaDir", ".thumbnails"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    labelled = Labelled.open(str(tmp_path))
    assert labelled.prompts == ["a photo of a rose.", "a photo of a tulip."]
