"""Pairs of pictures alone."""

import pytest
from PIL import Image

from dclip_qdrant.errors import UsageError
from dclip_qdrant.jobs.request import Request, check_pictures
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.pairs.build import build
from dclip_qdrant.recipe import Recipe


def pictures(folder, count=6):
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (20, 16), (i * 30, 5, 5)).save(folder / f"{i}.png")
    return str(folder)


def test_a_folder_of_pictures_is_all_train_without_a_caption(tmp_path):
    manifest = build(pictures(tmp_path / "p"), str(tmp_path / "out"), captions=False)
    assert (manifest["splits"], manifest["captions"], manifest["rejects"]) == ({"train": 6}, 0, 0)
    rows = Pairs.open(tmp_path / "out").table(["key", "captions", "split"]).to_pylist()
    assert [row["captions"] for row in rows] == [[]] * 6


def test_a_picture_that_can_not_be_read_is_still_a_reject(tmp_path):
    folder = pictures(tmp_path / "p")
    (tmp_path / "p" / "broken.jpg").write_bytes(b"no picture")
    manifest = build(folder, str(tmp_path / "out"), captions=False)
    assert manifest["rejects"] == 1


def test_pictures_and_recipes_that_do_not_belong_together_are_said(tmp_path, pairs_folder):
    build(pictures(tmp_path / "p"), str(tmp_path / "more"), captions=False)
    more, pairs = str(tmp_path / "more"), str(pairs_folder)
    sft, learns = Recipe.load("sft"), Recipe.load("pictures")

    def check(recipe, pairs, pictures):
        check_pictures(Request(pairs, "base", "out", recipe, pictures=pictures), (recipe,))

    check(learns, pairs, more)
    check(sft, pairs, None)
    for wrong, says in (
        ((sft, pairs, more), "'sft' learns nothing from them"),
        ((learns, pairs, None), "none, but 'pictures' learns from them"),
        ((sft, more, None), "pictures without captions"),
    ):
        with pytest.raises(UsageError, match=says):
            check(*wrong)
