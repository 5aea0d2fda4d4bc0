"""The search page's routes: they show what a collection holds, and nothing else."""

import io

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette", reason="the serve extra is not installed")
pytest.importorskip("httpx", reason="starlette's test client needs httpx")

from pictures import b64, png
from starlette.testclient import TestClient

from dclip_qdrant.service.run import build_service
from dclip_qdrant.serving.collection import CollectionSpec
from dclip_qdrant.serving.ingest import ingest, prepare_collection
from dclip_qdrant.serving.stores import open_store
from dclip_qdrant.serving.student import Student


@pytest.fixture(scope="module")
def filled(student_folder, scenes_folder, tmp_path_factory):
    """A collection in a folder of its own, and the service over it."""
    from dclip_qdrant.detectors.grid import Grid

    edge = tmp_path_factory.mktemp("edge")
    store = open_store("scenes", edge=str(edge))
    ingest(
        str(scenes_folder),
        Student.load(student_folder),
        store,
        detector=Grid(),
        spec=CollectionSpec.load(),
    )
    store.close()
    with TestClient(
        build_service([str(student_folder)], edge=str(edge)).app, base_url="http://localhost"
    ) as c:
        yield c


def test_page_info_search_labels_picture(filled, student):
    info = filled.get("/api/info").json()
    assert info["collections"] == [{"name": "scenes", "student": student.model_name, "points": 60}]
    assert filled.get("/api/labels/scenes").json()["labels"][0]["count"] == 60
    found = filled.post(
        "/api/search", json={"collection": "scenes", "text": "a red ball", "mode": "regions", "limit": 5}
    ).json()
    assert len(found["hits"]) == 5
    assert "payload" not in found["hits"][0]
    picture = filled.get(f"/api/picture/scenes/{found['hits'][0]['id']}")
    assert picture.headers["content-type"] == "image/jpeg"
    assert max(Image.open(io.BytesIO(picture.content)).size) <= 480
    like = filled.post(
        "/api/search", json={"collection": "scenes", "image": b64(picture.content), "limit": 1}
    ).json()
    assert like["hits"][0]["id"] == found["hits"][0]["id"]


def test_a_collection_that_somebody_has_open_is_said(student_folder, tmp_path):
    store = open_store("c", edge=str(tmp_path))
    prepare_collection(store, Student.load(student_folder), CollectionSpec.load())
    service = build_service([str(student_folder)], edge=str(tmp_path))
    with TestClient(service.app, base_url="http://localhost") as client:
        info = client.get("/api/info").json()
        assert (info["collections"], info["unavailable"]) == ([], ["c: open in another process"])
        store.close()
        info = client.get("/api/info").json()
        assert (len(info["collections"]), info["unavailable"]) == (1, [])


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({}, 400, "collection"),
        ({"collection": "gone", "text": "a"}, 404, "no collection"),
        ({"collection": "../scenes", "text": "a"}, 404, "no collection"),
        ({"collection": "scenes"}, 400, "a text or an image"),
        ({"collection": "scenes", "text": "a", "image": "b"}, 400, "a text or an image"),
        ({"collection": "scenes", "text": "a", "mode": "magic"}, 400, "mode"),
        ({"collection": "scenes", "text": "a", "limit": 0}, 400, "limit"),
        ({"collection": "scenes", "text": "a", "limit": 10**9}, 400, "limit"),
        ({"collection": "scenes", "text": "a", "filters": ["???"]}, 400, "filters: '???'"),
        ({"collection": "scenes", "text": "a", "filters": "labels=a"}, 400, "filters"),
        ({"collection": "scenes", "image": b64(b"no picture"), "mode": "dense"}, 400, "picture"),
        ({"collection": "scenes", "image": b64(png()), "mode": "hybrid"}, 400, "BM25 needs words"),
    ],
)
def test_bad_searches(filled, body, status, says):
    answer = filled.post("/api/search", json=body)
    assert answer.status_code == status
    assert says in answer.json()["error"]


def test_thumbnails_come_from_the_collection_alone(filled, student_folder, tmp_path):
    for point in ("../../etc/passwd", "x", "00000000-0000-0000-0000-000000000000"):
        assert filled.get(f"/api/picture/scenes/{point}").status_code == 404
    secret, changed = tmp_path / "secret.txt", tmp_path / "changed.png"
    secret.write_text("password")
    changed.write_bytes(png())
    from dclip_qdrant.pictures.images import content_hash
    from dclip_qdrant.serving.collection import metadata_of
    from dclip_qdrant.serving.items import point_id
    from dclip_qdrant.serving.stores import Point

    s = Student.load(student_folder)
    store = open_store("odd", edge=str(tmp_path / "edge"))
    store.create(CollectionSpec.load(), s.dim, metadata_of(s))
    rows = {
        "secret": (str(secret), content_hash(b"password")),
        "changed": (str(changed), content_hash(b"another")),
        "url": ("http://127.0.0.1/x.png", ""),
        "good": (str(changed), content_hash(png())),
    }
    store.upsert(
        [
            Point(point_id(k), np.ones(s.dim, np.float32), None, {"key": k, "uri": uri, "content_hash": h})
            for k, (uri, h) in rows.items()
        ]
    )
    store.close()
    with TestClient(
        build_service([str(student_folder)], edge=str(tmp_path / "edge")).app, base_url="http://localhost"
    ) as c:
        assert {k: c.get(f"/api/picture/odd/{point_id(k)}").status_code for k in rows} == {
            "secret": 404,
            "changed": 404,
            "url": 404,
            "good": 200,
        }
    with TestClient(
        build_service(
            [str(student_folder)], edge=str(tmp_path / "edge"), pictures=[str(tmp_path / "elsewhere")]
        ).app,
        base_url="http://localhost",
    ) as c:
        assert c.get(f"/api/picture/odd/{point_id('good')}").status_code == 404


def test_a_collection_of_another_student_is_refused(other_student, student_folder, tmp_path):
    from dclip_qdrant.serving.collection import metadata_of

    s = Student.load(other_student)
    store = open_store("theirs", edge=str(tmp_path))
    store.create(CollectionSpec.load(), s.dim, metadata_of(s))
    store.close()
    with TestClient(
        build_service([str(student_folder)], edge=str(tmp_path)).app, base_url="http://localhost"
    ) as c:
        assert c.get("/api/info").json()["collections"] == []
        answer = c.post("/api/search", json={"collection": "theirs", "text": "a"})
        assert answer.status_code == 409
        assert s.model_name in answer.json()["error"]
        assert Student.load(student_folder).model_name in answer.json()["error"]
