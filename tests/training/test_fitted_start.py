"""Output projections in closed form, against numpy's own least squares."""

import numpy as np
import pytest
import torch
from model_folders import LIGHT, model_folder

from dclip_qdrant import metrics
from dclip_qdrant.training import fitted_start
from dclip_qdrant.training.data import Cache
from dclip_qdrant.training.models import two_tower


@pytest.mark.parametrize("offset", [False, True])
def test_ridge_is_the_least_squares_of_the_augmented_rows(rng, monkeypatch, offset):
    monkeypatch.setattr(fitted_start, "STRENGTHS", (0.3,))
    monkeypatch.setattr(fitted_start, "BLOCK", 17)
    x, y = rng.standard_normal((60, 8)) + 1, rng.standard_normal((60, 3))
    fit = fitted_start.ridge(x, y, offset=offset)
    weight = 0.3 * x.var(0).mean() * len(x)
    a, b = (x - x.mean(0), y - y.mean(0)) if offset else (x, y)
    rows = np.concatenate([a, np.sqrt(weight) * np.eye(8)])
    want = np.linalg.lstsq(rows, np.concatenate([b, np.zeros((8, 3))]), rcond=None)[0]
    np.testing.assert_allclose(fit.weights, want, atol=1e-9)
    shift = y.mean(0) - x.mean(0) @ want if offset else np.zeros(3)
    np.testing.assert_allclose(fit.offset, shift, atol=1e-9)


def test_the_strength_is_chosen_on_rows_that_were_not_fitted(rng):
    """Few rows, many features: on the rows themselves the weakest would always win."""
    x = rng.standard_normal((500, 450))
    wanted = x @ rng.standard_normal((450, 4)) + 20 * rng.standard_normal((500, 4))
    noisy = fitted_start.ridge(x, wanted, offset=False)
    assert noisy.strength == max(fitted_start.STRENGTHS)
    many = rng.standard_normal((2000, 50))
    exact = fitted_start.ridge(many, many @ rng.standard_normal((50, 4)), offset=False)
    assert exact.strength == min(fitted_start.STRENGTHS)
    assert exact.cosine > 0.999


def own_and_targets(model, rng, *, trunk):
    """What a model says of pictures and captions, and targets that one linear map of it reaches."""
    n, dim = 400, model.dim
    image_below = rng.standard_normal((n, 1, 1280 if trunk else dim)).astype(np.float32)
    text_below = rng.standard_normal((n, 16 if trunk else dim)).astype(np.float32)
    of_image = rng.standard_normal((image_below.shape[-1], dim)) / 30
    of_text = rng.standard_normal((text_below.shape[-1], dim))
    empty = np.zeros((n, 1, 0), np.float32)
    own = Cache(
        [],
        empty,
        empty,
        image_below if trunk else empty,
        image=np.ones((n, 1, dim), np.float32) if trunk else image_below,
        texts=np.ones((n, dim), np.float32) if trunk else text_below,
        text_trunk=text_below if trunk else empty[:, 0],
    )
    targets = Cache([], empty, empty, empty, texts=text_below @ of_text)
    targets.teacher = (image_below @ of_image)[:, :, None]
    return own, targets


def test_features_below_the_projections_are_fitted(rng, tmp_path):
    model = two_tower.load(model_folder(tmp_path / "light", LIGHT, 0))
    own, targets = own_and_targets(model, rng, trunk=True)
    lines = []
    fitted_start.fit(model, own, targets, lines.append)
    with torch.no_grad():
        text = model.text_head(torch.from_numpy(own.text_trunk))
        image = model.head(torch.from_numpy(own.trunk[:, 0]))
    assert (metrics.normalise(text.numpy()) * metrics.normalise(targets.texts)).sum(1).min() > 0.999
    cosines = (metrics.normalise(image.numpy()) * metrics.normalise(targets.teacher[:, 0, 0])).sum(1)
    assert cosines.mean() > 0.99  # 400 rows, 1,280 features: seen rows are met, held-out ones are not
    assert [line.split()[0] for line in lines] == ["image", "text"]


def test_a_tower_without_features_of_its_own_is_mapped_behind_its_projection(rng, tiny_base):
    model = two_tower.load(str(tiny_base))
    own, targets = own_and_targets(model, rng, trunk=False)
    ids = model.tokens(["a red dog", "two cats"])
    pixels = torch.rand(2, 3, model.preprocess.size, model.preprocess.size)
    with torch.no_grad():
        before = model.encode_image(pixels), model.encode_text(ids)
    fitted_start.fit(model, own, targets, lambda line: None)
    with torch.no_grad():
        after = model.encode_image(pixels), model.encode_text(ids)
    pairs = ((own.image[:, 0], targets.teacher[:, 0, 0]), (own.texts, targets.texts))
    for (x, y), was, now in zip(pairs, before, after, strict=True):
        want = was.numpy() @ fitted_start.ridge(x, y, offset=False).weights
        np.testing.assert_allclose(now.numpy(), want, rtol=1e-3, atol=1e-4)
