"""Recall through the index: settings, the real engine, what is left behind."""

import json

import numpy as np
import pytest

from dclip_qdrant.errors import UsageError
from dclip_qdrant.metrics import normalise
from dclip_qdrant.serving import index_recall
from dclip_qdrant.serving.stores import Point, Query, place


def test_settings():
    got = index_recall.parse("float32, int8@1/2, binary@16+rescore,turbo4+rescore3", 64)
    assert [(s.name, s.kind, s.dim, s.oversampling, s.bytes) for s in got] == [
        ("float32", "float32", 64, 0, 256),
        ("int8@32", "int8", 32, 0, 32),
        ("binary@16+rescore", "binary", 16, 2, 2),
        ("turbo4+rescore3", "turbo4", 64, 3, 32),
    ]
    assert len(index_recall.parse(index_recall.DEFAULT, 256)) >= 6


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("int7", "KIND one of float32"),
        ("", "KIND one of"),
        ("int8@65", "1 to 64 components"),
        ("int8@0", "1 to 64"),
        ("float32+rescore", "nothing was rounded"),
        ("int8,int8@64", "int8@64 twice"),
        ("int8@1/0", "1 to 64"),
        ("int8@1/128", "1 to 64"),
    ],
)
def test_wrong_settings_get_one_clear_line(text, says):
    with pytest.raises(UsageError, match=says):
        index_recall.parse(text, 64)


@pytest.fixture(scope="module")
def vectors():
    """400 pictures and a caption each; the first 16 of 64 components carry most."""
    rng = np.random.default_rng(0)
    scale = np.r_[np.ones(16), np.full(48, 0.2)]
    image = rng.normal(size=(400, 64)) * scale
    return normalise(image), normalise(image + 0.4 * rng.normal(size=image.shape) * scale), np.arange(400)


@pytest.fixture(scope="module")
def rows(vectors, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("edge"))
    settings = index_recall.parse("float32,float16,int8,turbo4,binary,binary+rescore4,float32@16", 64)
    where = place(edge=folder)
    out = index_recall.measure(*vectors, settings, where, queries=200, seed=3)
    assert where.collections() == []  # nothing is left behind
    where.close()
    return {r["setting"]: r for r in out}


def test_recall_falls_with_the_bytes_and_rescoring_wins_it_back(rows):
    recall = {k: r["recall@10"] for k, r in rows.items()}
    assert recall["float32"] > 0.99  # HNSW over 400
    assert recall["float16"] > 0.98
    assert recall["int8"] > 0.9
    assert recall["binary"] < recall["turbo4"] < recall["float32"]
    assert recall["binary"] < recall["binary+rescore4"]
    assert recall["float32@16"] < recall["float32"]
    assert [rows[k]["bytes"] for k in ("float32", "float16", "int8", "turbo4", "binary", "float32@16")] == [
        256,
        128,
        64,
        32,
        8,
        64,
    ]
    assert all(0 < r["p50_ms"] <= r["p95_ms"] for r in rows.values())


def test_task_recall_is_that_of_brute_force_at_full_length(rows, vectors):
    image, text, owner = vectors
    chosen = np.sort(np.random.default_rng(3).permutation(400)[:200])
    order = np.argsort(-(text[chosen] @ image.T), axis=1)
    right = [list(o[:10]).index(i) if i in o[:10] else 99 for o, i in zip(order, owner[chosen], strict=True)]
    for k in (1, 5, 10):
        # HNSW may miss one or two of 200
        assert rows["float32"]["t2i"][f"r@{k}"] == pytest.approx(np.mean([r < k for r in right]), abs=0.011)


def test_an_engine_that_rounds_nothing_is_refused(vectors):
    with pytest.raises(UsageError, match="neither quantises nor indexes"):
        index_recall.measure(*vectors, index_recall.parse("int8", 64), place(url=":memory:"))


def test_table_and_plot(rows, tmp_path):
    series = {"plain": list(rows.values()), "turned": list(rows.values())}
    text = index_recall.table(series)
    assert len(text.splitlines()) == 2 + 7
    assert "| int8 | 64 |" in text
    index_recall.plot(series, str(tmp_path / "p.svg"))
    assert "<svg" in (tmp_path / "p.svg").read_text()[:600]
    with pytest.raises(UsageError, match=r"\.svg, \.png"):
        index_recall.plot(series, str(tmp_path / "p.xyz"))


def test_the_command_line(student_folder, pairs_folder, tmp_path):
    from click.testing import CliRunner

    from dclip_qdrant.cli import main

    args = [
        "evaluate",
        "--student",
        str(student_folder),
        "--pairs",
        str(pairs_folder),
        "--through",
        "edge",
        "--index",
        "float32,int8@8",
    ]
    done = CliRunner().invoke(main, [*args, "--format", "json", "--plot", str(tmp_path / "p.png")])
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert [r["setting"] for r in facts["index"]] == ["float32", "int8@8"]
    assert (tmp_path / "p.png").stat().st_size > 1000
    done = CliRunner().invoke(main, [*args, "--beside", str(student_folder)])
    assert done.exit_code == 0, done.stderr
    done = CliRunner().invoke(main, [*args[:5], "--index", "int8"])
    assert isinstance(done.exception, UsageError)
    assert "without --through" in str(done.exception)


@pytest.mark.parametrize("where_to", [{"edge": None}, {"url": ":memory:"}])
def test_a_collection_of_short_vectors_cuts_what_comes(where_to, tmp_path, rng):
    """`dim` in a collection's spec: points and queries come whole and are cut at the store."""
    from dclip_qdrant.serving.collection import CollectionSpec

    where = place(edge=str(tmp_path)) if "edge" in where_to else place(**where_to)
    store = where.open("short")
    spec = CollectionSpec(
        vectors={"image": {"dim": 4}, "regions": {"dim": 4, "multivector": True, "hnsw": False}}
    )
    store.create(spec, 8, {"dclip": {"student": "s", "fingerprint": "f", "dim": 8}})
    x = normalise(rng.normal(size=(5, 8)))
    store.upsert(
        [Point(f"00000000-0000-0000-0000-00000000000{i}", v, np.stack([v, -v]), {}) for i, v in enumerate(x)]
    )
    hits = store.query(Query(limit=5, vector=x[2], with_image=True, with_regions=True))
    short = normalise(x[:, :4])
    assert [int(h.id[-1]) for h in hits] == np.argsort(-(short @ short[2])).tolist()
    assert [h.score for h in hits] == pytest.approx(np.sort(short @ short[2])[::-1].tolist(), abs=1e-5)
    assert hits[0].image.shape == (4,)
    best = store.query(Query(limit=5, vector=x[2], rescore=x[2][None]))
    assert int(best[0].id[-1]) == 2
    store.close()
    where.close()
