"""Regions that were found before: a regions stage, or any folder of Parquet parts in the regions contract."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock

import numpy as np
import pyarrow.parquet as pq
from upath import UPath

from dclip_qdrant.errors import UsageError
from dclip_qdrant.pictures.regions import Regions
from dclip_qdrant.tables import storage
from dclip_qdrant.tables.contracts import REGIONS
from dclip_qdrant.tables.stages import part_files, parts

COLUMNS = ["key", "boxes", "scores", "labels"]
PARTS_HELD = 16  # pictures come in the order in which their regions were found: few parts are open at a time


class RegionFiles(Mapping[str, Regions]):
    """Regions by the picture's key, read when they are asked for.

    In memory are 12 bytes a picture (a hash of its key and the number of its part) and the last few parts:
    ten million pictures take 120 MB, not their boxes.
    """

    def __init__(self, folder: UPath) -> None:
        self._files = part_files(folder)
        hashes, numbers = [], []
        for number, table in enumerate(parts(folder, REGIONS, ["key"], check=COLUMNS)):
            hashes.append(np.array([_hash(key) for key in table["key"].to_pylist()], np.uint64))
            numbers.append(np.full(table.num_rows, number, np.uint32))
        order_by = np.concatenate([np.zeros(0, np.uint64), *hashes])
        order = np.argsort(order_by, kind="stable")
        self._hashes = order_by[order]
        self._numbers = np.concatenate([np.zeros(0, np.uint32), *numbers])[order]
        self._held: OrderedDict[int, dict[str, Regions]] = OrderedDict()
        self._lock = Lock()  # pictures are prepared on threads

    def __getitem__(self, key: str) -> Regions:
        wanted = np.uint64(_hash(key))
        first, last = np.searchsorted(self._hashes, wanted), np.searchsorted(self._hashes, wanted, "right")
        for number in self._numbers[first:last][::-1]:  # a part that was written later stands for itself
            regions = self._part(int(number)).get(key)
            if regions is not None:
                return regions
        raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.get(key) is not None

    def __iter__(self) -> Iterator[str]:
        for number in range(len(self._files)):
            yield from self._part(number)

    def __len__(self) -> int:
        return len(self._hashes)

    def _part(self, number: int) -> dict[str, Regions]:
        with self._lock:
            if number not in self._held:
                with storage.open_for_arrow(self._files[number]) as f:
                    rows = pq.read_table(f, columns=COLUMNS).to_pylist()
                self._held[number] = {row["key"]: Regions.of_row(row) for row in rows}
                if len(self._held) > PARTS_HELD:
                    self._held.popitem(last=False)
            self._held.move_to_end(number)
            return self._held[number]


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())


def load_regions(folder: str | Path | UPath) -> RegionFiles:
    """Regions by the picture's key.

    Raises:
        UsageError: no such folder. SchemaError: parts of another contract. InputError: a broken part.
    """
    path = storage.as_path(folder)
    if not path.is_dir():
        raise UsageError("`regions`", f"no folder {folder}", "a regions folder")
    return RegionFiles(path)
