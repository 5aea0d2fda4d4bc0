"""Collections that a killed run left half made, that two runs make at once, or whose server forbids things;
and what filters that find nothing say."""

import datetime
import json
import logging
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from qdrant_client.http.exceptions import UnexpectedResponse

from dclip_qdrant.errors import StoreError, UsageError
from dclip_qdrant.serving.collection import CollectionSpec
from dclip_qdrant.serving.ingest import prepare_collection
from dclip_qdrant.serving.search import Hit, parse_filter, search
from dclip_qdrant.serving.stores import Condition, Point, Query, open_store
from dclip_qdrant.serving.stores.edge import Edge

METADATA = {"dclip": {"student": "s", "fingerprint": "f", "dim": 4}}


def point(i, **payload):
    return Point(f"00000000-0000-0000-0000-00000000000{i}", np.eye(4, dtype=np.float32)[i % 4], None, payload)


# --- killed while it was made


def test_a_kill_before_collection_json_is_no_end(tmp_path, monkeypatch):
    store = open_store("c", edge=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("dclip_qdrant.tables.storage.write_json", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.create(CollectionSpec.load(), 4, METADATA)
    store.close()
    again = open_store("c", edge=str(tmp_path))
    assert not again.exists()
    again.create(CollectionSpec.load(), 4, METADATA)
    again.upsert([point(1, key="a")])
    assert again.count() == 1
    again.close()
    assert [p.name for p in (tmp_path / "c").iterdir() if p.name.startswith("shard")] == ["shard"]


def test_points_without_their_collection_json_are_kept_under_another_name(tmp_path, caplog):
    store = open_store("c", edge=str(tmp_path))
    store.create(CollectionSpec.load(), 4, METADATA)
    store.upsert([point(1, key="a")])
    store.close()
    (tmp_path / "c" / "collection.json").unlink()
    with caplog.at_level(logging.WARNING):
        again = open_store("c", edge=str(tmp_path))
        again.create(CollectionSpec.load(), 4, METADATA)
    again.close()
    (kept,) = (tmp_path / "c").glob("shard-*")
    assert f"half made, without collection.json; kept as {kept.name}" in caplog.text
    kept.rename(tmp_path / "c" / "old")
    assert (tmp_path / "c" / "shard").is_dir()


def server(monkeypatch, **info):
    """A store on a server whose answers are these."""
    store = open_store("c", url="http://127.0.0.1:9", patience=0)
    config = {
        "params": SimpleNamespace(vectors={"image": SimpleNamespace(size=4)}, sparse_vectors=None),
        "metadata": {"dclip": METADATA["dclip"] | {"spec": CollectionSpec.load().model_dump(mode="json")}},
        "strict_mode_config": info.pop("strict", None),
    }
    told = SimpleNamespace(config=SimpleNamespace(**config), payload_schema={}, **info)
    told.payload_schema = info.get("there", {})
    monkeypatch.setattr(store.client, "collection_exists", lambda name: True)
    monkeypatch.setattr(store.client, "get_collection", lambda name: told)
    monkeypatch.setattr(type(store.connection), "version", lambda self: (1, 20))
    return store


def test_indexes_that_a_killed_run_did_not_make_are_made(monkeypatch):
    store = server(monkeypatch, there={"caption": 1, "key": 1, "width": 1})
    made = []
    monkeypatch.setattr(store.client, "create_payload_index", lambda name, key, kind, wait: made.append(key))
    store.complete()
    assert made == ["labels", "height"]


def refused(status, says):
    return UnexpectedResponse(status, "", json.dumps({"status": {"error": says}}).encode(), httpx.Headers())


def test_two_runs_that_make_a_collection_at_once_both_go_on(monkeypatch):
    store = server(monkeypatch)
    made = []

    def create(*args, **options):
        raise refused(409, "Wrong input: Collection `c` already exists!")

    monkeypatch.setattr(store.client, "create_collection", create)
    monkeypatch.setattr(store.client, "create_payload_index", lambda name, key, kind, wait: made.append(key))
    store.create(CollectionSpec.load(), 4, METADATA)
    assert set(made) == set(CollectionSpec.load().payload_indexes)  # the other may be killed before it has

    def forbid(*args, **options):
        raise refused(403, "Forbidden")

    monkeypatch.setattr(store.client, "create_collection", forbid)
    with pytest.raises(StoreError, match="HTTP 403: Forbidden"):
        store.create(CollectionSpec.load(), 4, METADATA)


# --- strict mode


def test_a_server_that_forbids_exact_counts_counts_roughly(monkeypatch):
    store = server(monkeypatch)

    def count(name, exact):
        if exact:
            raise refused(400, "Forbidden: Exact search is disabled")
        return SimpleNamespace(count=41)

    monkeypatch.setattr(store.client, "count", count)
    assert store.count() == 41


def test_a_collections_own_limit_of_candidates_is_kept(monkeypatch):
    strict = SimpleNamespace(enabled=True, max_query_limit=50)
    store = server(monkeypatch, strict=strict)
    asked = []

    def query_points(name, **request):
        asked.append(request)
        return SimpleNamespace(points=[])

    monkeypatch.setattr(store.client, "query_points", query_points)
    store.query(Query(limit=10, vector=np.zeros(4, np.float32), text="a", weights=(1, 1, 0), candidates=100))
    assert [p.limit for p in asked[0]["prefetch"]] == [50, 50]
    strict.enabled = False
    store.query(Query(limit=10, vector=np.zeros(4, np.float32), text="a", weights=(1, 1, 0), candidates=100))
    assert [p.limit for p in asked[1]["prefetch"]] == [100, 100]


# --- filters


def utc(*date):
    return datetime.datetime(*date, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("taken>=2024-07-01", utc(2024, 7, 1)),
        ("taken<2024-07-01T12:30:00+02:00", utc(2024, 7, 1, 10, 30)),
        ("taken>2024-07-01T12:30:00Z", utc(2024, 7, 1, 12, 30)),
        ("year>=2024", 2024.0),
    ],
)
def test_ranges_of_dates_and_numbers(text, value):
    (got,) = parse_filter(text).values
    assert got == value


def test_a_range_of_neither_is_refused():
    with pytest.raises(UsageError, match="a number or a date such as 2024-07-31 after >="):
        parse_filter("taken>=July")


@pytest.mark.parametrize("kind", ["edge", "memory"])
@pytest.mark.parametrize("indexed", [True, False])
def test_pictures_of_a_time_are_found(kind, indexed, tmp_path):
    spec = CollectionSpec.load()
    if indexed:
        spec = spec.model_copy(update={"payload_indexes": {"taken": "datetime"}})
    store = open_store("c", **({"edge": str(tmp_path)} if kind == "edge" else {"url": ":memory:"}))
    store.create(spec, 4, METADATA)
    dates = ["2023-12-31T23:59:59", "2024-01-01T00:00:00", "2024-06-01", None]
    store.upsert([point(i, key=str(i), taken=date) for i, date in enumerate(dates)])

    def found(*where):
        query = Query(limit=9, vector=np.ones(4, np.float32), where=tuple(parse_filter(w) for w in where))
        return sorted(hit.payload["key"] for hit in store.query(query))

    assert found("taken>=2024-01-01") == ["1", "2"]
    assert found("taken<2024-01-01") == ["0"]
    assert found("taken>2023-12-31", "taken<=2024-01-01") == ["0", "1"]
    store.close()


def test_a_filter_on_a_field_that_nobody_has_is_said(student, tmp_path, caplog):
    store = open_store("c", edge=str(tmp_path))
    prepare_collection(store, student, CollectionSpec.load())
    vector = np.ones(student.dim, np.float32)
    payload = {"key": "a", "price": 3, "labels": [], "tag": None}
    store.upsert([Point("00000000-0000-0000-0000-000000000001", vector, None, payload)])
    ask = lambda *where: search(store, student, text="x", where=where)
    with caplog.at_level(logging.WARNING):
        assert len(ask("price>=2")) == 1
        assert ask("price>=4") == []
        assert caplog.text == ""  # the field is there
        assert ask("prise>=2") == []
        assert "c: none of its first 1 pictures has 'prise'; they have key, price" in caplog.text
        assert ask("labels=dog") == []
        assert "has 'labels': regions are found by a detector" in caplog.text
    store.close()


def test_a_mistyped_folder_is_not_a_missing_collection(tmp_path):
    with pytest.raises(StoreError, match="no such folder.*check `edge`"):
        open_store("c", edge=str(tmp_path / "nowhere")).count()
    with pytest.raises(StoreError, match="no collection 'c'"):
        open_store("c", edge=str(tmp_path)).count()


def test_true_and_false_inside_objects_and_lists(tmp_path):
    store = open_store("c", edge=str(tmp_path))
    store.create(CollectionSpec.load(), 4, METADATA)
    values = [{"a": {"ok": True}}, {"a": [{"ok": False}, {"ok": True}]}, {"a": {"ok": 1}}, {"a": "x"}]
    store.upsert([point(i, key=str(i), **value) for i, value in enumerate(values)])
    for key, flag, wanted in (("a.ok", True, "0"), ("a[].ok", False, "1"), ("b", True, "")):
        where = (Condition(key, "=", (flag,)),)
        hits = store.query(Query(limit=9, vector=np.ones(4, np.float32), where=where))
        assert "".join(sorted(hit.payload["key"] for hit in hits)) == wanted
    assert isinstance(store, Edge)
    store.close()


def test_a_hits_row_holds_its_own_payload():
    row = Hit("1", 0.5, {"key": "a", "price": 3, "score": "theirs"}).row()
    assert (row["score"], row["key"], row["payload"]["price"], row["payload"]["score"]) == (
        0.5,
        "a",
        3,
        "theirs",
    )
