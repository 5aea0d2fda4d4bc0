"""What a job ends with."""

import numpy as np
import pytest

from dclip_qdrant import metrics
from dclip_qdrant.jobs.comparison import Difference, difference
from dclip_qdrant.jobs.verdict import judge


def against(than, low, high, needed=None):
    return Difference("best", than, (low + high) / 2, [low, high], n=1000, needed=needed)


def test_pictures_needed_by_hand():
    # mean 0.5, sd of 1, 0, 0, 1 with n - 1: sqrt(1/3); (1.96 * 0.57735 / 0.5)^2 = 5.12
    assert metrics.pictures_needed(np.array([1.0, 0.0, 0.0, 1.0])) == 6
    assert metrics.pictures_needed(np.array([1.0, -1.0])) is None
    own, other = np.array([[1.0, 0.5, 1.0, 0.0]]), np.array([[0.0, 0.5, 1.0, -1.0]])
    d = difference("a", own, "b", other)
    assert (d.n, d.needed, d.difference, d.seeds) == (4, 6, 0.5, 1)
    both = difference("a", np.concatenate([own + 0.25, own - 0.25]), "b", other)
    assert (both.n, both.needed, both.difference, both.seeds) == (4, 6, 0.5, 2)  # of the seeds' mean


def test_ratio_interval_is_paired():
    right = np.array([True, False, True, True, False, True, True, False])
    assert metrics.ratio_interval(right, right) == (1.0, 1.0)  # the same pictures right: no noise at all
    low, high = metrics.ratio_interval(right, ~right)
    assert low < 3 / 5 < high


@pytest.mark.parametrize(
    ("base", "plain", "words", "success"),
    [
        ((0.01, 0.03), (0.005, 0.02), ("better", "better"), True),
        ((0.01, 0.03), (-0.01, 0.02), ("better", "can't tell"), True),
        ((0.01, 0.03), (-0.03, -0.01), ("better", "worse"), False),
        ((-0.01, 0.02), (0.01, 0.02), ("can't tell", "better"), False),
        ((-0.03, -0.01), (0.01, 0.02), ("worse", "better"), False),
    ],
)
def test_only_a_student_that_is_shown_to_be_better_is_a_success(base, plain, words, success):
    differences = [
        against("base", *base, 1900),
        against("sft", 0.5, 0.6),
        against("sft+wise_ft", *plain, 7100),
    ]
    verdict = judge("best", differences, split="test")
    assert (verdict.against_base, verdict.against_plain) == words
    assert verdict.is_success is success
    assert ("ingest" in verdict.next) is success
    text = verdict.text()
    assert "on 1,000 pictures of test" in text
    assert ("about 1,900" in text) == (words[0] == "can't tell")
    assert ("about 7,100" in text) == (words[1] == "can't tell")


def test_without_a_rival_it_is_said():
    verdict = judge("best", [against("base", 0.01, 0.03)], split="test")
    assert verdict.against_plain is None
    assert verdict.is_success
    assert "not held against plain fine-tuning" in verdict.text()
    no_difference = judge("best", [against("base", 0.0, 0.0)], split="test")
    assert "no difference at all" in no_difference.text()


def test_a_border_is_no_contradiction():
    text = judge("best", [against("base", -0.001, 0.028, 577)], split="test").text()
    assert "it is close, a few more would tell" in text
    assert "577" not in text


def test_seeds_that_disagree_are_what_is_missing():
    spread = Difference("best", "base", 0.02, [-0.001, 0.04], n=1000, needed=300, seeds=3)
    verdict = judge("best", [spread], split="test")
    assert "on 1,000 pictures of test and 3 seeds; it is close, a few more seeds would tell" in verdict.text()
    assert "train more seeds" in verdict.next
    few = Difference("best", "base", 0.02, [-0.001, 0.04], n=1000, needed=1300, seeds=3)
    assert "more test pictures (about 1,300)" in judge("best", [few], split="test").next
