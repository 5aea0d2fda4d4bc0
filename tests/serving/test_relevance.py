"""From which cosine on something was found: the curve, its account, and search that keeps to it."""

import math
import zlib

import numpy as np
import pytest

from dclip_qdrant.errors import InputError, UsageError
from dclip_qdrant.metrics import normalise
from dclip_qdrant.serving import relevance, tune
from dclip_qdrant.serving.collection import META, CollectionSpec, metadata_of
from dclip_qdrant.serving.golden import Golden
from dclip_qdrant.serving.items import point_id
from dclip_qdrant.serving.relevance import Relevance, bins, fit, off_topic_texts
from dclip_qdrant.serving.search import search
from dclip_qdrant.serving.stores import Point, open_store

D = 16


class Speaker:
    """A student whose texts `picture <n>` lie near the n-th picture, and all others where no picture is."""

    name, dim, fingerprint, model_name = "fake", D, "f" * 64, "dclip/fake@ffffffff"

    def embed_texts(self, texts):
        out = np.zeros((len(texts), D), np.float32)
        for row, text in zip(out, texts, strict=True):
            number = int(text.split()[-1]) if text.startswith("picture") else None
            row[:] = vector(number) if number is not None else vector(zlib.crc32(text.encode())) * 0.3
            # pictures live in the first half of the components: what is in the second is near to none
            row[D // 2 :] = 0.35 if number is not None else 1.0
        return normalise(out)


def vector(seed):
    out = np.zeros(D, np.float32)
    out[: D // 2] = np.random.default_rng(seed).normal(size=D // 2)
    return normalise(out[None])[0]


@pytest.fixture(params=["edge", "memory"])
def store(request, tmp_path):
    where = {"edge": str(tmp_path)} if request.param == "edge" else {"url": ":memory:"}
    store = open_store("c", **where)
    store.create(CollectionSpec.load(), D, metadata_of(Speaker()))
    payload = {"student": Speaker.model_name, "caption": "x"}
    store.upsert(
        [Point(point_id(f"k{i}"), vector(i), vector(i)[None], payload | {"key": f"k{i}"}) for i in range(100)]
    )
    yield store
    store.close()


@pytest.fixture
def golden():
    texts = [f"picture {i}" for i in range(100)]
    return Golden(texts, [{point_id(f"k{i}")} for i in range(100)], [f"k{i}" for i in range(100)])


def test_the_curve_is_where_its_own_loss_is_least():
    """Against a search on a grid for Platt's objective, each kind weighing as much as the other."""
    rng = np.random.default_rng(0)
    cosines = np.concatenate([rng.normal(0.6, 0.1, 400), rng.normal(0.4, 0.1, 40)])
    answered = np.arange(440) < 400
    target = np.where(answered, 401 / 402, 1 / 42)
    weight = np.where(answered, 1 / 400, 1 / 40)

    def loss(slope, offset):
        z = slope * cosines + offset
        return float((weight * (np.logaddexp(0, z) - target * z)).sum())

    found = fit(cosines, answered)
    near = [
        loss(found.slope + a, found.offset + b)
        for a in (-0.5, -0.05, 0.05, 0.5)
        for b in (-0.3, -0.03, 0.03, 0.3)
    ]
    assert loss(found.slope, found.offset) < min(near)
    # two normal kinds of the same spread: the true curve is (0.6 - 0.4) / 0.1^2 (x - 0.5), one half at 0.5
    assert found.slope == pytest.approx(20, rel=0.3)
    assert found.probability(0.5) == pytest.approx(0.5, abs=0.08)


def test_kinds_that_do_not_overlap_still_have_a_curve():
    found = fit(np.array([0.7] * 30 + [0.2] * 30), np.arange(60) < 30)
    # Platt's targets: 31/32 and 1/32, which is reached exactly as there are two cosines
    assert found.probability(0.7) == pytest.approx(31 / 32, abs=1e-6)
    assert found.probability(0.2) == pytest.approx(1 / 32, abs=1e-6)


def test_the_formula_by_hand():
    assert Relevance(10.0, -5.0).probability(0.7) == pytest.approx(1 / (1 + math.exp(-2)))


def test_bins_by_hand():
    p = np.array([0.1, 0.1, 0.9, 0.9, 1.0])
    answered = np.array([True, False, True, True, False])
    low, high = bins(p, answered)
    # a golden query weighs 1/6, an off-topic one 1/4: of the first bin's 5/12, 1/6 is answered
    assert (low.low, low.queries, low.promised) == (0.0, 2, pytest.approx(0.1))
    assert low.observed == pytest.approx((1 / 6) / (1 / 6 + 1 / 4))
    assert (high.low, high.high, high.queries) == (0.8, 1.0, 3)
    assert high.observed == pytest.approx((2 / 6) / (2 / 6 + 1 / 4))


def test_tune_learns_it_and_search_keeps_to_it(store, golden):
    student = Speaker()
    tuning = tune.tune(store, student, golden)
    c = tuning.calibration
    assert (c.answered, c.empty) == (1.0, 1.0)
    assert sum(c.fitted_on) + sum(c.measured_on) == 100 + len(off_topic_texts(golden)[0])
    assert "100.0% of the golden queries are answered" in tune.describe(tuning)
    hits = search(store, student, text="picture 7", limit=3)
    known = store.metadata()[META]["relevance"]
    for hit in hits:
        wanted = 1 / (1 + math.exp(-(known["slope"] * hit.score + known["offset"])))
        assert hit.probability == pytest.approx(wanted)
        assert hit.row()["probability"] == hit.probability
    assert hits[0].payload["key"] == "k7"
    only = search(store, student, text="picture 7", limit=100, min_probability=0.5)
    assert only
    assert all(hit.probability >= 0.5 for hit in only)
    assert search(store, student, text="a jet engine turbine blade", limit=100, min_probability=0.5) == []
    assert search(store, student, text="a jet engine turbine blade", limit=3)


def test_where_there_is_no_probability_it_is_refused(store, golden):
    student = Speaker()
    ask = lambda **query: search(store, student, min_probability=0.5, **query)
    with pytest.raises(UsageError, match="dclip-qdrant tune"):
        ask(text="picture 7")
    tune.tune(store, student, golden)
    with pytest.raises(UsageError, match="`mode` hybrid"):
        ask(text="picture 7", mode="hybrid")
    with pytest.raises(UsageError, match="pictures or examples"):
        ask(text="picture 7", like=["k3"])
    with pytest.raises(UsageError, match="0 to 1"):
        search(store, student, text="picture 7", min_probability=1.5)
    assert search(store, student, text="picture 7", mode="hybrid")[0].probability is None


def test_a_few_queries_teach_nothing_and_it_is_said(store, golden, tmp_path):
    student = Speaker()
    tuning = tune.tune(store, student, golden.take(list(range(30))))
    assert tuning.calibration is None
    assert "nothing found: not learned" in tune.describe(tuning)
    assert Relevance.of(store.metadata()) is None
    few = tmp_path / "few.txt"
    few.write_text("a jet engine\n\n")
    with pytest.raises(UsageError, match="off-topic queries on a half"):
        tune.tune(store, student, golden, off_topic=str(few))


def test_off_topic_texts_of_the_users_own(tmp_path, golden):
    own = tmp_path / "own.txt"
    own.write_text("quarterly revenue\n\n  a proof \n")
    assert off_topic_texts(golden, own) == (["quarterly revenue", "a proof"], 0)
    with pytest.raises(InputError, match="can't be read"):
        off_topic_texts(golden, tmp_path / "none.txt")


def test_ours_that_share_their_words_with_the_golden_ones_are_left_out():
    ours, none = off_topic_texts(Golden(["a red square"], [set()], ["a"]))
    assert none == 0
    assert len(set(ours)) == len(ours) > 4 * relevance.LEAST
    # "jet engine turbine blade": three of its four long words; "turbine" alone is too few
    mine = Golden(["the blade of a turbine in an engine"], [set()], ["a"])
    far, left_out = off_topic_texts(mine)
    assert "a jet engine turbine blade" not in far
    assert left_out == len(ours) - len(far) == 1
