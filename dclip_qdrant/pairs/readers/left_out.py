"""What of a source's folder no reader took: counted by kind, so that nothing is left out in silence."""

import os
from collections import Counter
from collections.abc import Iterator

from dclip_qdrant.pairs.readers.layout import Layout
from dclip_qdrant.pairs.readers.picture import SourcePicture, printable
from dclip_qdrant.pairs.readers.tar_file import CAPTION_SUFFIXES, is_litter, is_system_folder
from dclip_qdrant.pictures.images import SUFFIXES
from dclip_qdrant.tables import storage

OURS = ("manifest.json", "rejects.jsonl")  # what stands beside the Parquet files of pairs
NAMED = 3  # linked folders, by name
SIDECARS = (*CAPTION_SUFFIXES, "json")


class Account:
    """The pictures of a source on their way through, and afterwards what was left out.

    Only folders of this machine are looked through again: a bucket's listing may take longer than reading it.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._read: set[int] = set()  # hashes of addresses: a few bytes a picture

    def pictures(self) -> Iterator[SourcePicture]:
        for picture in self._layout.pictures():
            self._read.add(hash(picture.uri))
            yield picture

    def left_out(self) -> dict[str, int]:
        """How many files of each kind (a suffix, or what they are) were not read, the most frequent first;
        captions beside pictures count as read."""
        top = self._layout.top
        if storage.is_uri(top) or not top.is_dir():
            return {}
        files = {str(file) for file in self._layout.files}
        counts: Counter[str] = Counter()
        links: list[str] = []
        unreadable = lambda error: counts.update(["folders that can't be read"])
        for folder, folders, names in os.walk(str(top), onerror=unreadable):
            below = [os.path.join(folder, name) for name in folders]
            links += [os.path.relpath(path, str(top)) for path in below if os.path.islink(path)]
            counts.update(["hidden or system folders"] * sum(is_system_folder(name) for name in folders))
            folders[:] = [name for name in folders if not is_system_folder(name)]
            stems = {name.rpartition(".")[0] for name in names if name.lower().endswith(SUFFIXES)}
            for name in names:
                path = os.path.join(folder, name)
                if is_litter(name) or name in OURS or path in files or hash(printable(path)) in self._read:
                    continue
                stem, _, suffix = name.rpartition(".")
                if not (suffix in SIDECARS and stem in stems):
                    counts[f".{suffix.lower()}" if stem else "without a suffix"] += 1
        if links:
            named = ", ".join(sorted(links)[:NAMED]) + (", ..." if len(links) > NAMED else "")
            counts[f"linked folders, not entered ({named})"] = len(links)
        return dict(counts.most_common())


def left_out_line(kind: str, counts: dict[str, int]) -> str:
    """For people: what the source was read as, and what of it was left out."""
    return f"read as {kind}; left out: " + ", ".join(f"{count:,} {what}" for what, count in counts.items())
