"""The cheapest index that holds the target, and the spec that comes of it."""

import tomllib

import numpy as np
import pytest

from dclip_qdrant.metrics import normalise
from dclip_qdrant.serving import tune_index
from dclip_qdrant.serving.collection import CollectionSpec, metadata_of
from dclip_qdrant.serving.golden import Golden
from dclip_qdrant.serving.items import point_id
from dclip_qdrant.serving.stores import Point, Query, place
from dclip_qdrant.serving.stores.base import with_spec

D, N = 64, 600


class Asker:
    """Texts `<n>` ask for the n-th picture."""

    name, dim, fingerprint, model_name = "fake", D, "f" * 64, "dclip/fake@ffffffff"

    def embed_texts(self, texts):
        near = [vectors()[int(t)] + 0.05 * np.random.default_rng(int(t)).normal(size=D) for t in texts]
        return normalise(np.array(near))


def vectors():
    return normalise(np.random.default_rng(0).normal(size=(N, D)))


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    here = place(edge=str(tmp_path_factory.mktemp("edge")))
    store = here.open("c")
    store.create(CollectionSpec.load(), D, metadata_of(Asker()))
    store.upsert(
        [Point(point_id(str(i)), v, v[None], {"key": str(i)}) for i, v in enumerate(vectors().astype("f4"))]
    )
    texts = [str(i) for i in range(150)]
    golden = Golden(texts, [{point_id(t)} for t in texts], texts)
    settings = "float32+ef512,int8+rescore2,binary,int8"
    choice = tune_index.tune_index(store, Asker(), golden, here, settings=settings)
    assert here.collections() == ["c"]  # nothing is left behind
    spec = tune_index.spec_of(choice.setting, CollectionSpec.of(store.describe()), choice)
    yield choice, spec
    here.close()


def test_the_cheapest_that_holds_is_taken(tried):
    choice, _ = tried
    assert choice.rows[0]["setting"] == "binary"
    assert choice.rows[0]["recall@10"] < 0.9
    last = choice.rows[-1]
    assert choice.setting.name == last["setting"]
    assert min(last["recall@10"], last["filtered_recall@10"]) >= tune_index.TARGET
    assert all(min(r["recall@10"], r["filtered_recall@10"]) < tune_index.TARGET for r in choice.rows[:-1])
    assert [r["bytes"] for r in choice.rows] == sorted(r["bytes"] for r in choice.rows)
    assert (choice.pictures, choice.queries) == (N, 150)
    assert f"{choice.setting.name} holds 0.99" in "\n".join(tune_index.describe(choice))


def test_its_spec_makes_a_collection_that_searches_so(tried, tmp_path):
    choice, text = tried
    path = tmp_path / "spec.toml"
    path.write_text(text)
    spec = CollectionSpec.load(path)
    assert spec.vectors["image"] == choice.setting.vector()
    default = CollectionSpec.load()
    assert (spec.vectors["regions"], spec.payload_indexes) == (
        default.vectors["regions"],
        default.payload_indexes,
    )
    assert choice.setting.name in tomllib.loads(text)["about"]
    searched = with_spec(Query(limit=1), spec.model_dump()["vectors"])
    assert (searched.oversampling, searched.ef) == (choice.setting.oversampling, choice.setting.ef)


def test_a_query_may_say_otherwise_than_the_spec():
    vectors = {"image": {"oversampling": 4.0, "ef": 256}}
    assert with_spec(Query(limit=1), vectors) == Query(limit=1, oversampling=4.0, ef=256)
    assert with_spec(Query(limit=1, oversampling=0.0, ef=16), vectors).oversampling == 0.0
    assert with_spec(Query(limit=1, oversampling=0.0, ef=16), vectors).ef == 16
    assert with_spec(Query(limit=1), {}) == Query(limit=1)


def test_no_setting_that_holds_is_said(tmp_path):
    here = place(edge=str(tmp_path))
    store = here.open("c")
    store.create(CollectionSpec.load(), D, metadata_of(Asker()))
    store.upsert([Point(point_id(str(i)), v, v[None], {}) for i, v in enumerate(vectors().astype("f4"))])
    golden = Golden([str(i) for i in range(40)], [set()] * 40, [str(i) for i in range(40)])
    choice = tune_index.tune_index(store, Asker(), golden, here, settings="binary", pictures=300)
    assert (choice.setting, choice.pictures) == (None, 300)
    assert "none holds" in tune_index.describe(choice)[-1]
    here.close()
