"""Figures against numbers worked out by hand, and against a naive transcription of the definitions."""

import numpy as np
import pytest

from dclip_qdrant import metrics


def test_ranks_by_hand():
    # similarities: caption 0 and 1 belong to picture 0, caption 2 to picture 1
    image = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    text = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], np.float32)
    r = metrics.ranks(image, text, np.array([0, 0, 1]))
    assert r.t2i.tolist() == [1, 2, 1]
    # picture 0 sees captions at 1.0 (own), 0.6 (own), 0.0: ranks 1, 2; picture 1 sees 0, 0.8, 1.0 (own): rank
    # 1
    assert [x.tolist() for x in r.i2t] == [[1, 2], [1]]
    out = metrics.retrieval(r, bootstrap=0)
    assert out["t2i"]["r@1"] == pytest.approx(2 / 3)
    assert out["t2i"]["mrr"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert out["i2t"]["r@1"] == 1.0
    assert out["mrr"] == pytest.approx((2.5 / 3 + 1) / 2)


def test_average_precision_by_hand():
    # own captions at ranks 1, 3 and 4: AP = (1/1 + 2/3 + 3/4) / 3
    r = metrics.Ranks(np.array([1, 1, 1]), [np.array([1, 3, 4])], np.array([0, 0, 0]))
    assert metrics.retrieval(r, bootstrap=0)["i2t"]["map"] == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)


def test_a_model_that_says_the_same_of_everything_scores_nothing():
    image, text = np.ones((20, 3), np.float32), np.ones((20, 3), np.float32)
    out = metrics.retrieval(metrics.ranks(image, text, np.arange(20)), bootstrap=0)
    assert out["t2i"]["r@10"] == 0.0
    assert out["i2t"]["r@10"] == 0.0
    assert metrics.zero_shot(image, np.zeros(20, int), np.ones((4, 3))) == 0.0


def naive(image, text, owner):
    """The definitions, word by word, with loops."""
    s = image @ text.T
    hits, ap = {("t2i", k): [] for k in metrics.KS} | {("i2t", k): [] for k in metrics.KS}, []
    for m in range(len(text)):
        rank = sum(s[n, m] >= s[owner[m], m] for n in range(len(image)))
        for k in metrics.KS:
            hits["t2i", k].append(rank <= k)
    for n in range(len(image)):
        order = sorted(range(len(text)), key=lambda m: (-s[n, m], owner[m] == n))
        places = [i + 1 for i, m in enumerate(order) if owner[m] == n]
        for k in metrics.KS:
            hits["i2t", k].append(min(places) <= k)
        ap.append(np.mean([(i + 1) / p for i, p in enumerate(places)]))
    return {k: np.mean(v) for k, v in hits.items()}, np.mean(ap)


def test_against_the_naive_definitions(rng):
    image, text = metrics.normalise(rng.normal(size=(40, 8))), metrics.normalise(rng.normal(size=(100, 8)))
    owner = np.sort(rng.integers(0, 40, 100))
    owner[:40] = np.arange(40)
    out = metrics.retrieval(metrics.ranks(image, text, owner, block=7), bootstrap=0)
    hits, ap = naive(image, text, owner)
    for (way, k), value in hits.items():
        assert out[way][f"r@{k}"] == pytest.approx(value), (way, k)
    assert out["i2t"]["map"] == pytest.approx(ap)


def test_bootstrap_interval_covers_and_narrows(rng):
    image = metrics.normalise(rng.normal(size=(300, 16)))
    text = metrics.normalise(image + 0.35 * rng.normal(size=image.shape))
    few = metrics.retrieval(metrics.ranks(image[:50], text[:50], np.arange(50)))
    many = metrics.retrieval(metrics.ranks(image, text, np.arange(300)))
    for out in (few, many):
        low, high = out["ci"]["t2i"]["r@1"]
        assert low <= out["t2i"]["r@1"] <= high
    width = lambda o: o["ci"]["t2i"]["r@5"][1] - o["ci"]["t2i"]["r@5"][0]
    assert width(many) <= width(few)


def test_paired_difference_is_zero_against_itself_and_finds_a_gain(rng):
    image = metrics.normalise(rng.normal(size=(200, 16)))
    worse = metrics.mean_r1(
        metrics.ranks(image, metrics.normalise(image + 0.9 * rng.normal(size=image.shape)), np.arange(200))
    )
    better = metrics.mean_r1(
        metrics.ranks(image, metrics.normalise(image + 0.1 * rng.normal(size=image.shape)), np.arange(200))
    )
    assert metrics.paired_difference(worse, worse)["ci"] == [0.0, 0.0]
    assert metrics.paired_difference(worse, better)["ci"][0] > 0


def test_seeds_are_drawn_too():
    level, ahead = np.zeros((2, 50)), np.stack([np.zeros(50), np.ones(50)])
    one = metrics.paired_difference(level[0], ahead[0])
    assert (one["difference"], one["ci"]) == (0.0, [0.0, 0.0])
    # of two seeds one is drawn: all or nothing, whatever the pictures
    assert metrics.paired_difference(level, ahead) == {"difference": 0.5, "ci": [0.0, 1.0]}
    assert metrics.paired_difference(level[:1], ahead) == {"difference": 0.5, "ci": [0.0, 1.0]}
    # the same seeds stand in the same rows: what both have of a good seed is no difference
    assert metrics.paired_difference(ahead, ahead + 0.25) == {"difference": 0.25, "ci": [0.25, 0.25]}
    # of three seeds two: each of 0, 1, 2 twice in a ninth of all draws, so that both ends are seen
    three = np.repeat([[0.0], [1.0], [2.0]], 50, axis=1)
    assert metrics.paired_difference(level[0], three)["ci"] == [0.0, 2.0]
    # two sides of unlike counts are drawn each by itself
    assert metrics.paired_difference(ahead, three)["ci"] == [-1.0, 2.0]


def test_nan_is_refused():
    bad = np.full((2, 2), np.nan, np.float32)
    with pytest.raises(ValueError, match="NaN"):
        metrics.ranks(bad, bad, np.arange(2))


def test_zero_shot_by_hand():
    classes = np.eye(3, dtype=np.float32)
    image = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.9, 0.1, 0]], np.float32)
    assert metrics.zero_shot(image, np.array([0, 1, 2, 1]), classes) == 0.75
