"""What of a source's folder no reader took: counted by kind, so that nothing is left out in silence."""

import os
from collections import Counter
from collections.abc import Iterator

from dclip_qdrant.pairs.readers.folder import SIDECARS
from dclip_qdrant.pairs.readers.layout import ARCHIVES, Layout
from dclip_qdrant.pairs.readers.picture import SourcePicture
from dclip_qdrant.pairs.readers.tar_file import is_litter, is_system_folder
from dclip_qdrant.pictures.images import SUFFIXES
from dclip_qdrant.tables import storage

OURS = ("manifest.json", "rejects.jsonl")  # what stands beside the Parquet files of pairs
NAMED = 3  # folders, by name


class Account:
    """The pictures of a source on their way through, and afterwards what was left out.

    Only folders of this machine are looked through again: a bucket's listing may take longer than reading it.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        # hashes of the addresses that captions files name; a folder's own reader takes every picture, and
        # what is in archives lies nowhere else
        self._named: set[int] = set()

    def pictures(self) -> Iterator[SourcePicture]:
        by_name = self._layout.kind not in ("folder", *ARCHIVES)
        for picture in self._layout.pictures():
            if by_name:
                self._named.add(hash(picture.uri))
            yield picture

    def _is_read(self, path: str, name: str) -> bool:
        if self._layout.kind == "folder":
            return name.lower().endswith(SUFFIXES)
        return hash(path) in self._named

    def left_out(self) -> dict[str, int]:
        """How many files of each kind (a suffix, or what they are) were not read, the most frequent first;
        captions beside pictures count as read."""
        top = self._layout.top
        if storage.is_uri(top) or not top.is_dir():
            return {}
        files = {str(file) for file in self._layout.files}
        counts: Counter[str] = Counter()
        links: list[str] = []
        closed: list[str] = []
        unreadable = lambda error: closed.append(os.path.relpath(error.filename, str(top)))
        for folder, folders, names in os.walk(str(top), onerror=unreadable):
            below = [os.path.join(folder, name) for name in folders]
            links += [os.path.relpath(path, str(top)) for path in below if os.path.islink(path)]
            counts.update(["hidden or system folders"] * sum(is_system_folder(name) for name in folders))
            folders[:] = [name for name in folders if not is_system_folder(name)]
            stems = {name.rpartition(".")[0] for name in names if name.lower().endswith(SUFFIXES)}
            for name in names:
                path = os.path.join(folder, name)
                if is_litter(name) or name in OURS or path in files or self._is_read(path, name):
                    continue
                stem, _, suffix = name.rpartition(".")
                if not (suffix in SIDECARS and stem in stems):
                    counts[f".{suffix.lower()}" if stem else "without a suffix"] += 1
        for what, folders in (
            ("linked folders, not entered", links),
            ("folders that can't be read", closed),
        ):
            if folders:
                named = ", ".join(sorted(folders)[:NAMED]) + (", ..." if len(folders) > NAMED else "")
                counts[f"{what} ({named})"] = len(folders)
        return dict(counts.most_common())


def left_out_line(kind: str, counts: dict[str, int]) -> str:
    """For people: what the source was read as, and what of it was left out."""
    return f"read as {kind}; left out: " + ", ".join(f"{count:,} {what}" for what, count in counts.items())
