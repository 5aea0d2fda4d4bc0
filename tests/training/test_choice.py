"""Which point of a sweep becomes the student."""

import numpy as np
import pytest

from dclip_qdrant import metrics
from dclip_qdrant.training.choice import WORTH_A_DOUBT, choose_alpha, in_doubt
from dclip_qdrant.training.figures import SweepPoint


def test_alpha_is_chosen_by_validation_among_those_that_keep():
    sweep = [
        SweepPoint(0.2, 0.0, val=0.3, retention=1.02),
        SweepPoint(0.6, 0.0, val=0.5, retention=1.0),
        SweepPoint(1.0, 0.0, val=0.7, retention=0.9),
    ]
    assert choose_alpha(sweep, 1.0).alpha == 0.6
    assert choose_alpha(sweep, 0.9).alpha == 1.0
    assert choose_alpha(sweep, 1.5).alpha == 0.2
    assert choose_alpha([SweepPoint(0.5, 0.0, val=0.4), SweepPoint(1.0, 0.0, val=0.4)], 1.0).alpha == 1.0


def test_retrieval_that_is_sure_is_not_given_up_for_retention_that_is_not():
    kept = SweepPoint(0.2, 0.0, val=0.56, retention=1.01, retention_error=0.02)
    doubtful = SweepPoint(1.0, 20.0, val=0.64, retention=0.95, retention_error=0.06)
    assert choose_alpha([kept, doubtful], 1.0) is doubtful
    forgetful = SweepPoint(1.0, 0.0, val=0.64, retention=0.95, retention_error=0.04)
    assert choose_alpha([kept, forgetful], 1.0) is kept
    little = SweepPoint(1.0, 0.0, val=0.56 + WORTH_A_DOUBT / 2, retention=0.95, retention_error=0.06)
    assert choose_alpha([kept, little], 1.0) is kept
    none_keeps = SweepPoint(0.2, 0.0, val=0.56, retention=0.99, retention_error=0.02)
    assert choose_alpha([none_keeps, doubtful], 1.0) is doubtful


def test_a_choice_in_doubt_is_said():
    chosen = SweepPoint(0.9, 20.0, val=0.64, retention=0.95, retention_error=0.06)
    assert in_doubt(chosen, 1.0) == (
        "alpha 0.9 keeps 0.950 of the base's zero-shot accuracy on the labelled pictures that choose, "
        "standard error 0.060, 1.000 wanted"
    )


def test_error_of_a_ratio_by_hand():
    base = np.array([True, True, False, False])
    own = np.array([True, False, True, False])
    # ratio 1; residuals own - base are 0, -1, 1, 0, of deviation sqrt(0.5); over 0.5 x sqrt(4)
    assert metrics.ratio_error(base, own) == pytest.approx(0.5**0.5)
    assert metrics.ratio_error(base, base) == 0.0


def test_error_of_a_ratio_is_that_of_the_bootstrap():
    rng = np.random.default_rng(0)
    base = rng.random(400) < 0.5
    own = np.where(rng.random(400) < 0.8, base, rng.random(400) < 0.5)
    low, high = metrics.ratio_interval(base, own)
    assert metrics.ratio_error(base, own) == pytest.approx((high - low) / (2 * 1.96), rel=0.1)
