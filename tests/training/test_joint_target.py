"""Several teachers' vectors as one target: what it says is the weighted mean of what they say."""

from types import SimpleNamespace

import numpy as np
import pytest

from dclip_qdrant import metrics
from dclip_qdrant.errors import RecipeError
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.training import joint_target
from dclip_qdrant.training.joint_target import Member


def unit(rng, *shape):
    return metrics.normalise(rng.standard_normal(shape))


def test_the_cosine_of_joined_vectors_is_the_weighted_mean_of_cosines(rng):
    a, b = unit(rng, 5, 7), unit(rng, 5, 3)
    c, d = unit(rng, 4, 7), unit(rng, 4, 3)
    left = joint_target.side_by_side([3.0 * a, b], [1.0, 0.5])
    right = joint_target.side_by_side([c, d], [1.0, 0.5])
    # squares of the weights: 1 and 1/4, over their sum
    np.testing.assert_allclose(left @ right.T, (a @ c.T + 0.25 * (b @ d.T)) / 1.25, atol=1e-6)


def test_where_the_student_is_wide_enough_nothing_is_lost(rng):
    members = [Member(unit(rng, 30, 2, 7), unit(rng, 60, 7)), Member(unit(rng, 30, 2, 3), unit(rng, 60, 3))]
    start = Member(unit(rng, 30, 2, 12), unit(rng, 60, 12))
    joint = joint_target.learn(members, (1.0, 0.5), start, 12)
    image, text = joint([m.image for m in members]), joint([m.text for m in members])
    assert image.shape == (30, 2, 12)
    assert text.shape == (60, 12)
    assert image.dtype == np.float16
    whole = (
        members[0].image[:, 1] @ members[0].text.T + 0.25 * (members[1].image[:, 1] @ members[1].text.T)
    ) / 1.25
    np.testing.assert_allclose(image[:, 1].astype(float) @ text.T.astype(float), whole, atol=3e-3)


def test_a_narrow_student_keeps_the_directions_of_most_power(rng):
    """Against numpy's own SVD: the squared loss of the kept part is the sum of the smallest squared singular
    values of pictures and captions stacked (Eckart and Young 1936)."""
    scale = np.array([3, 2, 1, 0.3, 0.2, 0.1])
    image, text = unit(rng, 50, 6) * scale, unit(rng, 50, 6) * scale
    member = Member(metrics.normalise(image)[:, None], metrics.normalise(text))
    joint = joint_target.learn([member], (1.0,), Member(unit(rng, 50, 1, 2), unit(rng, 50, 2)), 2)
    stacked = np.concatenate([member.image[:, 0], member.text])
    lost = (stacked**2).sum() - ((stacked @ joint.basis) ** 2).sum()
    assert lost == pytest.approx((np.linalg.svd(stacked)[1][2:] ** 2).sum(), rel=1e-4)


def test_it_is_turned_towards_the_student(rng):
    """A teacher that is the student in other coordinates gives the student's own vectors."""
    start = Member(unit(rng, 40, 1, 5), unit(rng, 80, 5))
    turn = np.linalg.qr(rng.standard_normal((5, 5)))[0].astype(np.float32)
    joint = joint_target.learn([Member(start.image @ turn, start.text @ turn)], (1.0,), start, 5)
    np.testing.assert_allclose(joint([start.image @ turn]), start.image, atol=2e-3)
    np.testing.assert_allclose(joint([start.text @ turn]), start.text, atol=2e-3)


def test_blocks_change_nothing(rng, monkeypatch):
    members = [Member(unit(rng, 30, 2, 7), unit(rng, 60, 7))]
    start = Member(unit(rng, 30, 2, 4), unit(rng, 60, 4))
    whole = joint_target.learn(members, (1.0,), start, 4)([members[0].image])
    monkeypatch.setattr(joint_target, "ROWS", 7)
    pieces = joint_target.learn(members, (1.0,), start, 4)([members[0].image])
    np.testing.assert_allclose(pieces, whole, atol=2e-3)


def test_the_weight_that_finds_most_is_chosen(rng):
    owner = np.repeat(np.arange(40), 2)
    right = unit(rng, 40, 16)
    knows = Member(right[:, None], right[owner])
    guesses = Member(unit(rng, 40, 1, 16), unit(rng, 80, 16))
    weight, found = joint_target.choose_weight([guesses, knows], (0.1, 3.0), owner)
    assert weight == 3.0
    assert found[1] == 1.0 > found[0]
    weight, found = joint_target.choose_weight([knows, guesses], (0.1, 3.0), owner)
    assert weight == 0.1
    assert found[0] == 1.0


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("ensemble.models=['base']", '"student" in ensemble.models'),
        ("train.region_share=0.5", "captioned pictures alone"),
        ("student.text='frozen'", "student.text must learn"),
        ("ensemble.target='each'", "set ensemble.target"),
        ("ensemble.weights=[0.0]", "greater than 0"),
    ],
)
def test_recipes_that_no_joint_target_serves_are_refused(setting, why):
    with pytest.raises(RecipeError, match=why):
        Recipe.load("light", [setting])


def test_without_val_the_middle_weight_is_taken_aloud(monkeypatch):
    from dclip_qdrant.training import worker as module

    monkeypatch.setattr(module.Pairs, "open", lambda path: SimpleNamespace(splits=lambda: {"train": 9}))
    lines = []
    worker = module.Worker.__new__(module.Worker)
    recipe = Recipe.load("joint", ["ensemble.weights=[0.3, 0.6, 0.9]"])
    assert worker._joint_weight(SimpleNamespace(pairs="p"), recipe, lines.append) == 0.6
    assert "no val split" in lines[0]
