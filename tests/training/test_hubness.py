"""Hubs turned down in the weights: the equation in loops, hubs made by hand, and the maps inside real
towers."""

import numpy as np
import pytest
import torch

from dclip_qdrant.errors import RecipeError
from dclip_qdrant.metrics import mean_r1, normalise, ranks
from dclip_qdrant.training import hubness
from dclip_qdrant.training.models import two_tower


def unit(rng, n, d):
    return normalise(rng.normal(size=(n, d)) * np.linspace(2, 0.2, d)).astype(np.float64)


def test_the_cosine_is_the_equations(rng):
    image, text = unit(rng, 40, 8), unit(rng, 60, 8)
    a, b = (m.numpy() for m in hubness.maps(image, text, 0.25, 5.0))
    assert a.shape == b.shape == (8, 8)
    got = normalise(image @ a) @ normalise(text @ b).T
    moment = lambda x: sum(np.outer(v, v) for v in x) / len(x)
    _, direction = np.linalg.eigh(moment(image) + moment(text))
    p = direction[:, 4:] @ direction[:, 4:].T  # 2k = 4 of 8 are left out
    (e, u), (f, v) = np.linalg.eigh(moment(text)), np.linalg.eigh(moment(image))
    for n in (0, 7, 39):
        for m in (0, 31, 59):
            i, t = image[n], text[m]
            left = (p @ i) @ (p @ i) + 5.0 * sum(e[j] * (u[:, j] @ i) ** 2 for j in (6, 7))
            right = (p @ t) @ (p @ t) + 5.0 * sum(f[j] * (v[:, j] @ t) ** 2 for j in (6, 7))
            assert got[n, m] == pytest.approx(i @ p @ t / np.sqrt(left * right), abs=1e-6)


def test_vectors_are_turned_as_little_as_can_be(rng):
    """The sum of both maps is symmetric and has no negative eigenvalue: what solves the Procrustes problem.
    Signs and halves of vectors stay usable."""
    image, text = unit(rng, 400, 32), unit(rng, 600, 32)
    a, b = (m.numpy() for m in hubness.maps(image, text, 1 / 16, 20.0))
    both = a + b
    assert both == pytest.approx(both.T, abs=1e-8)
    assert np.linalg.eigvalsh(both).min() > -1e-8
    moved = normalise(image @ a)
    assert (np.sign(moved) == np.sign(image)).mean() > 0.8
    assert np.mean([np.corrcoef(moved[:, d], image[:, d])[0, 1] for d in range(32)]) > 0.8


def test_by_hand():
    """All captions along x, all pictures along y: k = 1. A picture halfway between is as long as sqrt(1 + 8 x
    1/2)."""
    image, text = np.tile([0.0, 1.0, 0, 0], (5, 1)), np.tile([1.0, 0.0, 0, 0], (5, 1))
    a, b = (m.numpy() for m in hubness.maps(image, text, 0.25, 8.0))
    half = np.array([1.0, 1.0, 0, 0]) / np.sqrt(2)
    assert np.linalg.norm(half @ a) ** 2 == pytest.approx(1 + 8 * 0.5)
    assert np.linalg.norm(half @ b) ** 2 == pytest.approx(1 + 8 * 0.5)
    # nothing along the captions' direction: as long as it was
    assert np.linalg.norm(image[0] @ a) ** 2 == pytest.approx(1)
    assert (half @ a) @ (half @ b) == pytest.approx(1)  # dot products stay


def test_a_hub_no_longer_stands_before_the_right_answer(rng):
    """Pictures and captions of 200 things, in a space in which every caption also has a common part, and one
    picture in ten has it too: these are hubs."""
    things = rng.normal(size=(200, 32))
    common = np.r_[np.ones(2), np.zeros(30)] * 4
    text = normalise(
        things + 0.6 * rng.normal(size=things.shape) + common * rng.normal(1, 0.3, size=(200, 1))
    )
    image = normalise(
        things + 0.6 * rng.normal(size=things.shape) + common * (np.arange(200) % 10 == 0)[:, None]
    )
    before = (text @ image.T).argmax(1)
    a, b = (m.numpy() for m in hubness.maps(image[100:], text[100:], 1 / 16, 20.0))
    i, t = normalise(image @ a), normalise(text @ b)
    after = (t @ i.T).argmax(1)
    hub = lambda found: np.mean(found[:100] % 10 == 0)  # of the captions that the maps have not seen
    assert hub(before) > 0.3
    assert hub(after) < 0.5 * hub(before)
    score = lambda i, t: mean_r1(
        ranks(i[:100].astype(np.float32), t[:100].astype(np.float32), np.arange(100))
    ).mean()
    assert score(i, t) > score(image, text) + 0.1


def test_inside_towers_it_is_the_same(tiny_base, rng):
    model = two_tower.load(str(tiny_base))
    pixels = torch.from_numpy(rng.normal(size=(4, 3, 32, 32)).astype(np.float32))
    ids = model.tokens(["a red star", "two houses", "a ring", "blue"])
    a, b = hubness.maps(unit(rng, 50, model.dim), unit(rng, 50, model.dim), 1 / 16, 20.0)
    with torch.no_grad():
        image, text = model.encode_image(pixels), model.encode_text(ids)
        model.map_outputs(a, b)
        torch.testing.assert_close(
            model.encode_image(pixels), (image.double() @ a).float(), atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(model.encode_text(ids), (text.double() @ b).float(), atol=1e-4, rtol=1e-4)


def test_there_must_be_room(rng):
    with pytest.raises(RecipeError, match="hubness.share"):
        hubness.maps(unit(rng, 9, 4), unit(rng, 9, 4), 0.49, 1.0)
