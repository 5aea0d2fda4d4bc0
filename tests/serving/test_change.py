"""Golden queries, tuning, and changing the student of a live collection."""

import json
import subprocess
import sys

import numpy as np
import pytest
from processes import python, started

from dclip_qdrant.detectors.grid import Grid
from dclip_qdrant.errors import GateError, MismatchError, UsageError
from dclip_qdrant.serving import change, golden, tune
from dclip_qdrant.serving.collection import META, CollectionSpec
from dclip_qdrant.serving.golden import load_golden
from dclip_qdrant.serving.ingest import ingest
from dclip_qdrant.serving.items import point_id
from dclip_qdrant.serving.reindex import reindex
from dclip_qdrant.serving.search import Fusion, search
from dclip_qdrant.serving.stores import Point, place
from dclip_qdrant.serving.student import Student


@pytest.fixture(scope="module")
def catalogue(scenes_folder):
    """The scenes with one caption each and a field of the team's own."""
    rows = [json.loads(line) for line in (scenes_folder / "captions.jsonl").read_text().splitlines()]
    path = scenes_folder / "catalogue.jsonl"
    path.write_text(
        "".join(
            json.dumps({"file_name": r["file_name"], "caption": r["captions"][0], "price": i}) + "\n"
            for i, r in enumerate(rows)
        )
    )
    return path


@pytest.fixture(params=["edge", "memory"])
def where(request, tmp_path):
    here = place(edge=str(tmp_path / "edge")) if request.param == "edge" else place(url=":memory:")
    yield here
    here.close()


@pytest.fixture
def old(where, catalogue, student_folder):
    store = where.open("pictures")
    ingest(
        str(catalogue),
        Student.load(student_folder),
        store,
        detector=Grid(),
        spec=CollectionSpec.load(),
    )
    return store


# --- golden


def test_golden_queries_never_stand_in_the_collection(old, pairs_folder, tmp_path):
    g = load_golden(str(pairs_folder), old, split="val")
    indexed = {p.payload["caption"].lower() for p in old.scroll()}
    assert len(g) > 0
    assert g.left_out > 0
    assert not {t.lower() for t in g.texts} & indexed
    first, second = g.halves()
    assert not set(first.picture) & set(second.picture)
    assert len(first) + len(second) == len(g)
    key = next(iter(old.scroll())).payload["key"]
    file = tmp_path / "g.jsonl"
    file.write_text(
        json.dumps({"text": "words of my own", "key": key})
        + "\n"
        + json.dumps({"text": "more", "keys": [key, "gone"]})
        + "\n"
    )
    g = load_golden(str(file), old)
    assert (g.texts, g.right) == (["words of my own", "more"], [{point_id(key)}, {point_id(key)}])
    file.write_text(json.dumps({"text": next(iter(old.scroll())).payload["caption"].upper(), "key": key}))
    with pytest.raises(UsageError, match="word for word"):
        load_golden(str(file), old)
    file.write_text(json.dumps({"text": "a", "key": "gone"}))
    with pytest.raises(UsageError, match="none of its 1 pictures"):
        load_golden(str(file), old)
    file.write_text('{"text": 3')
    with pytest.raises(Exception, match=r"g.jsonl:1"):
        load_golden(str(file), old)


def test_scores_by_hand():
    g = golden.Golden(["a", "b", "c"], [{"x"}, {"y", "z"}, {"w"}], ["p", "p", "q"])
    s = golden.Scores.of(g, {"a": ["x"], "b": ["1", "2", "3", "4", "5", "z"], "c": ["1"]}.get)
    assert s.row() == {"r@1": 0.3333, "r@5": 0.3333, "r@10": 0.6667, "mrr@10": round((1 + 1 / 6) / 3, 4)}
    np.testing.assert_allclose(s.together, [1, 1 / 3, 0])
    np.testing.assert_allclose(golden.by_picture(s.together, g), [2 / 3, 0])


# --- tuning


class Told:
    """A store whose lists are told: dense finds nothing, BM25 finds it second, regions first."""

    name = "told"

    def __init__(self, meta):
        self.meta = meta

    def metadata(self):
        return self.meta

    def set_metadata(self, meta):
        self.meta = meta

    def query(self, q):
        kind = q.weights.index(1.0)
        right = point_id(q.text) if q.text else self.right[tuple(np.round(q.vector, 5))]
        ids = {0: ["1", "2", "3"], 1: ["4", right], 2: [right, "5"]}[kind]
        return [Point(i, None, None, {}) for i in ids]


def test_tuning_finds_the_source_that_is_right(student_folder):
    student = Student.load(student_folder)
    texts = [f"text {i}" for i in range(40)]
    store = Told({META: {"student": student.model_name, "fingerprint": student.fingerprint}, "theirs": 1})
    store.right = {
        tuple(np.round(v, 5)): point_id(t) for v, t in zip(student.embed_texts(texts), texts, strict=True)
    }
    g = golden.Golden(texts, [{point_id(t)} for t in texts], texts)
    result = tune.tune(store, student, g)
    assert result.figures["tuned"]["r@1"] == 1.0
    assert (
        result.figures["dense"]["r@10"],
        result.figures["bm25"]["r@1"],
        result.figures["bm25"]["mrr@10"],
    ) == (0.0, 0.0, 0.5)
    assert result.chosen_on + result.measured_on == 40
    assert store.meta["theirs"] == 1
    assert Fusion.of(store.meta).regions > 0
    assert next(v for v in result.versus if v.than == "dense").ci[0] > 0.9
    assert "tuned minus dense" in tune.describe(result)


def test_every_fusion_at_once_is_the_sum_of_its_ranks(rng):
    """`Candidates` against `stores.rrf` and a sort, query by query."""
    from dclip_qdrant.serving.search import Fusion
    from dclip_qdrant.serving.stores.base import rrf

    names = [f"p{i}" for i in range(30)]
    lists = [tuple(list(rng.permutation(names)[: rng.integers(0, 25)]) for _ in range(3)) for _ in range(50)]
    right = [set(rng.choice(names, 2)) for _ in lists]
    candidates = tune.Candidates.of(lists, right)
    for f in (Fusion(1, 0.5, 0.3, 2), Fusion(1, 1, 0, 60), Fusion(0, 1, 0, 60), Fusion(1, 3, 2, 10)):
        wanted = []
        for found, good in zip(lists, right, strict=True):
            score = rrf(list(found), (f.dense, f.bm25, f.regions), f.k)
            order = sorted(score, key=lambda i: -score[i])
            wanted.append(next((n for n, i in enumerate(order, 1) if i in good), np.inf))
        got = candidates.scores(f)
        np.testing.assert_array_equal(got.r10, np.array(wanted) <= 10)
        np.testing.assert_array_equal(got.r1, np.array(wanted) <= 1)
        np.testing.assert_allclose(got.rr, np.where(np.array(wanted) <= 10, 1 / np.array(wanted), 0))


def test_search_uses_what_was_tuned(old, student_folder, pairs_folder):
    student = Student.load(student_folder)
    g = load_golden(str(pairs_folder), old, split="test")
    result = tune.tune(old, student, g)
    f = Fusion.of(old.metadata())
    assert f == result.fusion
    scores = lambda **options: [
        h.score for h in search(old, student, text="a red square", mode="hybrid", **options)
    ]
    assert scores() == pytest.approx(scores(fusion=f))


# --- another student


def test_reindex_gate_promote_rollback(where, old, student_folder, other_student, pairs_folder):
    before, after = Student.load(student_folder), Student.load(other_student)
    change.promote(where, "live", "pictures")
    new, report = reindex(where, "live", after)
    assert new.name == f"pictures-{after.fingerprint[:8]}"
    assert (report.embedded, report.rejected) == (60, 0)
    new, report = reindex(where, "live", after)
    assert (report.embedded, report.unchanged) == (0, 60)
    mine = {p.id: p for p in new.scroll(with_vectors=True)}
    for p in old.scroll():
        assert mine[p.id].payload == p.payload | {"student": after.model_name}  # price and all
    some = next(iter(mine.values()))
    assert some.regions.shape == (5, after.dim)
    ingest_again = search(new, after, text="a red square", limit=60)
    assert {h.id for h in ingest_again} == set(mine)
    with pytest.raises(MismatchError):
        search(new, before, text="a red square")

    with pytest.raises(GateError, match="never compared"):
        change.promote(where, "live", new.name)
    g = load_golden(str(pairs_folder), old, split="test")
    with pytest.raises(MismatchError):
        change.compare(old, after, new, before, g)
    result = change.compare(old, before, new, after, g)
    assert result.difference == pytest.approx(
        np.mean(list(result.after.values())[:3]) - np.mean(list(result.before.values())[:3]), abs=0.05
    )
    metadata = new.metadata()
    new.set_metadata(metadata | {META: metadata[META] | {"golden": result.row() | {"difference": -0.02}}})
    with pytest.raises(GateError, match=r"-2.0 points"):
        change.promote(where, "live", new.name)
    assert where.aliases() == {"live": "pictures"}
    change.promote(where, "live", new.name, tolerance=0.02)
    assert where.aliases() == {"live": new.name}
    rows = {v.collection: v for v in change.versions(where)}
    assert rows[new.name].aliases == ["live"]
    assert rows[new.name].replaces == "pictures"
    assert rows["pictures"].student == before.model_name
    assert change.rollback(where, "live").collection == "pictures"
    assert where.aliases() == {"live": "pictures"}
    with pytest.raises(UsageError, match="nothing was before"):
        change.rollback(where, "live")
    with pytest.raises(UsageError, match="no alias"):
        change.rollback(where, "gone")
    with pytest.raises(UsageError, match="is a collection"):
        change.promote(where, "pictures", new.name)


def test_points_that_cant_be_carried_are_rejected(where, old, other_student, catalogue, tmp_path):
    """A foreign point, a picture that is gone, one that changed: each with its reason; the promotion sees
    that they are missing."""
    rows = list(old.scroll(with_vectors=True))
    d = rows[0].image.shape[0]
    old.upsert(
        [
            Point(point_id("foreign"), np.ones(d, np.float32), None, {"theirs": 1}),
            Point(
                point_id("gone"),
                np.ones(d, np.float32),
                None,
                rows[1].payload | {"key": "gone", "uri": str(tmp_path / "gone.jpg")},
            ),
            Point(
                point_id("changed"),
                np.ones(d, np.float32),
                None,
                rows[1].payload | {"key": "changed", "content_hash": "0"},
            ),
        ]
    )
    rejects = tmp_path / "rejects.jsonl"
    new, report = reindex(where, "pictures", Student.load(other_student), to="next", rejects=str(rejects))
    assert (report.embedded, report.rejected) == (60, 3)
    reasons = {r["key"]: r["reason"] for r in map(json.loads, rejects.read_text().splitlines())}
    assert "no uri or content_hash" in reasons[point_id("foreign")]
    assert "`source`" in reasons["gone"]
    assert "changed since it was ingested" in reasons["changed"]
    change.promote(where, "live", "pictures")
    with pytest.raises(GateError, match="3 points fewer"):
        change.promote(where, "live", "next")
    with pytest.raises(GateError, match="never compared"):
        change.promote(where, "live", "next", missing=3)
    assert change.promote(where, "live", "next", force=True).before == "pictures"
    assert new.count() == 60


def test_pictures_inside_parquet_come_from_the_source(where, pairs_folder, student_folder, other_student):
    from dclip_qdrant.pairs import Pairs

    embedded = Pairs.open(str(pairs_folder))
    assert embedded.splits()
    store = where.open("p")
    ingest(str(pairs_folder), Student.load(student_folder), store, spec=CollectionSpec.load())
    new, report = reindex(where, "p", Student.load(other_student), source=str(pairs_folder))
    assert (report.embedded, report.rejected) == (store.count(), 0)
    assert new.count() == store.count()


def test_push_copies_everything_once(where, old, tmp_path):
    target = place(url=":memory:")
    assert change.push(where, target, "pictures") == (60, 60)
    assert change.push(where, target, "pictures") == (60, 0)
    theirs = {p.id: p for p in target.open("pictures").scroll(with_vectors=True)}
    for p in old.scroll(with_vectors=True):
        assert theirs[p.id].payload == p.payload
        np.testing.assert_allclose(theirs[p.id].image, p.image, atol=1e-6)
        np.testing.assert_allclose(theirs[p.id].regions, p.regions, atol=1e-6)
    assert target.open("pictures").metadata()[META]["student"] == old.metadata()[META]["student"]
    target.open("pictures").set_metadata({META: {"fingerprint": "another"}})
    with pytest.raises(MismatchError):
        change.push(where, target, "pictures")


KILLED = """
import sys
from dclip_qdrant.serving.reindex import reindex
from dclip_qdrant.serving.student import Student
from dclip_qdrant.serving.stores import place
import dclip_qdrant.serving.ingest as c
c.WINDOW = 8
import dclip_qdrant.serving.reindex as r
r.WINDOW = 8
def tell(report):
    print(report.embedded, flush=True)
    import time; time.sleep(0.3)
reindex(place(edge=sys.argv[1]), "pictures", Student.load(sys.argv[2]), to="next", progress=tell)
"""


@pytest.mark.slow
def test_a_killed_reindex_goes_on(catalogue, student_folder, other_student, tmp_path):
    here = place(edge=str(tmp_path))
    ingest(
        str(catalogue),
        Student.load(student_folder),
        here.open("pictures"),
        detector=Grid(),
        spec=CollectionSpec.load(),
    )
    here.close()
    command = [sys.executable, "-c", KILLED, tmp_path, other_student]
    with started(command, stdout=subprocess.PIPE) as process:
        while int(process.stdout.readline()) < 16:
            pass
        process.kill()
    here = place(edge=str(tmp_path))
    had = here.open("next").count()
    assert 0 < had < 60
    new, report = reindex(here, "pictures", Student.load(other_student), to="next")
    assert (report.embedded, report.unchanged) == (60 - had, had)
    whole, _ = reindex(here, "pictures", Student.load(other_student), to="whole")
    ours, theirs = ({p.id: p for p in s.scroll(with_vectors=True)} for s in (new, whole))
    assert set(ours) == set(theirs)
    for i in ours:
        assert ours[i].payload == theirs[i].payload
        np.testing.assert_allclose(ours[i].image, theirs[i].image, atol=1e-6)
    here.close()


def test_the_command_line_goes_the_whole_way(
    catalogue, student_folder, other_student, pairs_folder, tmp_path
):
    def cli(*args, code=0):
        return python("-m", "dclip_qdrant.cli", *args, cwd=tmp_path, code=code)

    cli(
        "ingest",
        catalogue,
        "--student",
        student_folder,
        "--collection",
        "pictures",
        "--detector",
        "grid",
        "--quiet",
    )
    out = json.loads(
        cli(
            "tune",
            "--pairs",
            pairs_folder,
            "--split",
            "test",
            "--student",
            student_folder,
            "--collection",
            "pictures",
            "--format",
            "json",
            "--quiet",
        ).stdout
    )
    assert out["queries"]["measured_on"] > 0
    cli("promote", "--alias", "live", "--to", "pictures")
    done = cli(
        "reindex",
        "--from",
        "live",
        "--student",
        other_student,
        "--golden",
        pairs_folder,
        "--split",
        "test",
        "--old-student",
        student_folder,
        "--quiet",
    )
    to = json.loads(done.stdout)["collection"]
    assert "golden" in json.loads(done.stdout)
    cli("promote", "--alias", "live", "--to", to, "--tolerance", "1")
    assert "<- live" in next(line for line in cli("collections").stdout.splitlines() if line.startswith(to))
    cli("search", "a red square", "--student", other_student, "--collection", "live")
    refused = cli("search", "a red square", "--student", student_folder, "--collection", "live", code=4)
    for name in (Student.load(student_folder).model_name, Student.load(other_student).model_name):
        assert name in refused.stderr
    cli("rollback", "--alias", "live")
    cli(
        "search",
        "a red square",
        "--student",
        student_folder,
        "--collection",
        "live",
        "--mode",
        "hybrid",
        "--explain",
        "--diversity",
        "0.3",
    )
    cli("reindex", "--from", "pictures", "--student", other_student, "--golden", pairs_folder, code=2)


def test_a_query_is_one_call_and_a_moved_alias_is_noticed(catalogue, student_folder, other_student):
    here = place(url=":memory:")
    student, other = Student.load(student_folder), Student.load(other_student)
    for name, own in (("before", student), ("after", other)):
        ingest(str(catalogue), own, here.open(name), limit=5)
    here.point("live", "before")
    store, calls = here.open("live"), []
    ask = store._call
    store._call = lambda request: calls.append(request) or ask(request)
    search(store, student, text="a red square")
    calls.clear()
    search(store, student, text="a blue square")
    assert len(calls) == 1
    here.point("live", "after")
    with pytest.raises(MismatchError, match="filled by"):
        search(store, student, text="a blue square")
    assert search(store, other, text="a blue square")
    here.close()
