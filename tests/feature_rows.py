"""Rows of the features stage and of the teacher cache, with values that follow from the picture, and a check
of a `Cache` made of them."""

import numpy as np
import pytest

from dclip_qdrant.tables.contracts import FEATURES, TEACHER_CACHE
from dclip_qdrant.tables.stages import write_part

N, D, W, F = 9, 4, 3, 2  # pictures; widths of the teacher, the text trunk and the image trunk
CAPTIONS = [1 + i % 3 for i in range(N)]
KEYS = [f"p{i}" for i in range(N)]
NEED = ("texts", "text_trunk", "regions", "region_boxes", "region_trunk")


def vector(width, *seed):
    return np.random.default_rng([7, *seed]).normal(size=width).astype(np.float16).astype(np.float32)


def regions_of(i):
    return i % 4  # some have none


def rows_of(i, split="train"):
    count = regions_of(i)
    plain = {
        "captions": [f"{i} {c}" for c in range(CAPTIONS[i])],
        "regions": [vector(D, i, 1, r) for r in range(count)],
        "region_boxes": [[0.0, 0.0, 0.5, r / 10] for r in range(count)],
        "region_trunk": [vector(F, i, 2, r) for r in range(count)],
        "texts": [vector(D, i, 3, c) for c in range(CAPTIONS[i])],
        "text_trunk": [vector(W, i, 4, c) for c in range(CAPTIONS[i])],
    }
    nothing = {name: [] for name in plain}
    return [
        {
            "key": KEYS[i],
            "view": view,
            "crop": [0.0, 0.0, 1.0, 1.0 - view / 10],
            "flip": bool(view),
            "split": split,
            "uri": f"pictures/{i}.png",
            "picture": None,
            "image": vector(D, i, 5, view),
            "trunk": vector(F, i, 6, view),
            **(plain if view == 0 else nothing),
        }
        for view in range(2)
    ]


def write_stages(features, teacher):
    for start in (6, 0, 3):  # not in the order of the pairs
        pictures = range(start, start + 3)
        write_part(features, FEATURES, [row for i in pictures for row in rows_of(i)])
        names = ("key", "view", "crop", "flip", "trunk")
        taught = [
            {n: row[n] for n in names} | {"teacher_image": [vector(D, i, 8, c) for c in range(CAPTIONS[i])]}
            for i in pictures
            for row in rows_of(i)
        ]
        write_part(teacher, TEACHER_CACHE, taught)
    return features, teacher


def check(cache):
    first = 0
    for i in range(N):
        np.testing.assert_array_equal(cache.image[i, 1], vector(D, i, 5, 1))
        np.testing.assert_array_equal(cache.trunk[i, 0], vector(F, i, 6, 0))
        assert cache.crop[i, 1].tolist() == pytest.approx([0, 0, 1, 0.9])
        assert cache.flip[i].tolist() == [False, True]
        count = regions_of(i)
        assert cache.region_mask[i].tolist() == [r < count for r in range(3)]
        for r in range(3):
            there = r < count
            np.testing.assert_array_equal(cache.regions[i, r], vector(D, i, 1, r) if there else np.zeros(D))
            np.testing.assert_array_equal(
                cache.region_trunk[i, r], vector(F, i, 2, r) if there else np.zeros(F)
            )
        for c in range(CAPTIONS[i]):
            np.testing.assert_array_equal(cache.texts[first + c], vector(D, i, 3, c))
            np.testing.assert_array_equal(cache.text_trunk[first + c], vector(W, i, 4, c))
            np.testing.assert_array_equal(cache.teacher[i, 0, c], vector(D, i, 8, c))
        assert not cache.teacher[i, 0, CAPTIONS[i] :].any()
        first += CAPTIONS[i]
        assert cache.first[i + 1] == first
