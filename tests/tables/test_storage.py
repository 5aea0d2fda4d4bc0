"""Paths, URIs and writing whole or not at all; `memory://` is an object store that needs no server."""

import fsspec
import pytest

from dclip_qdrant.errors import UsageError
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.pairs.build import build
from dclip_qdrant.serving.student import Student
from dclip_qdrant.tables import storage

KIND = storage.FolderKind("pairs", "manifest.json", "contract", ("value", "inner"))


@pytest.fixture
def bucket():
    """A place of this test's own in fsspec's memory."""
    yield "memory://bucket"
    memory = fsspec.filesystem("memory")
    if memory.exists("/bucket"):
        memory.rm("/bucket", recursive=True)


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("bucket")


def fail_after_half(path):
    with storage.writing(path) as file:
        file.write(b"half")
        raise OSError("disk full")


def test_a_file_appears_when_it_is_whole(root):
    path = f"{root}/a/b.txt"
    with pytest.raises(OSError, match="disk full"):
        fail_after_half(path)
    assert not storage.as_path(path).exists()
    storage.write_text(path, "whole")
    assert storage.as_path(path).read_text() == "whole"
    with pytest.raises(OSError, match="disk full"):
        fail_after_half(path)
    assert storage.as_path(path).read_text() == "whole"
    assert [f.name for f in storage.as_path(f"{root}/a").iterdir()] == ["b.txt"]


def test_a_folder_appears_when_it_is_whole(root):
    target = f"{root}/made"

    def fail_inside():
        with storage.new_folder(target, KIND, overwrite=False) as part:
            storage.write_text(part / "half", "")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail_inside()
    assert storage.is_empty(storage.as_path(target))
    with storage.new_folder(target, KIND, overwrite=False) as part:
        storage.write_text(part / "inner" / "one", "1")
        storage.write_json(part / "manifest.json", {"contract": "pairs/1"})
    assert storage.as_path(f"{target}/inner/one").read_text() == "1"


def test_what_somebody_else_keeps_there_stays(root):
    theirs = f"{root}/theirs"
    storage.write_text(f"{theirs}/thesis.txt", "years of work")
    for overwrite in (False, True):
        with (
            pytest.raises(UsageError, match="something else than pairs"),
            storage.new_folder(theirs, KIND, overwrite=overwrite),
        ):
            raise AssertionError("never entered")
    assert storage.as_path(f"{theirs}/thesis.txt").read_text() == "years of work"


def test_ours_is_replaced_only_when_asked(root):
    ours = f"{root}/ours"
    for content in ("1", "2"):
        with storage.new_folder(ours, KIND, overwrite=content == "2") as part:
            storage.write_text(part / "value", content)
            storage.write_json(part / "manifest.json", {"contract": "pairs/1"})
    assert storage.as_path(f"{ours}/value").read_text() == "2"
    with (
        pytest.raises(UsageError, match="`overwrite`"),
        storage.new_folder(ours, KIND, overwrite=False),
    ):
        raise AssertionError("never entered")


def test_a_folder_of_ours_with_somebody_elses_file_is_not_replaced(root):
    ours = f"{root}/ours"
    with storage.new_folder(ours, KIND, overwrite=False) as part:
        storage.write_json(part / "manifest.json", {"contract": "pairs/1"})
    storage.write_text(f"{ours}/notes.txt", "mine")
    with pytest.raises(UsageError, match=r"'notes.txt' lies among the pairs"):
        storage.check_free(ours, KIND, overwrite=True)
    assert storage.as_path(f"{ours}/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("manifest", ['{"name": "a web app"}', "[]", "{oops"])
def test_somebody_elses_manifest_is_not_ours(root, manifest):
    storage.write_text(f"{root}/theirs/manifest.json", manifest)
    with pytest.raises(UsageError, match="something else than pairs"):
        storage.check_free(f"{root}/theirs", KIND, overwrite=True)


def test_a_uri_is_refused_by_name_where_a_disk_is_needed():
    with pytest.raises(UsageError, match="an embedded collection: s3://bucket/x; expected a local path"):
        storage.local_path("s3://bucket/x", "an embedded collection")
    assert str(storage.local_path("file:///data/x", "anything")) == "/data/x"


def test_pairs_are_made_and_read_in_a_bucket(scenes_folder, bucket):
    manifest = build(str(scenes_folder), f"{bucket}/pairs")
    pairs = Pairs.open(f"{bucket}/pairs")
    assert pairs.splits() == manifest["splits"]
    assert pairs.fingerprint == manifest["fingerprint"]
    with pytest.raises(UsageError, match="here already"):
        build(str(scenes_folder), f"{bucket}/pairs")


def test_a_student_in_a_bucket_is_copied_here_and_checked(student_folder, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    storage.copy_folder(student_folder, f"{bucket}/student")
    local, remote = Student.load(student_folder), Student.load(f"{bucket}/student")
    assert remote.fingerprint == local.fingerprint
    assert remote.embed_texts(["a red star"]) == pytest.approx(local.embed_texts(["a red star"]))
