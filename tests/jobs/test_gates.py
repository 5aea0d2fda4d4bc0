"""What the retention gate advises."""

import pytest

from dclip_qdrant.errors import GateError
from dclip_qdrant.jobs.distill import Distilled, check_retention
from dclip_qdrant.jobs.verdict import Verdict
from dclip_qdrant.recipe import Recipe


def distilled(retention: float | None) -> Distilled:
    verdict = Verdict("better", "better", [], "")
    return Distilled([], [], "out/student", "test", {}, None, retention, verdict)


def test_the_advice_is_one_that_the_student_can_take():
    with pytest.raises(GateError, match=r"0\.950.*at least 1\.000.*out/student.*smaller alphas"):
        check_retention(distilled(0.95), Recipe.load("joint"), 1.0)
    with pytest.raises(GateError, match=r"keep more in student\.inherit"):
        check_retention(distilled(0.95), Recipe.load("light"), 1.0)


def test_what_keeps_enough_passes_and_what_was_not_measured_too():
    check_retention(distilled(1.0), Recipe.load("light"), 1.0)
    check_retention(distilled(None), Recipe.load("light"), 1.0)
