"""Which side of an experiment a picture stands on: a hash decides, never its place in a file."""

import hashlib

from dclip_qdrant.errors import UsageError
from dclip_qdrant.pairs import Pairs

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"validation": "val", "valid": "val", "dev": "val", "training": "train"}  # theirs -> ours


def unit_hash(name: str, salt: str) -> float:
    """A number in 0..1 that follows from the name and the salt."""
    return int.from_bytes(hashlib.sha256(f"{salt}-{name}".encode()).digest()[:8]) / 2**64


def pick_split(pairs: Pairs, wanted: str | None, order: tuple[str, ...] = ("test", "val")) -> str:
    """The split to measure: the one asked for, else the first of `order` that is there, else the only one.

    Raises:
        UsageError: the split asked for has no pictures.
    """
    have = pairs.splits()
    if wanted and wanted not in have:
        counted = ", ".join(f"{name} ({count:,})" for name, count in have.items())
        raise UsageError("`split`", f"no {wanted!r} in {pairs.path}", counted)
    return wanted or next((name for name in order if name in have), next(iter(have)))
