"""Cached vectors once a node, not once a rank: files in the node's temporary folder that all its ranks map.

The first rank of a node that asks builds them under a lock, part by part. The pages that ranks read are
shared, and are given back when memory runs short.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from upath import UPath

from dclip_qdrant.errors import InputError
from dclip_qdrant.tables.stages import digest
from dclip_qdrant.tables.storage import PARTIAL
from dclip_qdrant.training.data import Cache, load_cache

logger = logging.getLogger(__name__)

WAIT_S = 6 * 3600  # for another rank that builds
DONE = "arrays.json"  # written last: which arrays there are


class NodeCaches:
    """The caches that this process mapped; `remove` takes them from the disk once nobody needs them."""

    def __init__(self, root: Path | None = None) -> None:
        self._root = root or Path(tempfile.gettempdir())
        self._mapped: set[Path] = set()

    def load(
        self,
        keys: list[str],
        captions: list[int],
        features: UPath,
        teacher: UPath | None = None,
        *,
        need: tuple[str, ...] = ("regions", "texts"),
    ) -> Cache:
        """What `load_cache` gives, with arrays that are mapped from files.

        Raises:
            InputError: a picture that the cache doesn't have, or a disk that is too full.
        """
        told = [str(features), str(teacher), sorted(need), _hash(keys)]
        folder = self._root / f"dclip-cache-{digest(told)}"
        with self._lock(folder):
            if not (folder / DONE).is_file():
                build(
                    folder,
                    lambda allocate: load_cache(
                        keys, captions, features, teacher, need=need, allocate=allocate
                    ),
                )
            names = json.loads((folder / DONE).read_text())
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
        self._mapped.add(folder)
        return Cache(keys=keys, **arrays)

    def remove(self) -> None:
        """Files that are still mapped elsewhere stay readable there until they are let go."""
        for folder in self._mapped:
            with self._lock(folder):
                shutil.rmtree(folder, ignore_errors=True)
        self._mapped.clear()

    def _lock(self, folder: Path) -> FileLock:
        return FileLock(f"{folder}.lock", timeout=WAIT_S)  # the empty file stays: removing it would undo it


def build(folder: Path, load: Callable[[Any], Cache]) -> None:
    """Fills `folder` with the arrays of a cache, one file each."""
    part = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    part.mkdir(parents=True)

    def allocate(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        file = part / f"{name}.npy"
        array = np.lib.format.open_memmap(file, "w+", dtype=np.dtype(dtype), shape=shape)
        try:
            with file.open("r+b") as f:  # a full disk is an error now, not a signal when a page is written
                os.posix_fallocate(f.fileno(), 0, max(1, file.stat().st_size))
        except OSError as e:
            came = f"{array.nbytes / 2**30:.1f} GiB of cached vectors don't fit ({e.strerror})"
            raise InputError(part.parent, came, do="free space there, or set TMPDIR to a larger disk") from e
        return array

    try:
        cache = load(allocate)
        names = []
        for field in fields(Cache):
            value = getattr(cache, field.name)
            if isinstance(value, np.ndarray):
                if isinstance(value, np.memmap):
                    value.flush()
                else:
                    np.save(part / f"{field.name}.npy", value)
                names.append(field.name)
        (part / DONE).write_text(json.dumps(names))
        part.replace(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _hash(keys: list[str]) -> str:
    """sha256 of the keys, one after another: there may be millions."""
    mark = hashlib.sha256()
    for key in keys:
        mark.update(key.encode() + b"\0")
    return mark.hexdigest()
