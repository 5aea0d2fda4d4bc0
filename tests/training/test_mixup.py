"""Blended pictures (train.mixup): what the student sees, what the teachers say of it, whose its captions
are."""

import math

import pytest
import torch

from dclip_qdrant.errors import RecipeError
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.training.contrast import positives
from dclip_qdrant.training.encoded import Blend, Encoded
from dclip_qdrant.training.objectives.soft_targets import SoftTargets
from dclip_qdrant.training.student_batch import StudentBatch, blend

PARTNER, SHARE = torch.tensor([1, 0, 2]), torch.tensor([0.75, 0.5, 0.9])


def batch(images):
    unit = torch.tensor(
        [[2.0, 0.0], [0.0, 4.0], [1.0, 0.0]]
    )  # of any length: teachers' vectors are made unit
    return StudentBatch(images, torch.zeros(3, 4), {"image": unit, "text": unit.clone(), "image.0": -unit})


def test_a_picture_and_its_targets_are_blended_by_the_same_share():
    maps = torch.tensor([1.0, 5.0, 7.0]).reshape(3, 1, 1, 1).half()
    b = batch(maps)
    blend(b, PARTNER, SHARE)
    assert b.images.dtype == torch.float16
    assert b.images.flatten().tolist() == [0.75 * 1 + 0.25 * 5, 0.5 * 5 + 0.5 * 1, 7.0]
    want = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]])
    torch.testing.assert_close(b.fixed["image"], want)
    torch.testing.assert_close(b.fixed["image.0"], -want)
    assert b.fixed["text"].tolist() == [[2, 0], [0, 4], [1, 0]]  # captions are as they were


def test_pixels_stay_whole_numbers():
    b = batch(torch.tensor([10, 20, 30], dtype=torch.uint8).reshape(3, 1, 1, 1))
    blend(b, PARTNER, SHARE)
    assert b.images.dtype == torch.uint8
    assert b.images.flatten().tolist() == [12, 15, 30]  # 12.5 to the even one


def test_a_partner_is_told_by_its_distance_so_that_two_workers_batches_fit_together():
    b = batch(torch.zeros(3, 1, 1, 1))
    blend(b, PARTNER, SHARE)
    both = torch.cat([b.fixed["blend"], b.fixed["blend"]])
    partner = torch.arange(6) + both[:, 0].long()
    assert partner.tolist() == [1, 0, 2, 4, 3, 5]
    torch.testing.assert_close(both[:3, 1], SHARE)


def test_a_caption_belongs_to_both_pictures_of_a_blend():
    owner = torch.tensor([0, 0, 1, 2])
    y = positives(owner, 3, Blend(PARTNER, SHARE))
    want = [[0.75, 0.75, 0.25, 0.0], [0.5, 0.5, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0]]
    torch.testing.assert_close(y, torch.tensor(want))


def test_soft_targets_with_labels_alone_are_the_blend_of_two_cross_entropies():
    """mixup's own form (eq. 1 in the loss): share CE(own) + (1 - share) CE(partner's), less the labels'
    entropy."""
    image, text = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.8, 0.6], [0.0, 1.0]])
    one = Blend(torch.tensor([1, 0]), torch.tensor([0.75, 0.75]))
    owner, scale = torch.arange(2), torch.tensor(1.0)
    got = SoftTargets(student_dim=2, teacher_dim=2, temperature=0.5, labels=1.0)(
        Encoded(image, text, owner, scale, blend=one), Encoded(image, text, owner, scale)
    )
    s = [[1.6, 0.0], [1.2, 2.0]]  # cosines / temperature

    def ce(row, label):
        return math.log(sum(map(math.exp, row))) - row[label]

    def mixed(row, own):
        return 0.75 * ce(row, own) + 0.25 * ce(row, 1 - own)

    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    rows = sum(mixed(s[i], i) - entropy for i in range(2)) / 2
    columns = sum(mixed([s[0][j], s[1][j]], j) - entropy for j in range(2)) / 2
    assert got.item() == pytest.approx((rows + columns) / 2, abs=1e-6)


def test_objectives_that_know_no_blend_are_refused():
    with pytest.raises(RecipeError, match="mixup"):
        Recipe.load("sft", ["train.mixup=1.0"])
    with pytest.raises(RecipeError, match="mixup"):
        Recipe.load("best", ["train.mixup=1.0"])  # crops of regions
    assert Recipe.load("joint").train.mixup == 1.0
