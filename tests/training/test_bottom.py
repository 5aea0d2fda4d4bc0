"""The part of a trunk that rests is run once a picture and view, and changes nothing."""

import copy

import numpy as np
import pytest
import torch
from model_folders import LIGHT, model_folder

from dclip_qdrant.recipe import StudentSettings
from dclip_qdrant.training.data import Decoded
from dclip_qdrant.training.models import two_tower
from dclip_qdrant.training.models.bottom import Bottom


def model_of(tmp_path, name):
    config = copy.deepcopy(LIGHT)
    config["model_cfg"]["vision_cfg"]["timm_model_name"] = name
    return two_tower.load(model_folder(tmp_path / name, config, 0))


@pytest.mark.parametrize("name", ["mobilenetv2_050", "tf_efficientnet_lite0"])
@pytest.mark.parametrize("last_n", [1, 3, 8])
def test_below_and_above_are_the_whole_tower(tmp_path, name, last_n):
    model = model_of(tmp_path, name)
    model.choose_towers(StudentSettings(train="last_n", last_n=last_n))
    bottom = Bottom.of(model)
    assert bottom is not None
    pixels = torch.randint(0, 256, (3, 48, 48, 3), dtype=torch.uint8)
    with torch.no_grad():
        whole = model.encode_image(model.normalised(pixels))
    below = bottom(pixels)
    assert not below.requires_grad
    torch.testing.assert_close(bottom.above(below), whole, atol=1e-5, rtol=1e-4)
    bottom.above(below).sum().backward()  # and nothing that learns lies below
    params = dict(model.model.named_parameters())
    assert all(p.grad is not None for n, p in params.items() if p.requires_grad and n.startswith("visual"))


def test_nothing_to_keep_where_the_stem_learns_or_the_trunk_is_another(tmp_path, tiny_base):
    model = model_of(tmp_path, "mobilenetv2_050")
    model.choose_towers(StudentSettings(train="full"))
    assert Bottom.of(model) is None
    assert Bottom.of(two_tower.load(str(tiny_base))) is None


def test_what_is_kept_is_made_once_and_beyond_the_limit_anew():
    from concurrent.futures import ThreadPoolExecutor

    seen = []

    def then(pixels):
        seen.append(len(pixels))
        return pixels.astype(np.float16) * 2

    with ThreadPoolExecutor(2) as pool:
        # room for two of three
        decoded = Decoded(2 * 4 * 2, pool, then)
        make = lambda j: np.full(4, j, np.uint8)
        first = decoded(["a", "b", "c"], make)
        again = decoded(["a", "b", "c"], make)
    assert seen == [3, 1]
    np.testing.assert_array_equal(first[:, 0], [0, 2, 4])
    np.testing.assert_array_equal(again, first)
