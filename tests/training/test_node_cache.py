"""Cached vectors in memory and once a node: the same arrays, read from the same parts."""

import errno
import multiprocessing as mp
import os

import numpy as np
import pytest
from upath import UPath

from dclip_qdrant.errors import InputError
from dclip_qdrant.tables.contracts import FEATURES, TEACHER_CACHE
from dclip_qdrant.tables.stages import write_part
from dclip_qdrant.training import node_cache
from dclip_qdrant.training.data import load_cache
from dclip_qdrant.training.node_cache import NodeCaches

N, D, W, F = 9, 4, 3, 2
CAPTIONS = [1 + i % 3 for i in range(N)]
KEYS = [f"p{i}" for i in range(N)]
NEED = ("texts", "text_trunk", "regions", "region_boxes", "region_trunk")


def vector(width, *seed):
    return np.random.default_rng([7, *seed]).normal(size=width).astype(np.float16).astype(np.float32)


def regions_of(i):
    return i % 4  # some have none


def rows_of(i):
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
            "split": "train",
            "image": vector(D, i, 5, view),
            "trunk": vector(F, i, 6, view),
            **(plain if view == 0 else nothing),
        }
        for view in range(2)
    ]


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    features, teacher = (UPath(tmp_path_factory.mktemp(name)) for name in ("features", "teacher"))
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


def test_both_readers_give_what_the_parts_hold(stages, tmp_path):
    check(load_cache(KEYS, CAPTIONS, *stages, need=NEED))
    caches = NodeCaches(tmp_path)
    mapped = caches.load(KEYS, CAPTIONS, *stages, need=NEED)
    check(mapped)
    assert isinstance(mapped.image, np.memmap)
    caches.remove()
    check(mapped)  # still readable where it is mapped
    assert [f.suffix for f in tmp_path.iterdir()] == [".lock"]


def _open(root, stages, count):
    def counted(*args, **kwargs):
        with count.get_lock():
            count.value += 1
        return load_cache(*args, **kwargs)

    node_cache.load_cache = counted
    check(NodeCaches(root).load(KEYS, CAPTIONS, *stages, need=NEED))


def test_ranks_of_a_node_build_it_once(stages, tmp_path):
    context = mp.get_context("fork")
    count = context.Value("i", 0)
    ranks = [context.Process(target=_open, args=(tmp_path, stages, count)) for _ in range(3)]
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(120)
        assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    assert count.value == 1


def test_a_build_that_was_killed_is_done_anew(stages, tmp_path, monkeypatch):
    caches = NodeCaches(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(node_cache, "fields", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            caches.load(KEYS, CAPTIONS, *stages, need=NEED)
    check(caches.load(KEYS, CAPTIONS, *stages, need=NEED))


def test_a_full_disk_is_one_line(stages, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(node_cache.os, "posix_fallocate", full)
    with pytest.raises(InputError, match="cached vectors don't fit .*No space left.*TMPDIR"):
        NodeCaches(tmp_path).load(KEYS, CAPTIONS, *stages, need=NEED)
    assert [f.suffix for f in tmp_path.iterdir()] == [".lock"]


def test_other_pictures_are_another_cache(stages, tmp_path):
    caches = NodeCaches(tmp_path)
    caches.load(KEYS, CAPTIONS, *stages, need=NEED)
    few = caches.load(KEYS[:2], CAPTIONS[:2], *stages, need=NEED)
    assert few.image.shape[0] == 2
    with pytest.raises(InputError, match="no features of 'other'"):
        caches.load(["other"], [1], *stages, need=NEED)
