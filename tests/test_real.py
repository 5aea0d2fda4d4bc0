"""Real photos, a real detector, a real (small) CLIP: numbers that others measured, met again. Skipped where
../shared/data is absent."""

import json
from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no real photos in {DATA}"),
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    from dclip_qdrant.pairs.build import build

    out = tmp_path_factory.mktemp("real") / "pairs"
    manifest = build(str(DATA / "flickr8k" / "val.parquet"), str(out))
    assert manifest["splits"] == {"val": 1000}
    assert (manifest["captions"], manifest["rejects"]) == (5000, 0)
    return out


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    from dclip_qdrant.jobs.export import export
    from dclip_qdrant.serving.student import Student
    from dclip_qdrant.training.models.two_tower import load

    return Student.load(
        export(
            load(str(DATA / "base-clip")),
            tmp_path_factory.mktemp("base") / "base",
            name="base",
            metrics={},
            recipe={"name": "base"},
        )
    )


@pytest.mark.long
def test_the_exported_base_scores_what_its_makers_measured(student, pairs):
    """shared/data/README.md: text -> image 13.2 / 36.6 / 49.5, image -> text 19.4 / 41.8 / 54.8; flowers5
    34.4%."""
    from dclip_qdrant.pairs import Pairs
    from dclip_qdrant.serving import evaluation

    out = evaluation.evaluate(
        student,
        Pairs.open(str(pairs)),
        labelled=str(DATA / "labelled" / "flowers5.parquet"),
        bootstrap=0,
        speed=False,
    )
    for way, wanted in (("t2i", (0.132, 0.366, 0.495)), ("i2t", (0.194, 0.418, 0.548))):
        assert [out[way][f"r@{k}"] for k in (1, 5, 10)] == pytest.approx(wanted, abs=0.003)
    assert out["zero_shot"] == pytest.approx(0.344, abs=0.005)


def test_real_photos_ingested_twice(student, tmp_path):
    from dclip_qdrant.serving.ingest import ingest
    from dclip_qdrant.serving.search import search
    from dclip_qdrant.serving.stores import open_store

    store = open_store("photos", edge=str(tmp_path))
    source = str(DATA / "flickr8k" / "val.parquet")
    first = ingest(source, student, store, limit=200)
    second = ingest(source, student, store, limit=200)
    assert (first.embedded, second.embedded, second.unchanged, store.count()) == (200, 0, 200, 200)
    hits = search(store, student, text="a dog running through the snow", limit=5)
    assert sum("dog" in h.payload["caption"] for h in hits) >= 3
    store.close()


def test_yolo_sees_people_and_dogs(pairs):
    """data README: 2.9 boxes a photo on val, 3% without any."""
    from dclip_qdrant.detectors.yolo import Yolo
    from dclip_qdrant.pairs import Pairs, load_image

    rows = [r for part in Pairs.open(str(pairs)).rows(["key", "uri", "image"]) for r in part][:100]
    found = Yolo(str(DATA / "yolo" / "yolo11n.pt"), image_size=320)([load_image(r) for r in rows])
    assert 1.5 < np.mean([len(f) for f in found]) < 5
    assert sum(len(f) == 0 for f in found) < 15
    labels = [label for f in found for label in f.labels]
    assert labels.count("person") > labels.count("dog") > 5
    assert json.dumps(found[0].row())
