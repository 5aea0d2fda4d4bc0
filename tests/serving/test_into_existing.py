"""Moving in with a collection that was there before us, on qdrant-client's in-memory engine."""

import json

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from dclip_qdrant.detectors.grid import Grid
from dclip_qdrant.errors import MismatchError, StoreError, UsageError
from dclip_qdrant.serving.embedder import Embedder
from dclip_qdrant.serving.into_existing import ingest_into
from dclip_qdrant.serving.reindex import reindex
from dclip_qdrant.serving.search import parse_filter, search
from dclip_qdrant.serving.stores.qdrant_connection import Connection
from dclip_qdrant.serving.stores.qdrant_server import Server
from dclip_qdrant.serving.student import Student


@pytest.fixture
def theirs(scenes_folder):
    """Somebody's collection: integer and uuid ids, an unnamed vector, payload of their own; two points of one
    picture, one point without a picture."""
    client = QdrantClient(":memory:")
    client.create_collection(
        "shop",
        vectors_config=models.VectorParams(size=3, distance=models.Distance.DOT),
        metadata={"owner": "shop team"},
    )
    files = sorted(str(p.relative_to(scenes_folder)) for p in scenes_folder.rglob("*.jpg"))[:20]
    points = [
        models.PointStruct(
            id=i, vector=[i, 1.0, 2.0], payload={"product": {"photo": f}, "labels": ["shoe"], "price": i}
        )
        for i, f in enumerate(files)
    ]
    points += [
        models.PointStruct(
            id="5d2a1e50-0000-4000-8000-000000000001",
            vector=[9, 9, 9],
            payload={"product": {"photo": files[0]}, "price": 99},
        ),
        models.PointStruct(id=777, vector=[8, 8, 8], payload={"price": 1}),
    ]
    client.upsert("shop", points)
    return Server("memory", client=client), files


def snapshot(client):
    return {
        r.id: (r.payload, r.vector)
        for r in client.scroll("shop", limit=1000, with_vectors=True, with_payload=True)[0]
    }


def test_vectors_are_added_and_nothing_of_theirs_changes(theirs, scenes_folder, student_folder, tmp_path):
    server, _ = theirs
    student, store = Student.load(student_folder), server.open("shop")
    before = snapshot(server.connection.client)
    source, rejects = str(scenes_folder), str(tmp_path / "rejects.jsonl")
    report, guest = ingest_into(
        source, Embedder(student, detector=Grid()), store, field="product.photo", rejects=rejects
    )
    # 60 pictures, 20 of them in the shop
    assert (report.embedded, report.rejected, guest.points, guest.without_picture) == (
        20,
        40,
        22,
        1,
    )
    assert (
        "no point has product.photo = "
        in json.loads((tmp_path / "rejects.jsonl").read_text().splitlines()[0])["reason"]
    )
    after = snapshot(server.connection.client)
    assert after.keys() == before.keys()
    for i, (payload, vector) in before.items():
        assert {k: v for k, v in after[i][0].items() if k != "dclip"} == payload
        now = after[i][1]
        assert (now[""] if isinstance(now, dict) else now) == vector
    assert server.connection.client.get_collection("shop").config.metadata["owner"] == "shop team"
    assert "dclip" not in after[777][0]
    (uuid,) = [i for i in before if isinstance(i, str)]
    # both points of one picture
    np.testing.assert_allclose(after[0][1]["dclip_image"], after[uuid][1]["dclip_image"])

    again, _ = ingest_into(
        source, Embedder(student, detector=Grid()), store, field="product.photo", rejects=rejects
    )
    assert (again.embedded, again.unchanged) == (0, 20)


def test_search_filters_and_says_regions_as_in_our_own(theirs, scenes_folder, student_folder):
    from PIL import Image

    server, files = theirs
    student, store = Student.load(student_folder), server.open("shop")
    ingest_into(str(scenes_folder), Embedder(student, detector=Grid()), store, field="product.photo")
    fresh = server.open("shop")
    picture = Image.open(scenes_folder / files[3]).convert("RGB")
    hits = search(fresh, student, image=picture, mode="regions", limit=3)
    assert (hits[0].id, hits[0].payload["price"], hits[0].payload["key"]) == ("3", 3, files[3])
    assert hits[0].payload["uri"].endswith(files[3])
    caption = hits[0].payload["caption"].split("\n")[0]
    found = search(fresh, student, text=caption, mode="hybrid", limit=5)
    assert "3" in [h.id for h in found]
    assert {
        h.id for h in search(fresh, student, text=caption, limit=50, where=(parse_filter("price>=10"),))
    } == {
        *map(str, range(10, 20)),
        "5d2a1e50-0000-4000-8000-000000000001",
    }
    one = search(fresh, student, text=caption, limit=50, where=(parse_filter(f"key={files[5]}"),))
    assert [h.id for h in one] == ["5"]
    assert 3 not in [
        int(h.id) for h in search(fresh, student, image=picture, limit=5, exclude=("3",)) if h.id.isdigit()
    ]


def test_a_kill_in_between_is_finished(theirs, scenes_folder, student_folder):
    server, _ = theirs
    student, store = Student.load(student_folder), server.open("shop")
    ingest_into(str(scenes_folder), Embedder(student), store, field="product.photo")
    # as if two points had not been reached
    server.connection.client.delete_payload("shop", keys=["dclip"], points=[0, 4])
    report, _ = ingest_into(str(scenes_folder), Embedder(student), store, field="product.photo")
    assert (report.embedded, report.unchanged) == (2, 18)


def test_what_is_refused(theirs, scenes_folder, student_folder, other_student, monkeypatch):
    server, _ = theirs
    student, other = Student.load(student_folder), Student.load(other_student)
    source = str(scenes_folder)
    with pytest.raises(StoreError, match="no collection 'nowhere'"):
        ingest_into(source, Embedder(student), server.open("nowhere"), field="x")
    with pytest.raises(UsageError, match="no point of shop has text in 'price'"):
        ingest_into(source, Embedder(student), server.open("shop"), field="price")
    # refused before anything was added
    assert "dclip" not in (server.connection.client.get_collection("shop").config.metadata or {})
    monkeypatch.setattr(Connection, "version", lambda self: (1, 17))
    with pytest.raises(StoreError, match="before 1.18"):
        ingest_into(source, Embedder(student), server.open("shop"), field="product.photo")
    monkeypatch.undo()
    ingest_into(source, Embedder(student), server.open("shop"), field="product.photo")
    with pytest.raises(MismatchError, match="filled by dclip/tiny@"):
        ingest_into(source, Embedder(other), server.open("shop"), field="product.photo")
    with pytest.raises(MismatchError):
        search(server.open("shop"), other, text="a red star")
    with pytest.raises(UsageError, match="somebody else"):
        reindex(server, "shop", other)


def test_one_of_our_own_collections_is_refused(theirs, scenes_folder, student_folder):
    from dclip_qdrant.serving.ingest import ingest

    server, _ = theirs
    student = Student.load(student_folder)
    ingest(str(scenes_folder), student, server.open("ours"), limit=3)
    with pytest.raises(UsageError, match="dclip-qdrant's own"):
        ingest_into(str(scenes_folder), Embedder(student), server.open("ours"), field="key")


def test_the_command_line_says_that_it_needs_a_server(student_folder, scenes_folder, tmp_path):
    from click.testing import CliRunner

    from dclip_qdrant.cli import main

    done = CliRunner().invoke(
        main,
        [
            "ingest",
            str(scenes_folder),
            "--student",
            str(student_folder),
            "--collection",
            "c",
            "--edge",
            str(tmp_path),
            "--into-existing",
            "f",
        ],
    )
    assert isinstance(done.exception, UsageError)
    assert "--url" in str(done.exception)


def test_hybrid_on_servers_whose_text_index_doesnt_score(theirs, scenes_folder, student_folder, monkeypatch):
    """Before 1.20 BM25 is a sparse vector, here too; points that had our vectors before get theirs."""
    server, _ = theirs
    student, store = Student.load(student_folder), server.open("shop")
    monkeypatch.setattr(Connection, "version", lambda self: (1, 18))
    run = lambda: ingest_into(str(scenes_folder), Embedder(student), store, field="product.photo")
    with monkeypatch.context() as without:
        without.setattr(type(store), "_add_sparse", lambda self, name: None)
        run()
    with pytest.raises(UsageError, match="has no BM25 vector"):
        search(server.open("shop"), student, text="red", mode="hybrid")
    report, _ = run()
    assert report.embedded == 0
    found = search(server.open("shop"), student, text="red square", mode="hybrid", limit=20, explain=True)
    with_words = [hit for hit in found if hit.ranks["bm25"] is not None]
    assert with_words
    assert all({"red", "square"} & set(hit.payload["caption"].lower().split()) for hit in with_words)
