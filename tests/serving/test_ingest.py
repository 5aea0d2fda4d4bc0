"""Ingestion and search, end to end on a real student and the real engine."""

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from processes import run, started

from dclip_qdrant.detectors.grid import Grid
from dclip_qdrant.errors import MismatchError, PointError, UsageError
from dclip_qdrant.pictures import images
from dclip_qdrant.pictures.regions import Regions
from dclip_qdrant.serving.collection import CollectionSpec, metadata_of
from dclip_qdrant.serving.embedder import Embedder
from dclip_qdrant.serving.ingest import ingest
from dclip_qdrant.serving.items import point_id
from dclip_qdrant.serving.search import Fusion, parse_filter, search
from dclip_qdrant.serving.stores import Condition, Point, Query, open_store
from dclip_qdrant.serving.stores.base import mmr
from dclip_qdrant.serving.stores.exact import Exact
from dclip_qdrant.serving.student import Student

pytestmark = pytest.mark.slow


def snapshot(store):
    return {
        p.id: (p.payload, p.image.round(5).tolist(), p.regions.round(5).tolist())
        for p in store.scroll(with_vectors=True)
    }


def test_what_is_stored_is_what_the_student_says(student, scenes_folder, tmp_path):
    store = open_store("c", edge=str(tmp_path))
    # captions.jsonl: keys, captions, splits
    report = ingest(str(scenes_folder), student, store, detector=Grid(1, 2, 0.0), top_k=2)
    assert (report.seen, report.embedded, report.rejected) == (60, 60, 0)
    key = "images/test-00003.jpg"
    found = snapshot(store)[point_id(key)]
    data = (scenes_folder / key).read_bytes()
    image = images.open_rgb(data, key)
    np.testing.assert_allclose(found[1], student.embed_images([image])[0], atol=1e-4)
    np.testing.assert_allclose(found[2], student.embed_regions(image, Grid(1, 2, 0.0)([image])[0]), atol=1e-4)
    p = found[0]
    assert (p["key"], p["content_hash"], p["width"], p["height"], p["split"], p["student"]) == (
        key,
        images.content_hash(data),
        128,
        128,
        "test",
        student.model_name,
    )
    assert len(p["caption"].split("\n")) == 5
    assert p["labels"] == ["tile", "tile"]
    assert p["boxes"] == [[0.0, 0.0, 64.0, 128.0], [64.0, 0.0, 128.0, 128.0]]
    assert len(p["source_boxes"]) >= 2  # the source's own column of that name is kept under another
    store.close()


def test_the_second_run_embeds_nothing_and_changes_are_noticed(student, scenes_folder, tmp_path, monkeypatch):
    src = tmp_path / "src"
    src.mkdir()
    for i in range(6):
        (src / f"{i}.jpg").write_bytes((scenes_folder / "images" / f"train-0000{i}.jpg").read_bytes())
    store = Exact("c")
    assert ingest(str(src), student, store).embedded == 6
    before = snapshot(store)
    monkeypatch.setattr(images, "open_rgb", lambda *a, **k: pytest.fail("decoded again"))
    report = ingest(str(src), student, store)
    assert (report.embedded, report.unchanged) == (0, 6)
    assert report.line() == "6 pictures: 0 embedded, 6 there already"
    assert snapshot(store) == before
    monkeypatch.undo()
    (src / "3.jpg").write_bytes((scenes_folder / "images" / "test-00001.jpg").read_bytes())
    report = ingest(str(src), student, store)
    assert (report.embedded, report.unchanged, store.count()) == (1, 5, 6)
    report = ingest(str(src), student, store, detector=Grid())  # regions are wanted now
    assert report.embedded == 6


def test_what_a_source_says_anew_is_stored_without_embedding_again(student, tmp_path, monkeypatch):
    folder = tmp_path / "shop"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (20, 16), (70 * i, 90, 30)).save(folder / f"{i}.png")

    def says(price, **more):
        rows = [{"file_name": f"{i}.png", "caption": f"thing {i}", "price": price + i} for i in range(3)]
        (folder / "captions.jsonl").write_text("".join(json.dumps(row | more) + "\n" for row in rows))

    store = Exact("c")
    says(10, season="summer")
    ingest(folder, student, store)
    embedded = []
    monkeypatch.setattr(Embedder, "prepare", lambda self, items: embedded.extend(items) or [])
    assert ingest(folder, student, store).row()["unchanged"] == 3
    says(90, split="test")
    report = ingest(folder, student, store)
    assert (report.updated, report.unchanged, report.embedded) == (3, 0, 0)
    payload = store.payloads([point_id("1.png")], None)[point_id("1.png")]
    assert (payload["price"], payload["split"], payload["width"]) == (91, "test", 20)
    assert "season" not in payload  # the source no longer says so
    folder.rename(tmp_path / "moved")
    assert ingest(tmp_path / "moved", student, store).updated == 3
    uris = [p.payload["uri"] for p in store.scroll()]
    assert all(uri.startswith(f"{tmp_path}/moved/") for uri in uris)
    report = ingest(tmp_path / "moved", student, store, layout="langchain")
    assert report.updated == 3
    payload = store.payloads([point_id("1.png")], None)[point_id("1.png")]
    assert payload["page_content"] == "thing 1"
    assert payload["metadata"]["price"] == 91
    assert not embedded


def test_another_picture_under_a_taken_key_is_rejected_not_overwritten(student, scenes_folder, tmp_path):
    store = Exact("c")
    for name, scene in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(
            (scenes_folder / "images" / f"train-0000{scene}.jpg").read_bytes()
        )
    ingest(str(tmp_path / "a"), student, store)
    report = ingest(str(tmp_path / "b"), student, store)
    assert report.rejected == 1
    assert "`prefix`" in report.reasons[0]
    assert ingest(str(tmp_path / "b"), student, store, prefix="b/").embedded == 1
    assert ingest(str(tmp_path / "b"), student, store, replace=True).embedded == 1
    assert store.count() == 2


def save(path, image, form, **query):
    buffer = io.BytesIO()
    image.save(buffer, form, **query)
    path.write_bytes(buffer.getvalue())


def test_a_messy_folder(student, tmp_path):
    """Good ones in and upright, bad ones in the rejects file with reasons."""
    src = tmp_path / "src"
    (src / "deep").mkdir(parents=True)
    a = np.zeros((60, 120, 3), np.uint8)
    a[..., 2] = 255
    a[:30, :60] = (255, 0, 0)
    base = Image.fromarray(a)
    exif = Image.Exif()
    exif[0x0112] = 6
    save(src / "plain.png", base, "PNG")
    save(src / "rotated.jpg", base, "JPEG", exif=exif, quality=98, subsampling=0)
    save(src / "cmyk.jpg", base.convert("CMYK"), "JPEG")
    save(src / "deep" / "sixteen.png", Image.fromarray(np.full((20, 20), 40000, np.uint16)), "PNG")
    save(src / "palette.png", base.convert("RGBA").quantize(8), "PNG")
    save(src / "moving.gif", base, "GIF", save_all=True, append_images=[Image.new("RGB", base.size)])
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)).save(
        whole, "JPEG"
    )
    (src / "truncated.jpg").write_bytes(whole.getvalue()[:5000])
    (src / "text.jpg").write_text("not a picture at all")
    (src / "empty.png").write_bytes(b"")
    Image.MAX_IMAGE_PIXELS, limit = None, Image.MAX_IMAGE_PIXELS
    save(src / "bomb.png", Image.new("1", (20_000, 20_000)), "PNG")
    Image.MAX_IMAGE_PIXELS = limit
    (src / "notes.txt").write_text("ignored: not a picture by its name")
    store = open_store("c", edge=str(tmp_path / "edge"))
    rejects = tmp_path / "rejects.jsonl"
    report = ingest(str(src), student, store, rejects=str(rejects))
    assert (report.seen, report.embedded, report.rejected) == (10, 6, 4)
    reasons = {r["key"]: r["reason"] for r in map(json.loads, rejects.read_text().splitlines())}
    assert set(reasons) == {"truncated.jpg", "text.jpg", "empty.png", "bomb.png"}
    assert "400,000,000 pixels" in reasons["bomb.png"]
    assert all(str(src) in r for r in reasons.values())
    stored = {p.payload["key"]: p for p in store.scroll(with_vectors=True)}
    upright = base.transpose(Image.Transpose.ROTATE_270)
    assert (stored["rotated.jpg"].payload["width"], stored["rotated.jpg"].payload["height"]) == (60, 120)
    assert stored["rotated.jpg"].image @ student.embed_images([upright])[0] > 0.999
    store.close()


class Picky(Exact):
    """Refuses one point, and whole batches that hold it."""

    def upsert(self, points):
        if any(p.payload["key"].endswith("train-00007.jpg") for p in points):
            raise PointError(self.name, "a poison point")
        super().upsert(points)


def test_a_poison_point_is_isolated(student, scenes_folder, tmp_path):
    store = Picky("c")
    report = ingest(str(scenes_folder / "images"), student, store, rejects=str(tmp_path / "r.jsonl"))
    assert (report.embedded, report.rejected, store.count()) == (59, 1, 59)
    assert json.loads((tmp_path / "r.jsonl").read_text())["key"] == "train-00007.jpg"


def test_parquet_of_pictures(student, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    import scenes

    rows = {
        "id": [f"p{i}" for i in range(5)],
        "image": [scenes.jpeg(scenes.scene(i).image) for i in range(5)],
        "price": [i * 1.5 for i in range(5)],
    }
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    store = Exact("c")
    assert ingest(str(tmp_path / "a.parquet"), student, store).embedded == 5
    assert store.payloads([point_id("p2")], ["price"])[point_id("p2")]["price"] == 3.0


def test_a_killed_ingest_goes_on_to_exactly_the_same_collection(student_folder, scenes_folder, tmp_path):
    """SIGKILL in the middle, run again: the same points as an unbroken run, each picture embedded once over
    both runs."""
    code = """
import sys, time
from dclip_qdrant.serving import ingest as module
from dclip_qdrant.serving.stores import open_store
from dclip_qdrant.serving.student import Student
module.WINDOW = 8
def slow(report):
    print(report.embedded, flush=True)
    time.sleep(0.3)
store = open_store("c", edge=sys.argv[2])
report = module.ingest(sys.argv[3], Student.load(sys.argv[1]), store, progress=slow)
print("end", report.embedded, report.unchanged, flush=True)
store.close()
"""
    command = [
        sys.executable,
        "-c",
        code,
        str(student_folder),
        str(tmp_path / "killed"),
        str(scenes_folder / "images"),
    ]
    seen = 0
    with started(command, stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            seen = int(line)
            if seen >= 24:
                os.kill(process.pid, signal.SIGKILL)
                break
    end = run(command, code=0).stdout.splitlines()[-1].split()
    embedded, unchanged = int(end[1]), int(end[2])
    assert embedded + unchanged == 60
    assert unchanged >= seen  # what was acknowledged before the kill is not embedded again
    student = Student.load(student_folder)
    whole, killed = (
        open_store("c", edge=str(tmp_path / "whole")),
        open_store("c", edge=str(tmp_path / "killed")),
    )
    ingest(str(scenes_folder / "images"), student, whole)
    assert snapshot(killed) == snapshot(whole)
    whole.close()
    killed.close()


def test_one_caption_is_indexed_and_the_others_stay_for_queries(student, scenes_folder):
    store = Exact("c")
    ingest(str(scenes_folder), student, store, captions=1)
    rows = [json.loads(line) for line in (scenes_folder / "captions.jsonl").read_text().splitlines()]
    first = {row["file_name"]: row["captions"][0] for row in rows}
    assert {p.payload["key"]: p.payload["caption"] for p in store.scroll()} == first
    # another choice is another payload: nothing that changed counts as there already
    assert ingest(str(scenes_folder), student, store, captions=1).unchanged == 60
    assert ingest(str(scenes_folder), student, store).embedded == 60


def test_regions_are_refused_where_there_are_none(student, scenes_folder):
    """They would be the dense hits under another name."""
    store = Exact("c")
    ingest(str(scenes_folder), student, store, limit=5)
    with pytest.raises(UsageError, match="no regions.*ingest with a `detector`"):
        search(store, student, text="a red star", mode="regions")
    with pytest.raises(UsageError, match="no regions"):
        search(store, student, text="a red star", mode="hybrid", fusion=Fusion(regions=0.5))
    ingest(str(scenes_folder), student, store, limit=5, detector=Grid())
    assert len(search(store, student, text="a red star", mode="regions", limit=5)) == 5


def test_hybrid_is_refused_where_no_picture_has_a_caption(student, scenes_folder):
    store = Exact("c")
    ingest(str(scenes_folder), student, store, limit=5, captions=0)
    assert not any(p.payload["caption"] for p in store.scroll())
    with pytest.raises(UsageError, match="has a caption"):
        search(store, student, text="a red star", mode="hybrid", limit=3)
    assert len(search(store, student, text="a red star", limit=3)) == 3
    ingest(str(scenes_folder), student, store, limit=8, captions=1)
    assert search(store, student, text="a red star", mode="hybrid", limit=1)


class FindsNothing:
    fingerprint = "nothing"

    def __call__(self, pictures):
        return [Regions() for _ in pictures]


def test_pictures_without_a_box_are_no_reason_to_refuse_regions(student, scenes_folder):
    store = Exact("c")
    ingest(str(scenes_folder), student, store, limit=5, detector=FindsNothing())
    hits = search(store, student, text="a red star", mode="regions", limit=1)
    assert hits[0].box is None


def test_regions_that_another_program_wrote_are_searched(student, scenes_folder):
    """Vectors say that there are regions; our payload needn't."""
    ours, theirs = Exact("c"), Exact("theirs")
    ingest(str(scenes_folder), student, ours, limit=5, detector=Grid())
    theirs.create(CollectionSpec.load(), student.dim, ours.metadata())
    theirs.upsert([Point(p.id, p.image, p.regions, {"sku": p.id}) for p in ours.scroll(with_vectors=True)])
    found = [search(store, student, text="a red star", mode="regions") for store in (ours, theirs)]
    assert [hit.id for hit in found[0]] == [hit.id for hit in found[1]]


@pytest.fixture(scope="module")
def filled(student, scenes_folder):
    store = Exact("c")
    ingest(str(scenes_folder), student, store, detector=Grid())
    return store


def test_search_finds_a_picture_by_itself_and_by_its_words(student, filled, scenes_folder):
    image = Image.open(scenes_folder / "images" / "test-00004.jpg").convert("RGB")
    hits = search(filled, student, image=image, limit=3)
    assert hits[0].payload["key"] == "images/test-00004.jpg"
    assert hits[0].score == pytest.approx(1.0, abs=1e-4)
    caption = filled.payloads([point_id("images/test-00004.jpg")], ["caption"])[
        point_id("images/test-00004.jpg")
    ]["caption"].split("\n")[1]
    found = search(filled, student, text=caption, mode="hybrid", limit=5, fusion=Fusion(dense=0.0))
    assert found[0].payload["key"] == "images/test-00004.jpg"


def test_regions_mode_says_which_region_matched(student, filled, scenes_folder):
    key = "images/test-00002.jpg"
    image = Image.open(scenes_folder / key).convert("RGB")
    tile = Grid()([image])[0]
    crop = tile.crops(image)[3].resize((32, 32), Image.Resampling.BICUBIC)  # as embed_regions cuts it
    hit = next(
        h for h in search(filled, student, image=crop, mode="regions", limit=60) if h.payload["key"] == key
    )
    assert hit.region == 3
    assert hit.box == tile.boxes[3].tolist()
    assert hit.label == "tile"
    assert hit.row()["region"]["label"] == "tile"


def test_explain_gives_the_rank_in_each_stage(student, filled):
    hits = search(
        filled, student, text="a red square", mode="hybrid", limit=5, explain=True, fusion=Fusion(regions=1.0)
    )
    dense = [h.id for h in search(filled, student, text="a red square", limit=60)]
    for h in hits:
        assert set(h.ranks) == {"dense", "bm25", "regions"}
        assert dense[h.ranks["dense"] - 1] == h.id
        assert h.row()["ranks"] == h.ranks
        wanted = sum(1 / (r + 59) for r in h.ranks.values() if r)  # Qdrant's RRF, k = 60, weights 1
        assert h.score == pytest.approx(wanted)


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_ties_are_broken_by_id_whatever_the_engine_does(student, limit):
    """Six pictures with the same vector, given in any order by the engine."""
    vector = student.embed_texts(["a red square"])[0]
    ids = [point_id(str(i)) for i in range(6)]

    class Shuffled(Exact):
        def query(self, query):
            found = super().query(replace(query, limit=100))
            return [found[i] for i in self.order][: query.limit]

    answers = set()
    for seed in range(8):
        store = Shuffled("c")
        store.create(CollectionSpec.load(), student.dim, metadata_of(student))
        store.upsert([Point(i, vector, None, {"key": i, "student": student.model_name}) for i in ids])
        store.order = np.random.default_rng(seed).permutation(6)
        hits = search(store, student, text="a red square", limit=limit)
        answers.add(tuple(h.id for h in hits))
    assert answers == {tuple(sorted(ids)[:limit])}


def test_diversity_by_hand():
    # two twins and a stranger: by relevance a, b, c; b adds nothing once a is there
    vectors = np.array([[1, 0], [1, 0], [0, 1.0]])
    assert mmr(vectors, np.array([1.0, 0.9, 0.5]), 3, 1.0) == [0, 1, 2]
    # after a: b has 0.5 * 0.9 - 0.5 * 1 = -0.05, c has 0.5 * 0.5 - 0.5 * 0 = 0.25
    assert mmr(vectors, np.array([1.0, 0.9, 0.5]), 3, 0.5) == [0, 2, 1]
    assert mmr(vectors, np.ones(3), 2, 0.0) == [0, 2]


@pytest.mark.parametrize("diversity", [0.2, 0.5, 0.9])
def test_diversity_is_mmr_over_scaled_relevance(student, filled, diversity):
    """Carbonell & Goldstein's greedy choice written out, relevance scaled to 0..1 over the candidates."""
    vector = student.embed_texts(["a red square"])[0]
    points = filled.query(Query(limit=100, vector=vector, with_image=True))
    scores = np.array([p.score for p in points])
    relevance = (scores - scores.min()) / np.ptp(scores)
    chosen: list[int] = []
    while len(chosen) < 8:
        rest = [i for i in range(len(points)) if i not in chosen]
        nearest = [max((points[i].image @ points[c].image for c in chosen), default=0.0) for i in rest]
        value = [(1 - diversity) * relevance[i] - diversity * n for i, n in zip(rest, nearest, strict=True)]
        chosen.append(rest[int(np.argmax(value))])
    hits = search(filled, student, text="a red square", limit=8, diversity=diversity)
    assert [h.id for h in hits] == [points[i].id for i in chosen]


def test_queries_that_cant_be_meant(student, filled):
    for query, says in (
        ({}, "nothing to search for"),
        ({"minus": "a"}, "only what isn't wanted"),
        ({"like": ["no-such.jpg"]}, "no picture 'no-such.jpg'"),
        ({"text": "a", "minus": " "}, "an empty text"),
        ({"text": "a", "min_probability": 0.5}, "dclip-qdrant tune"),
        ({"text": "  "}, "an empty text"),
        ({"image": Image.new("RGB", (9, 9)), "mode": "hybrid"}, "BM25 needs words"),
        ({"text": "a", "mode": "x"}, "'x'"),
        ({"text": "a", "limit": 0}, "1 or more"),
        ({"text": "a\ud83d"}, "half a surrogate pair"),
        ({"text": "a", "where": ["key=\udcff"]}, "half a surrogate pair"),
        ({"text": "a", "like": ["\udcff"]}, "half a surrogate pair"),
    ):
        with pytest.raises(UsageError, match=says):
            search(filled, student, **query)


def test_the_wrong_student_is_refused_in_ingestion_and_search(student, filled, scenes_folder, monkeypatch):
    other = Student.__new__(Student)
    other.__dict__ = {
        **student.__dict__,
        "manifest": {**student.manifest, "fingerprint": "0" * 64, "name": "other"},
    }
    with pytest.raises(MismatchError, match="dclip/tiny@.*dclip/other@00000000"):
        search(filled, other, text="a star")
    with pytest.raises(MismatchError):
        ingest(str(scenes_folder), other, filled)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("labels=dog|cat", Condition("labels", "=", ("dog", "cat"))),
        ("width>=640", Condition("width", ">=", (640.0,))),
        ("a.b != 3", Condition("a.b", "!=", (3, "3"))),  # a number or a word: whatever is stored
        ("caption~red ball", Condition("caption", "~", ("red ball",))),
        ("ok=true", Condition("ok", "=", (True, "true"))),
        ("price=1.5", Condition("price", "=", (1.5, "1.5"))),
        ("code=007|8", Condition("code", "=", ("007", 8, "8"))),
        ("year='2024'", Condition("year", "=", ("2024",))),
        ("name='x y'", Condition("name", "=", ("x y",))),
    ],
)
def test_filters_parse(text, wanted):
    assert parse_filter(text) == wanted


@pytest.mark.parametrize("text", ["labels", "=x", "width>=wide", "a=", ""])
def test_bad_filters_are_usage_errors(text):
    with pytest.raises(UsageError, match="`where`"):
        parse_filter(text)
