"""One suite over every store: what is written comes back, queries agree with brute force, fusion is
Qdrant's."""

import os
import uuid

import httpx
import numpy as np
import pytest

from dclip_qdrant.errors import MismatchError, PointError, StoreError, UsageError
from dclip_qdrant.metrics import normalise
from dclip_qdrant.serving.collection import CollectionSpec, check_student, metadata_of
from dclip_qdrant.serving.items import point_id
from dclip_qdrant.serving.stores import Condition, Point, Query, open_store, place
from dclip_qdrant.serving.stores.base import rrf
from dclip_qdrant.serving.stores.exact import Exact

D = 8
WORDS = ["red", "blue", "green", "star", "moon", "ring", "house", "cross"]


class FakeStudent:
    name, dim, fingerprint, model_name = "fake", D, "f" * 64, "dclip/fake@ffffffff"


def points(n=40, seed=0):
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        regions = normalise(rng.normal(size=(1 + i % 3, D)))
        caption = " ".join(rng.choice(WORDS, rng.integers(2, 5), replace=False))
        out.append(
            Point(
                point_id(f"k{i}"),
                regions[0],
                regions,
                {
                    "key": f"k{i}",
                    "caption": caption,
                    "labels": [WORDS[i % 8], WORDS[(i + 1) % 8]],
                    "width": 100 + i,
                    "uri": f"/p/{i}",
                },
            )
        )
    return out


def fill(store):
    store.create(CollectionSpec.load(), D, metadata_of(FakeStudent))
    store.upsert(points())
    return store


LIVE = [
    pytest.param(kind, marks=pytest.mark.live) for kind in ("rest", "grpc")
]  # a real server, at QDRANT_URL
OLD = {"memory-1.17": (1, 17), "memory-1.15": (1, 15)}  # what an older server lacks is made up for


@pytest.fixture(scope="module")
def standin():
    """The server's REST interface over the in-memory engine, on a port of its own."""
    import threading

    from qdrant_standin import Standin

    server = Standin("http://127.0.0.1:1/none")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.url
    server.shutdown()
    server.server_close()


@pytest.fixture(params=["exact", "edge", "memory", *OLD, "rest-standin", *LIVE])
def store(request, tmp_path, monkeypatch):
    if request.param in OLD:
        monkeypatch.setattr(
            "dclip_qdrant.serving.stores.qdrant_connection.Connection.version",
            lambda self: OLD[request.param],
        )
    if request.param in ("rest", "grpc", "rest-standin"):
        url = (
            request.getfixturevalue("standin") if request.param == "rest-standin" else live_url(request.param)
        )
        where = place(url=url, api_key=os.environ.get("QDRANT_API_KEY"))
        name = f"dclip-test-{uuid.uuid4().hex[:8]}"
        s = where.open(name)
        yield s
        if s.exists():
            where.drop(name)
        where.close()
        return
    s = {
        "exact": lambda: Exact("c"),
        "edge": lambda: open_store("c", edge=str(tmp_path)),
    }.get(request.param, lambda: open_store("c", url=":memory:"))()
    yield s
    s.close()


def live_url(kind):
    url = os.environ.get("QDRANT_URL")
    if not url:
        pytest.skip("no Qdrant server: set QDRANT_URL")
    return (
        url
        if kind == "rest"
        else "grpc://" + url.split("://")[-1].split(":")[0] + ":" + os.environ.get("QDRANT_GRPC_PORT", "6334")
    )


@pytest.fixture
def full(store):
    return fill(store)


@pytest.fixture
def truth():
    return fill(Exact("c"))


def q(seed=5):
    return normalise(np.random.default_rng(seed).normal(size=D))


def same(store, truth, query, *, scores=True):
    a, b = store.query(query), truth.query(query)
    assert [h.payload["key"] for h in a] == [h.payload["key"] for h in b]
    if scores:
        np.testing.assert_allclose([h.score for h in a], [h.score for h in b], atol=1e-4)
    return a


def test_dense_agrees_with_brute_force(full, truth):
    hits = same(full, truth, Query(limit=10, vector=q()))
    assert len(hits) == 10


def test_filters_agree_with_brute_force(full, truth):
    for where in (
        (Condition("labels", "=", ("star",)),),
        (Condition("labels", "=", ("star", "moon")),),
        (Condition("labels", "!=", ("star",)),),
        (Condition("width", ">=", (120.0,)), Condition("width", "<", (125.0,))),
        (Condition("key", "=", ("k7",)),),
        (Condition("caption", "~", ("red",)),),
    ):
        hits = same(full, truth, Query(limit=40, vector=q(), where=where))
        assert 0 < len(hits) < 40, where


def test_region_rescoring_agrees_with_brute_force(full, truth):
    hits = same(full, truth, Query(limit=5, vector=q(), rescore=q()[None], candidates=40, with_regions=True))
    for h in hits:
        assert h.score == pytest.approx(float((h.regions @ q()).max()), abs=1e-4)


def test_bm25_ranks_exact_words_first(full):
    hits = full.query(Query(limit=5, text="moon ring"))
    assert {"moon", "ring"} <= set(hits[0].payload["caption"].split()) or len(
        {"moon", "ring"} & set(hits[0].payload["caption"].split())
    ) == 1
    assert all({"moon", "ring"} & set(h.payload["caption"].split()) for h in hits)


def test_fusion_is_weighted_rrf_of_the_two_lists(full):
    dense = [h.id for h in full.query(Query(limit=100, vector=q()))]
    words = [h.id for h in full.query(Query(limit=100, text="blue star"))]
    regions = [h.id for h in full.query(Query(limit=100, vector=q(), rescore=q()[None]))]
    for weights in ((1.0, 1.0, 0.0), (3.0, 1.0, 0.0), (1.0, 0.5, 2.0)):
        wanted = rrf([dense, words, regions], weights, 60)
        hits = full.query(Query(limit=10, vector=q(), text="blue star", weights=weights))
        # BM25 ties may stand in another order from call to call: compare scores
        np.testing.assert_allclose(
            [h.score for h in hits], sorted(wanted.values(), reverse=True)[:10], atol=2e-3
        )


def test_rrf_by_hand():
    # Qdrant, k = 60, weights 1: 1/(rank + 60)
    out = rrf([["a", "b"], ["b"]], (1.0, 1.0), 60)
    assert out == {"a": pytest.approx(1 / 60), "b": pytest.approx(1 / 61 + 1 / 60)}
    assert rrf([["a"], ["b"]], (1.0, 0.0), 60) == {"a": pytest.approx(1 / 60)}


def test_a_zero_weight_leaves_a_source_out(full, truth):
    same(full, truth, Query(limit=10, vector=q(), text="blue", weights=(1.0, 0.0, 0.0)))


def test_regions_alone_are_max_sim_among_the_dense_candidates(full, truth):
    same(full, truth, Query(limit=10, vector=q(), weights=(0.0, 0.0, 1.0), candidates=20))
    hits = full.query(Query(limit=3, vector=q(), with_image=True, with_regions=True))
    for h in hits:
        assert h.score == pytest.approx(float(h.image @ q()), abs=1e-3)
        assert h.regions.shape[1] == h.image.shape[0]


def test_the_engines_diversity_is_brute_forces(full, truth):
    for weight in (0.3, 0.6, 0.9):
        same(full, truth, Query(limit=10, vector=q(), candidates=30, mmr=weight))


def test_facets_count_points_by_value(full):
    counted = {}
    for p in points(40):
        for label in set(p.payload["labels"]):
            counted[label] = counted.get(label, 0) + 1
    assert dict(full.facet("labels", 50)) == counted


def test_metadata_can_be_changed(full):
    metadata = full.metadata()
    full.set_metadata(metadata | {"note": 3})
    assert full.metadata()["note"] == 3
    assert full.metadata()["dclip"] == metadata["dclip"]


def test_upsert_replaces_and_payloads_come_back(full):
    (p,) = points(1)
    full.upsert([Point(p.id, p.image, p.regions, p.payload | {"caption": "changed"})])
    assert full.count() == 40
    assert full.payloads([p.id, point_id("none")], ["caption", "key", "absent"]) == {
        p.id: {"caption": "changed", "key": "k0", "absent": None}
    }
    assert full.payloads([], ["key"]) == {}


def test_exclude_leaves_points_out(full):
    first = full.query(Query(limit=1, vector=q()))[0].id
    assert first not in [h.id for h in full.query(Query(limit=40, vector=q(), exclude=(first,)))]


def test_scroll_gives_every_point_with_vectors(full):
    found = {p.payload["key"]: p for p in full.scroll(with_vectors=True)}
    assert len(found) == 40
    for p in points():
        np.testing.assert_allclose(found[p.payload["key"]].image, p.image, atol=1e-5)
        np.testing.assert_allclose(found[p.payload["key"]].regions, p.regions, atol=1e-5)


def test_a_wrong_width_is_a_point_error_or_store_error(full):
    with pytest.raises((PointError, StoreError)):
        full.upsert([Point(point_id("bad"), np.ones(D + 1, np.float32), None, {})])


def test_metadata_and_description(full):
    check_student(full.metadata(), FakeStudent, "c")
    d = full.describe()
    assert (d["points"], d["dim"]) == (40, D)
    assert set(d["vectors"]) == {"image", "regions"}
    assert d["vectors"]["regions"]["hnsw"] is False

    class Other(FakeStudent):
        fingerprint, model_name = "0" * 64, "dclip/other@00000000"

    with pytest.raises(MismatchError, match="dclip/fake@ffffffff.*dclip/other@00000000") as e:
        check_student(full.metadata(), Other, "c")
    assert e.value.kind == "mismatch"


def test_an_absent_collection_says_which_there_are(tmp_path):
    fill(open_store("here", edge=str(tmp_path))).close()
    with pytest.raises(StoreError, match="no collection 'gone'; expected one of here"):
        open_store("gone", edge=str(tmp_path)).count()
    with pytest.raises(StoreError, match="no collection 'gone'"):
        open_store("gone", url=":memory:").describe()


def test_edge_keeps_everything_over_a_restart_and_int8_finds_the_same(tmp_path):
    s = open_store("c", edge=str(tmp_path))
    s.create(CollectionSpec.load("int8"), D, metadata_of(FakeStudent))
    s.upsert(points())
    s.finish()
    s.close()
    again = open_store("c", edge=str(tmp_path))
    assert again.count() == 40
    assert again.query(Query(limit=1, vector=points()[3].image))[0].payload["key"] == "k3"
    again.close()


def test_one_of_url_and_edge(tmp_path):
    with pytest.raises(UsageError, match="neither"):
        open_store("c")
    with pytest.raises(UsageError, match="both"):
        open_store("c", url="http://x", edge=str(tmp_path))


@pytest.mark.parametrize("name", ["default", "int8"])
def test_specs_load(name):
    assert CollectionSpec.load(name).vectors["regions"].multivector


def test_wrong_specs_get_one_clear_line(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'default'"):
        CollectionSpec.load("defalt")
    (tmp_path / "x.toml").write_text("[vectors.image]\nquantisation = 'int8'\n")
    with pytest.raises(UsageError, match="quantisation"):
        CollectionSpec.load(tmp_path / "x.toml")


@pytest.mark.parametrize("kind", ["edge", "memory"])
def test_aliases_are_second_names_that_one_call_moves(kind, tmp_path):
    where = place(edge=str(tmp_path)) if kind == "edge" else place(url=":memory:")
    spec = CollectionSpec.load()
    for name in ("old", "new"):
        store = where.open(name)
        store.create(spec, 8, {"dclip": {"student": name, "fingerprint": name}})
        store.close() if kind == "edge" else None
    assert where.collections() == ["new", "old"]
    where.point("live", "old")
    assert where.aliases() == {"live": "old"}
    assert where.open("live").metadata()["dclip"]["student"] == "old"
    where.point("live", "new")
    assert where.open("live").metadata()["dclip"]["student"] == "new"
    with pytest.raises(StoreError, match="point the alias elsewhere"):
        where.drop("new")
    where.drop("old")
    assert where.collections() == ["new"]
    for alias, collection in (("live", "gone"), ("new", "new")):
        with pytest.raises(StoreError):
            where.point(alias, collection)
    assert where.aliases() == {"live": "new"}


def test_an_older_server_gets_sparse_bm25(monkeypatch):
    """Before 1.20 there is no BM25 over a text index: the words become a sparse vector."""
    from dclip_qdrant.serving.stores.qdrant_connection import Connection
    from dclip_qdrant.serving.stores.qdrant_terms import SPARSE

    new = fill(open_store("c", url=":memory:"))
    texts = ("red star", "a house", "green moon ring")
    queries = [Query(limit=10, text=text, weights=(0.0, 1.0, 0.0)) for text in texts]
    scored = [new.query(query) for query in queries]
    monkeypatch.setattr(Connection, "version", lambda self: (1, 17))
    old = fill(open_store("c", url=":memory:"))
    assert SPARSE in old.connection.client.get_collection("c").config.params.sparse_vectors
    for text, query, a in zip(texts, queries, scored, strict=True):
        b = old.query(query)
        # scores differ (the sparse form knows no average length but its own), what matches doesn't
        words = set(text.split())
        assert all(words & set(h.payload["caption"].split()) for h in (*a, *b))
        assert b
        assert len(a) == len(b)
    both = Query(limit=10, vector=q(), text="red star", candidates=40)
    assert len(old.query(both)) == 10
    for s in (new, old):
        s.close()


def test_an_older_servers_metadata_stands_aside_and_follows_aliases(monkeypatch):
    from dclip_qdrant.serving.stores.qdrant_connection import ASIDE

    monkeypatch.setattr(
        "dclip_qdrant.serving.stores.qdrant_connection.Connection.version", lambda self: (1, 15)
    )
    where = place(url=":memory:")
    store = where.open("c")
    assert store.metadata() == {}
    fill(store)
    assert where.collections() == ["c"]
    assert where.connection.client.collection_exists(ASIDE)
    where.point("live", "c")
    fresh = where.open("live")
    check_student(fresh.metadata(), FakeStudent, "live")
    fresh.set_metadata(fresh.metadata() | {"note": 1})
    assert where.open("c").metadata()["note"] == 1
    assert len(where.open("c").query(Query(limit=3, vector=q()))) == 3


def test_payloads_are_replaced_and_vectors_stay(full):
    before = {p.id: p for p in full.scroll(with_vectors=True)}
    chosen = sorted(before)[:2]
    new = {i: {"key": f"new {n}", "caption": "a green cat", "price": 7} for n, i in enumerate(chosen)}
    full.set_payloads(new)
    after = {p.id: p for p in full.scroll(with_vectors=True)}
    for i, point in after.items():
        np.testing.assert_array_equal(point.image, before[i].image)
        assert point.payload == new.get(i, before[i].payload)


def test_a_spec_says_how_a_cluster_spreads_and_indexes(monkeypatch, tmp_path, caplog):
    spec = CollectionSpec.model_validate(
        {
            "vectors": {"image": {}},
            "payload_indexes": {"shop": "tenant", "place": "geo", "serial": "uuid"},
            "shards": 3,
            "replicas": 2,
            "write_consistency": 1,
        }
    )
    server = open_store("c", url=":memory:")
    made, indexes = {}, {}
    create, index = server.client.create_collection, server.client.create_payload_index
    monkeypatch.setattr(server.client, "create_collection", lambda *a, **k: made.update(k) or create(*a, **k))
    monkeypatch.setattr(
        server.client, "create_payload_index", lambda c, f, s, **k: indexes.update({f: s}) or index(c, f, s)
    )
    server.create(spec, D, metadata_of(FakeStudent))
    spread = ("shard_number", "replication_factor", "write_consistency_factor")
    assert [made[name] for name in spread] == [3, 2, 1]
    assert indexes["shop"].is_tenant is True
    assert [indexes[name].value for name in ("place", "serial")] == ["geo", "uuid"]
    made.clear()
    open_store("d", url=":memory:").create(CollectionSpec.load(), D, metadata_of(FakeStudent))
    assert not made.keys() & set(spread)  # the server's own

    edge = open_store("c", edge=str(tmp_path))
    edge.create(spec, D, metadata_of(FakeStudent))
    assert "shards and replicas are for servers" in caplog.text
    vector = np.eye(1, D, dtype=np.float32)[0]
    edge.upsert([Point(point_id("a"), vector, None, {"shop": "x", "place": {"lat": 1.0, "lon": 2.0}})])
    assert [
        h.payload["shop"]
        for h in edge.query(Query(limit=1, vector=vector, where=(Condition("shop", "=", ("x",)),)))
    ] == ["x"]
    edge.close()


@pytest.fixture
def limited(monkeypatch):
    """A collection whose rate limiter lets ten points a request through, as strict mode has it; the sizes of
    the requests."""
    from qdrant_client.http.exceptions import UnexpectedResponse

    store = open_store("c", url=":memory:")
    store.create(CollectionSpec.load(), D, metadata_of(FakeStudent))
    sizes = []

    def guard(name, size_of):
        own = getattr(store.client, name)

        def call(collection, *a, **k):
            size = size_of(a, k)
            sizes.append(size)
            if size > 10:
                says = "Write rate limit exceeded, request larger than rate limiter capacity, please split"
                body = ('{"status": {"error": "Rate limiting exceeded: ' + says + '"}}').encode()
                raise UnexpectedResponse(429, "Too Many Requests", body, httpx.Headers())
            return own(collection, *a, **k)

        monkeypatch.setattr(store.client, name, call)

    guard("upsert", lambda a, k: len(a[0]))
    guard("retrieve", lambda a, k: len(a[0]))
    guard("batch_update_points", lambda a, k: len(a[0]))
    guard("delete", lambda a, k: len(a[0].points))
    guard("scroll", lambda a, k: k["limit"])
    yield store, sizes
    store.close()


def test_requests_larger_than_a_rate_limiter_are_split(limited):
    store, sizes = limited
    given = points()
    ids = [p.id for p in given]
    store.upsert(given)
    assert sizes == [40, 20, 10, 10, 20, 10, 10]
    assert len(store.payloads(ids, None)) == len(store.vectors(ids)) == 40
    store.set_payloads({i: {"price": 1} for i in ids})
    assert sorted(p.id for p in store.scroll()) == sorted(ids)
    assert {p.payload["price"] for p in store.scroll()} == {1}
    store.delete(ids[:15])
    assert store.count() == 25


def test_one_point_that_a_limiter_never_lets_through_is_rejected_by_name(limited, monkeypatch):
    from dclip_qdrant.serving.ingest import write_points

    store, _ = limited
    own = store.client.upsert
    large = points()[3]
    monkeypatch.setattr(
        store.client,
        "upsert",
        lambda c, some, **k: own(c, some * 11 if large.id in [p.id for p in some] else some, **k),
    )
    rejected = write_points(store, points()[:8])
    assert [row["key"] for row in rejected] == ["k3"]
    assert "rate limiter capacity" in rejected[0]["reason"]
    assert store.count() == 7
