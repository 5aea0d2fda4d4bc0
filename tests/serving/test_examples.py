"""Queries of several parts: texts and pictures that are wanted, and some that are not."""

import numpy as np
import pytest
from PIL import Image

from dclip_qdrant.errors import UsageError
from dclip_qdrant.metrics import normalise
from dclip_qdrant.serving.collection import CollectionSpec
from dclip_qdrant.serving.examples import Wanted, query_vector
from dclip_qdrant.serving.ingest import ingest
from dclip_qdrant.serving.items import point_id
from dclip_qdrant.serving.search import search
from dclip_qdrant.serving.stores import open_store

pytestmark = pytest.mark.slow
KEYS = [f"images/train-0000{i}.jpg" for i in range(4)]


@pytest.fixture(scope="module", params=["edge", "memory"])
def store(request, student, scenes_folder, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("edge"))
    store = open_store("c", **({"edge": folder} if request.param == "edge" else {"url": ":memory:"}))
    ingest(str(scenes_folder), student, store, limit=30)
    yield store
    store.close()


@pytest.fixture(scope="module")
def own(store):
    """Each picture's stored vector, by key."""
    return {p.payload["key"]: p.image for p in store.scroll(with_vectors=True)}


def vector(store, student, **parts):
    return query_vector(store, student, Wanted(**parts))[0]


def test_the_mean_of_what_is_wanted(store, own, student):
    mean = normalise((own[KEYS[0]] + own[KEYS[1]]) / 2)
    np.testing.assert_allclose(vector(store, student, like=KEYS[:2]), mean, atol=1e-5)
    text = student.embed_texts(["a red square"])[0]
    both = vector(store, student, text="a red square", like=KEYS[:1])
    np.testing.assert_allclose(both, normalise(own[KEYS[0]] + text), atol=1e-5)


def test_twice_the_mean_minus_what_is_not(store, own, student):
    """Qdrant's average_vector: avg(positive) + avg(positive) - avg(negative)."""
    text = student.embed_texts(["a blue ring"])[0]
    got = vector(store, student, like=KEYS[:2], unlike=KEYS[2:3], minus="a blue ring")
    wanted = (own[KEYS[0]] + own[KEYS[1]]) - (own[KEYS[2]] + text) / 2
    np.testing.assert_allclose(got, normalise(wanted), atol=1e-5)


def test_it_is_what_qdrant_recommends(store, own, student):
    """The same order as the server's own recommendation gives (average_vector), asked beside ours."""
    from qdrant_client import QdrantClient, models

    client = QdrantClient(":memory:")
    size = models.VectorParams(size=student.dim, distance=models.Distance.COSINE)
    client.create_collection("c", vectors_config=size)
    points = [models.PointStruct(id=point_id(k), vector=v.tolist(), payload={"k": k}) for k, v in own.items()]
    client.upsert("c", points)
    examples = models.RecommendInput(
        positive=[point_id(KEYS[0]), point_id(KEYS[3])],
        negative=[point_id(KEYS[1])],
        strategy=models.RecommendStrategy.AVERAGE_VECTOR,
    )
    theirs = client.query_points("c", query=models.RecommendQuery(recommend=examples), limit=8).points
    hits = search(store, student, like=[KEYS[0], KEYS[3]], unlike=[KEYS[1]], limit=8)
    assert [hit.payload["key"] for hit in hits] == [p.payload["k"] for p in theirs]


def test_examples_are_not_found_again_and_ids_are_keys_too(store, student):
    by_key = search(store, student, like=KEYS[:1], unlike=KEYS[1:2], limit=30)
    assert not {hit.payload["key"] for hit in by_key} & set(KEYS[:2])
    assert len(by_key) == 28
    by_id = search(store, student, like=[point_id(KEYS[0])], unlike=[point_id(KEYS[1])], limit=30)
    assert [hit.id for hit in by_id] == [hit.id for hit in by_key]


def test_pictures_of_elsewhere(store, student, scenes_folder):
    """A file's bytes, its picture and its key say the same, but for being found again."""
    data = (scenes_folder / KEYS[0]).read_bytes()
    of_bytes = search(store, student, like=[data], limit=5)
    assert of_bytes[0].payload["key"] == KEYS[0]
    assert [h.id for h in search(store, student, image=data, limit=5)] == [h.id for h in of_bytes]
    picture = Image.open(scenes_folder / KEYS[0])
    assert [h.id for h in search(store, student, like=[picture], limit=5)] == [h.id for h in of_bytes]
    assert [h.id for h in search(store, student, like=[KEYS[0]], limit=4)] == [h.id for h in of_bytes[1:]]


def test_words_still_count_in_hybrid(store, student):
    hits = search(store, student, text="red square", like=KEYS[:1], mode="hybrid", limit=5, explain=True)
    assert any(hit.ranks["bm25"] for hit in hits)
    with pytest.raises(UsageError, match="BM25 needs words"):
        search(store, student, like=KEYS[:1], mode="hybrid")


def test_a_collection_of_short_vectors(student, scenes_folder):
    spec = CollectionSpec.load().model_dump()
    spec["vectors"]["image"]["dim"] = 8
    store = open_store("short", url=":memory:")
    ingest(str(scenes_folder), student, store, spec=CollectionSpec(**spec), limit=10)
    stored = next(iter(store.vectors([point_id(KEYS[0])]).values()))
    assert stored.shape == (8,)
    text = student.embed_texts(["a red square"])[0][:8]
    got = vector(store, student, text="a red square", like=KEYS[:1])
    np.testing.assert_allclose(got, normalise(stored + normalise(text)), atol=1e-5)
    assert len(search(store, student, text="a red square", like=KEYS[:1], limit=20)) == 9
    store.close()
