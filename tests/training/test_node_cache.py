"""Cached vectors in memory and once a node: the same arrays, read from the same parts."""

import errno
import multiprocessing as mp
import os

import numpy as np
import pytest
from feature_rows import CAPTIONS, KEYS, NEED, check, write_stages
from upath import UPath

from dclip_qdrant.errors import InputError
from dclip_qdrant.training import node_cache
from dclip_qdrant.training.data import load_cache
from dclip_qdrant.training.node_cache import NodeCaches


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    return write_stages(*(UPath(tmp_path_factory.mktemp(name)) for name in ("features", "teacher")))


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
