"""The search page's routes: they show what a collection holds, and nothing else."""

import io
import json

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


def test_text_picture_and_examples_together_are_what_the_library_finds(filled, scenes_folder):
    ids = [h["id"] for h in filled.get("/api/start/scenes").json()["hits"][:3]]
    picture = (scenes_folder / "images" / "train-00001.jpg").read_bytes()
    body = {"collection": "scenes", "text": "a red ball", "like": ids[:2], "unlike": ids[2:], "limit": 5}
    body |= {"image": b64(picture), "minus": "a blue ring"}
    found = filled.post("/api/search", json=body).json()["hits"]
    assert len(found) == 5
    assert not {h["id"] for h in found} & set(ids)
    alone = filled.post("/api/search", json={"collection": "scenes", "text": "a red ball", "limit": 5}).json()
    assert [h["id"] for h in found] != [h["id"] for h in alone["hits"]]


def test_what_is_there_before_a_search(filled):
    begin = filled.get("/api/start/scenes").json()
    assert len(begin["hits"]) == 24
    assert all("payload" not in hit and hit["caption"] for hit in begin["hits"])
    assert 1 <= len(begin["examples"]) <= 6
    assert begin["tuned"] is False
    captions = {hit["caption"].split("\n")[0] for hit in begin["hits"]}
    assert set(begin["examples"]) <= captions
    assert filled.get("/api/start/gone").status_code == 404


def test_pictures_that_moved_or_have_relative_names_are_shown_from_their_folder(
    student_folder, tmp_path, monkeypatch
):
    """What their payload names isn't there: --pictures says where they are, their hash that they are they."""
    from dclip_qdrant.pictures.images import content_hash
    from dclip_qdrant.serving.collection import metadata_of
    from dclip_qdrant.serving.items import point_id
    from dclip_qdrant.serving.stores import Point

    monkeypatch.chdir(tmp_path)
    now = tmp_path / "now"
    (now / "a").mkdir(parents=True)
    (now / "a" / "1.png").write_bytes(png())
    (tmp_path / "outside.png").write_bytes(png())
    s = Student.load(student_folder)
    store = open_store("c", edge=str(tmp_path / "edge"))
    store.create(CollectionSpec.load(), s.dim, metadata_of(s))
    rows = {
        "a/1.png": ("/gone/a/1.png", content_hash(png())),
        "relative": ("a/1.png", content_hash(png())),
        "climbs": ("../outside.png", content_hash(png())),
        "other": ("a/1.png", content_hash(b"of another picture")),
        "odd\0name": ("a\0b.png", content_hash(png())),
    }
    vector = np.ones(s.dim, np.float32)
    store.upsert(
        [
            Point(point_id(key), vector, None, {"key": key, "uri": uri, "content_hash": content})
            for key, (uri, content) in rows.items()
        ]
    )
    store.close()
    service = build_service([str(student_folder)], edge=str(tmp_path / "edge"), pictures=[str(now)])
    with TestClient(service.app, base_url="http://localhost") as client:
        shown = {key: client.get(f"/api/picture/c/{point_id(key)}").status_code for key in rows}
    assert shown == {"a/1.png": 200, "relative": 200, "climbs": 404, "other": 404, "odd\0name": 404}


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
        ({"collection": "scenes"}, 400, "a text, an image or an example"),
        ({"collection": "scenes", "unlike": ["x"]}, 400, "a text, an image or an example"),
        ({"collection": "scenes", "minus": "a"}, 400, "a text, an image or an example"),
        ({"collection": "scenes", "text": "a", "filters": ["key=\ud83d"]}, 400, "half a surrogate pair"),
        ({"collection": "scenes", "like": ["\ud83d"]}, 400, "half a surrogate pair"),
        ({"collection": "scenes", "text": "a", "minus": "\ud83d"}, 400, "half a surrogate pair"),
        ({"collection": "\ud83d", "text": "a"}, 404, "no collection"),
        ({"collection": "scenes", "like": ["nobody"]}, 400, "no picture 'nobody'"),
        ({"collection": "scenes", "like": "nobody"}, 400, "like: expected a list"),
        ({"collection": "scenes", "like": ["x"] * 17}, 400, "at most 16"),
        ({"collection": "scenes", "text": "a", "minus": ""}, 400, "minus.data: an empty text"),
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
    # as JSON escapes it: half an emoji can be sent so, but not as UTF-8
    sent = {"content": json.dumps(body), "headers": {"Content-Type": "application/json"}}
    answer = filled.post("/api/search", **sent)
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
