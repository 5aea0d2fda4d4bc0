"""A collection follows its source: deleted pictures, odd neighbours, places that can't be written."""

import json
import os
import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image

from dclip_qdrant.errors import InputError, StoreError, UsageError
from dclip_qdrant.pairs.readers import layout as layouts
from dclip_qdrant.pairs.readers import open_source
from dclip_qdrant.pictures import images
from dclip_qdrant.serving import embedder, prune
from dclip_qdrant.serving.collection import CollectionSpec
from dclip_qdrant.serving.embedder import Embedder
from dclip_qdrant.serving.ingest import ingest
from dclip_qdrant.serving.items import Item
from dclip_qdrant.serving.search import Fusion, search
from dclip_qdrant.serving.stores import Point, Query, open_store, place
from dclip_qdrant.serving.stores.base import Condition, check_name

pytestmark = pytest.mark.slow


def picture(path, seed=0, size=(24, 16)):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


@pytest.fixture
def photos(tmp_path):
    for i in range(5):
        picture(tmp_path / "photos" / f"{i}.png", i)
    return tmp_path / "photos"


@pytest.fixture(params=["edge", "memory"])
def store(request, tmp_path):
    where = {"edge": str(tmp_path / "edge")} if request.param == "edge" else {"url": ":memory:"}
    opened = open_store("c", **where)
    yield opened
    opened.close()


def keys(store):
    return sorted(point.payload["key"] for point in store.scroll())


# --- deleted pictures


def test_deleted_pictures_are_counted_and_pruned_when_asked(photos, store, student, tmp_path):
    other = picture(tmp_path / "elsewhere" / "x.png", 9)
    ingest(other.parent, student, store)
    ingest(photos, student, store)
    (photos / "0.png").unlink()
    (photos / "1.png").rename(photos / "renamed.png")
    other.unlink()  # of another source: not looked at
    report = ingest(photos, student, store)
    assert (report.seen, report.embedded, report.gone, report.deleted) == (4, 1, 2, 0)
    assert report.row()["gone"] == 2
    assert report.line().endswith("2 points have no picture any more: `prune` deletes them")
    report = ingest(photos, student, store, prune=True)
    assert (report.gone, report.deleted) == (0, 2)
    assert report.line() == "4 pictures: 0 embedded, 4 there already, 2 deleted"
    assert keys(store) == ["2.png", "3.png", "4.png", "renamed.png", "x.png"]
    assert ingest(photos, student, store, prune=True).deleted == 0


def test_a_picture_that_can_t_be_read_now_is_not_pruned(photos, store, student):
    ingest(photos, student, store)
    (photos / "0.png").write_bytes(b"half")
    report = ingest(photos, student, store, prune=True)
    assert (report.rejected, report.deleted) == (1, 0)
    assert "0.png" in keys(store)


def test_a_list_s_pictures_are_looked_for_where_it_lies(photos, store, student):
    table = photos / "list.csv"
    table.write_text("image,caption\n" + "".join(f"{i}.png,a\n" for i in range(5)))
    ingest(table, student, store)
    (photos / "0.png").unlink()
    table.write_text(table.read_text().replace("0.png,a\n", "").replace("1.png,a\n", ""))
    report = ingest(table, student, store, prune=True)
    assert (report.seen, report.deleted) == (3, 1)
    assert keys(store) == ["1.png", "2.png", "3.png", "4.png"]  # no longer in the list, but there


def test_large_collections_are_only_looked_through_when_asked(photos, store, student, monkeypatch):
    monkeypatch.setattr(prune, "COUNT_GONE", 4)
    ingest(photos, student, store)
    (photos / "0.png").unlink()
    assert ingest(photos, student, store).gone == 0
    assert ingest(photos, student, store, prune=True).deleted == 1


def test_what_is_not_on_this_machine_is_not_pruned(student):
    with pytest.raises(UsageError, match="`prune`: memory://.*a folder of this machine"):
        prune.local_root("s", "memory://pictures", must=True)
    assert prune.local_root("s", "memory://pictures", must=False) is None


def test_members_of_an_archive_are_there_while_it_is(tmp_path):
    (tmp_path / "shard.tar").write_bytes(b"")
    (tmp_path / "a#1.png").write_bytes(b"")
    assert prune._file_of(f"{tmp_path}/shard.tar#a") == f"{tmp_path}/shard.tar"
    assert prune._file_of(f"{tmp_path}/gone.tar#a") == f"{tmp_path}/gone.tar#a"
    assert prune._file_of(f"file://{tmp_path}/a#1.png") == f"{tmp_path}/a#1.png"


# --- what else lies in a folder


def test_a_table_of_something_else_does_not_hide_the_photos(photos, store, student):
    (photos / "metadata.csv").write_text("camera,owner\nx,y\n")
    (photos / "results.csv").write_text("run,accuracy\n1,0.5\n")
    report = ingest(photos, student, store)
    assert (report.embedded, report.left_out) == (5, {".csv": 2})
    with pytest.raises(InputError, match="columns camera, owner"):  # whoever asks for captions is told
        list(open_source(str(photos), captions=True).pictures())


def test_a_source_is_read_as_it_is_said(photos, student, tmp_path):
    (photos / "captions.csv").write_text("image,caption\n0.png,zero\n1.png,one\n")
    (photos / "more.jsonl").write_text('{"file_name": "2.png"}\n')
    for read_as, embedded in ((None, 2), ("folder", 5), ("csv", 2), ("jsonl", 1)):
        store = open_store("c", edge=str(tmp_path / str(read_as)))
        assert ingest(photos, student, store, read_as=read_as).embedded == embedded
        store.close()
    for read_as, says in (("tar", "no file ending in .tar"), ("fodler", "folder")):
        with pytest.raises(UsageError, match=f"`read_as`.*{says}"):
            open_source(str(photos), read_as=read_as)
    for name in ("a.token", "b.token"):  # which of the two isn't asked where the folder's pictures are
        (photos / name).write_text("0.png#0\ta\n")
    (photos / "captions.csv").rename(photos / "table.csv")
    store = open_store("c", edge=str(tmp_path / "tokens"))
    assert ingest(photos, student, store, read_as="folder", prune=True).embedded == 5
    store.close()
    (photos / "other.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match="2 files of this kind"):
        open_source(str(photos), read_as="jsonl")


def test_a_name_spelled_in_the_other_unicode_form_is_found(tmp_path, student):
    name = "café über.png"
    picture(tmp_path / "p" / unicodedata.normalize("NFD", name))
    rows = f"image,caption\n{unicodedata.normalize('NFC', name)},a\nnowhere.png,b\n"
    (tmp_path / "p" / "captions.csv").write_text(rows)
    report = ingest(tmp_path / "p", student, open_store("c", edge=str(tmp_path / "e")))
    assert (report.embedded, report.rejected) == (1, 1)


def test_a_folder_that_may_not_be_entered_is_named(photos, student, tmp_path, monkeypatch):
    picture(photos / "theirs" / "6.png", 6)
    closed = str(photos / "theirs")
    is_file, scandir = layouts.UPath.is_file, os.scandir

    def refuse(path):
        if str(path).startswith(closed):
            raise PermissionError(13, "Permission denied", str(path))

    def guarded_is_file(self):
        refuse(self)
        return is_file(self)

    def guarded_scandir(path="."):
        refuse(path)
        return scandir(path)

    monkeypatch.setattr(type(layouts.UPath(str(photos))), "is_file", guarded_is_file)
    monkeypatch.setattr(os, "scandir", guarded_scandir)
    report = ingest(photos, student, open_store("c", edge=str(tmp_path / "e")))
    assert report.embedded == 5
    assert report.left_out == {"folders that can't be read (theirs)": 1}


# --- memory and sizes


def test_photos_are_decoded_together_by_their_pixels(monkeypatch, tmp_path):
    monkeypatch.setattr(embedder, "PIXELS_TOGETHER", 1000)
    sizes = [(20, 20), (20, 20), (20, 20), (50, 50), (10, 10)]
    files = [picture(tmp_path / f"{i}.png", i, size) for i, size in enumerate(sizes)]
    source = open_source(str(tmp_path), captions=False)
    items = [Item.of(p) for p in source.pictures()]
    for item, file in zip(items, files, strict=True):
        item.data = file.read_bytes()
    groups = [len(group) for group in embedder._by_pixels(items)]
    assert groups == [2, 1, 1, 1]  # 800; 400 and 2,500 don't fit; 2,500 alone; 100


def test_larger_pictures_are_an_option(tmp_path, student, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    picture(tmp_path / "p" / "phone.png", 0, (64, 48))
    store = open_store("c", edge=str(tmp_path / "e"))
    assert ingest(tmp_path / "p", student, store).rejected == 1
    assert ingest(tmp_path / "p", student, store, max_pixels=4000).embedded == 1
    assert Embedder(student).max_pixels == 1000
    store.close()


# --- places that can't be written, names that can't be meant


def test_rejects_that_can_t_be_written_cost_no_picture(photos, student, tmp_path, caplog):
    (photos / "bad.png").write_bytes(b"x")
    for i, rejects in enumerate(("/dev/full", "/proc/nowhere/r.jsonl", "r.jsonl")):
        store = open_store("c", edge=str(tmp_path / f"e{i}"))
        report = ingest(photos, student, store, rejects=rejects if i < 2 else str(tmp_path / rejects))
        assert (report.embedded, report.rejected, len(report.reasons)) == (5, 1, 1)
        store.close()
    assert "/dev/full: No space left on device; rejected pictures are not listed" in caplog.text
    assert len(caplog.records) == 2


def test_damaged_files_of_ours_are_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="`edge`: .*is a file"):
        place(edge=str(tmp_path / "file"))
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "aliases.json").write_text("{oops")
    with pytest.raises(StoreError, match="aliases.json: damaged"):
        open_store("c", edge=str(tmp_path / "e"))
    (tmp_path / "f" / "c").mkdir(parents=True)
    (tmp_path / "f" / "c" / "collection.json").write_text("")
    with pytest.raises(StoreError, match="collection.json: damaged.*move its folder away"):
        open_store("c", edge=str(tmp_path / "f")).metadata()
    with pytest.raises(StoreError, match="can't be made"):
        open_store("c", edge="/proc/nowhere").create(CollectionSpec.load(), 4, {"dclip": {}})


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "a\\b", "a\nb", "a\0b", "x" * 201, 'a"b', "a:b"])
def test_names_that_lead_elsewhere_are_refused_everywhere(name, tmp_path):
    for where in ({"edge": str(tmp_path)}, {"url": ":memory:"}):
        with pytest.raises(UsageError, match="`collection`"):
            open_store(name, **where)
    assert list(tmp_path.iterdir()) == []


def test_usual_names_are_fine():
    for name in ("shop", "shop-2024.v1", "фото", "写真", "a b"):
        check_name(name)


@pytest.mark.parametrize("weights", [(-1, 1, 0), (0, 0, 0), (float("nan"), 1, 0), (1, float("inf"), 0)])
def test_weights_that_can_t_be_meant(weights):
    with pytest.raises(UsageError, match="`weights`"):
        Fusion(*weights)


# --- words and filters

CAPTIONS = {
    "zh": ("红色自行车停在运河边", "自行车"),
    "ja": ("運河のそばに赤い自転車がある", "自転車"),
    "th": ("จักรยานสีแดงข้างคลอง", "จักรยาน"),
    "ko": ("운하 옆 빨간 자전거", "자전거"),
    "ru": ("красный велосипед у канала", "велосипед"),
    "de": ("rotes Fahrrad am Kanal, Müllergässchen", "mullergasschen"),
    "en": ("a red bicycle by the canal", "bicycle"),
}


def test_words_are_found_in_languages_without_spaces_too(tmp_path, rng):
    store = open_store("c", edge=str(tmp_path))
    store.create(CollectionSpec.load(), 4, {"dclip": {}})
    vector = rng.normal(size=4).astype(np.float32)
    ids = {name: f"00000000-0000-0000-0000-00000000000{i}" for i, name in enumerate(CAPTIONS)}
    payload = lambda name: {"key": name, "caption": CAPTIONS[name][0]}
    store.upsert([Point(ids[name], vector, None, payload(name)) for name in CAPTIONS])
    for name, (_, word) in CAPTIONS.items():
        found = store.query(Query(limit=9, text=word, weights=(0.0, 1.0, 0.0)))
        assert name in [hit.payload["key"] for hit in found], name
        where = (Condition("caption", "~", (word,)),)
        found = store.query(Query(limit=9, vector=vector, weights=(1.0, 0.0, 0.0), where=where))
        assert [hit.payload["key"] for hit in found] == [name]
    store.close()


def test_a_collections_language_is_data(tmp_path, rng):
    (tmp_path / "english.toml").write_text(
        '[vectors.image]\n[payload_indexes]\ncaption = "bm25"\n[text]\nlanguage = "english"\n'
    )
    spec = CollectionSpec.load(tmp_path / "english.toml")
    store = open_store("c", edge=str(tmp_path / "e"))
    store.create(spec, 4, {"dclip": {}})
    vector = rng.normal(size=4).astype(np.float32)
    store.upsert([Point("00000000-0000-0000-0000-000000000001", vector, None, {"caption": "dogs running"})])
    query = lambda text: store.query(Query(limit=9, text=text, weights=(0.0, 1.0, 0.0)))
    assert len(query("a dog runs")) == 1
    assert len(query("the")) == 0
    store.close()
    (tmp_path / "x.toml").write_text('[vectors.image]\n[text]\nlanguage = "klingon"\n')
    with pytest.raises(UsageError, match="language"):
        CollectionSpec.load(tmp_path / "x.toml")


def test_filters_find_what_is_stored_as_a_word_or_as_a_number(photos, store, student):
    rows = [
        {"file_name": "0.png", "v": "2024", "ok": "true"},
        {"file_name": "1.png", "v": 2024, "ok": True},
        {"file_name": "2.png", "v": 2024.0},
        {"file_name": "3.png", "v": "007"},
        {"file_name": "4.png", "v": 7, "ok": False},
    ]
    (photos / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ingest(photos, student, store)
    of = lambda where: sorted(h.payload["key"][0] for h in search(store, student, text="x", where=[where]))
    assert of("v=2024") == ["0", "1", "2"]
    assert of("v='2024'") == ["0"]
    assert of("v!=2024") == ["3", "4"]
    assert of("v=007") == ["3"]
    assert of("v=7|2024") == ["0", "1", "2", "4"]
    assert of("v>=2024") == ["1", "2"]
    assert of("ok=true") == ["0", "1"]
    assert of("ok=false") == ["4"]


# --- bringing another collection along


def test_a_second_reindex_brings_changes_and_deletions_along(photos, student, other_student, tmp_path):
    from dclip_qdrant.serving.reindex import reindex
    from dclip_qdrant.serving.student import Student

    rows = [{"file_name": f"{i}.png", "price": i} for i in range(5)]
    table = photos / "captions.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(5):  # written long ago: of a file that is two seconds old no time is kept yet
        os.utime(photos / f"{i}.png", (1_700_000_000, 1_700_000_000))
    here, new = place(edge=str(tmp_path / "e")), Student.load(other_student)
    old = here.open("old")
    ingest(photos, student, old)
    made, report = reindex(here, "old", new)
    assert (report.embedded, report.deleted) == (5, 0)
    rows[1]["price"] = 100
    rows[2]["caption"] = "a caption now"
    picture(photos / "3.png", 33)
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture(photos / "5.png", 5)
    table.write_text(table.read_text() + json.dumps({"file_name": "5.png", "price": 5}) + "\n")
    ingest(photos, student, old)
    old.delete([p.id for p in old.scroll() if p.payload["key"] == "4.png"])
    made, report = reindex(here, "old", new)
    # 1: its payload; 2: its words are a vector in some engines; 3: other pixels; 4: gone; 5: new
    assert (report.unchanged, report.updated, report.embedded, report.deleted) == (1, 1, 3, 1)
    carried = {p.payload["key"]: p.payload for p in made.scroll()}
    wanted = {p.payload["key"]: p.payload | {"student": new.model_name} for p in old.scroll()}
    assert carried == wanted
    made, report = reindex(here, "old", new)
    assert (report.unchanged, report.seen) == (5, 5)
    here.point("live", made.name)  # what an alias means may be written to by others
    made.upsert([Point("00000000-0000-0000-0000-000000000001", np.ones(32, np.float32), None, {"key": "x"})])
    _, report = reindex(here, "old", new)
    assert report.deleted == 0
    here.close()


def test_push_brings_changed_payloads_along(photos, student, tmp_path):
    from dclip_qdrant.serving.change import push

    here, there = place(edge=str(tmp_path / "a")), place(edge=str(tmp_path / "b"))
    store = here.open("c")
    ingest(photos, student, store)
    assert push(here, there, "c") == (5, 5)
    assert push(here, there, "c") == (5, 0)
    first = next(iter(store.scroll()))
    store.set_payloads({first.id: first.payload | {"price": 3}})
    assert push(here, there, "c") == (5, 1)
    copied = there.open("c")
    assert copied.payloads([first.id], ["price"]) == {first.id: {"price": 3}}
    assert copied.describe()["text"] == store.describe()["text"] != {}
    shutil.rmtree(photos)
    here.close()
    there.close()
