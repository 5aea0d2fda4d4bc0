"""Files whose size and time say that they are the same aren't read again."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from pictures import png

from dclip_qdrant.pictures import images
from dclip_qdrant.serving.embedder import file_state
from dclip_qdrant.serving.ingest import ingest
from dclip_qdrant.serving.stores import open_store

pytestmark = pytest.mark.slow


@pytest.fixture(params=["edge", "memory"])
def store(request, tmp_path):
    where = {"edge": str(tmp_path / "edge")} if request.param == "edge" else {"url": ":memory:"}
    opened = open_store("c", **where)
    yield opened
    opened.close()


@pytest.fixture
def shelf(tmp_path):
    """Three pictures with captions, written an hour ago."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(seed=number))
    say(folder, ["one", "two", "three"])
    hour_ago(folder)
    return folder


def say(folder, captions):
    rows = [{"file_name": f"{n}.png", "caption": caption} for n, caption in enumerate(captions)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def hour_ago(folder, seconds=3600):
    for file in folder.iterdir():
        os.utime(file, (time.time() - seconds,) * 2)


@pytest.fixture
def read(monkeypatch):
    """The names of the pictures that are read."""
    names, of_path = [], images.read
    monkeypatch.setattr(images, "read", lambda path: names.append(Path(path).name) or of_path(path))
    return names


def test_a_file_of_the_same_size_and_time_is_not_read_again(store, student, shelf, read):
    assert ingest(shelf, student, store).embedded == 3
    assert sorted(read) == ["0.png", "1.png", "2.png"]
    read.clear()
    assert ingest(shelf, student, store).row() == {
        "seen": 3,
        "embedded": 0,
        "updated": 0,
        "unchanged": 3,
        "rejected": 0,
    }
    assert read == []
    assert ingest(shelf, student, store, verify=True).unchanged == 3
    assert sorted(read) == ["0.png", "1.png", "2.png"]


def test_another_time_is_looked_at_once(store, student, shelf, read):
    ingest(shelf, student, store)
    hour_ago(shelf, 1800)  # touched, or copied
    read.clear()
    assert ingest(shelf, student, store).unchanged == 3
    assert len(read) == 3
    read.clear()
    assert ingest(shelf, student, store).unchanged == 3
    assert read == []


def test_other_pixels_and_other_words_are_noticed(store, student, shelf, read):
    ingest(shelf, student, store)
    (shelf / "1.png").write_bytes(png(seed=9))
    say(shelf, ["one", "two", "another"])
    read.clear()
    report = ingest(shelf, student, store)
    assert (report.embedded, report.unchanged) == (2, 1)
    assert sorted(read) == ["1.png", "2.png"]
    vectors = {p.payload["key"]: p.image for p in store.scroll(with_vectors=True)}
    wanted = student.embed_images([shelf / "1.png", shelf / "2.png"])
    np.testing.assert_allclose([vectors["1.png"], vectors["2.png"]], wanted, atol=1e-4)


def test_a_change_that_keeps_size_and_time_is_found_by_verify_alone(store, student, shelf):
    ingest(shelf, student, store)
    file = shelf / "1.png"
    data, state = bytearray(file.read_bytes()), file.stat()
    data[-5] ^= 1  # in the checksum of the last chunk: the picture is the same, its bytes aren't
    file.write_bytes(data)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert ingest(shelf, student, store).unchanged == 3
    report = ingest(shelf, student, store, verify=True)
    assert (report.unchanged, report.embedded + report.rejected) == (2, 1)


def test_a_file_that_was_written_a_moment_ago_is_not_trusted(tmp_path):
    """It could be written again within the tick of the file system's clock."""
    file = tmp_path / "a.png"
    file.write_bytes(b"x")
    assert file_state(str(file)) == ""
    os.utime(file, (time.time() - 60,) * 2)
    assert file_state(str(file)) == f"1/{file.stat().st_mtime_ns}"
    assert file_state(str(tmp_path)) == file_state("s3://b/a.png") == file_state("a\0b") == ""
