"""Flickr's .token files: `name.jpg#0<tab>caption`, with the lists of train, dev and test names that Flickr8k
has beside its."""

from collections.abc import Iterator

from upath import UPath

from dclip_qdrant.pairs.readers.lines import text_lines
from dclip_qdrant.pairs.readers.picture import SourcePicture, unusable
from dclip_qdrant.pairs.readers.rows import Row, pictures_of

LISTS = {"trainimages.txt": "train", "devimages.txt": "val", "testimages.txt": "test"}


def read_token(path: UPath, root: UPath) -> Iterator[SourcePicture]:
    split_of = _published_splits(path.parent)
    yield from pictures_of(lambda: _rows(path, split_of), root)


def _rows(path: UPath, split_of: dict[str, str]) -> Iterator[Row]:
    for number, line in text_lines(path):
        where = f"{path}:{number}"
        if line is None:
            yield Row(where, error=unusable(where, where, "not UTF-8 text"))
        elif line.strip():
            name, tab, caption = line.partition("\t")
            if not tab or "#" not in name:
                yield Row(where, error=unusable(where, where, repr(line[:60]), "name.jpg#0<tab>caption"))
                continue
            name = name.rsplit("#", 1)[0]
            # what none of the lists names was left over by their makers: never a test picture
            split = split_of.get(name, "train") if split_of else None
            yield Row(where, name, None, [caption], split)


def _published_splits(folder: UPath) -> dict[str, str]:
    """The split of each picture by the lists beside the captions; nothing where there are none."""
    splits: dict[str, str] = {}
    for file in sorted(folder.glob("*.txt"), key=str):
        split = next((s for end, s in LISTS.items() if file.name.lower().endswith(end)), None)
        if split is not None:
            splits.update((line.strip(), split) for _, line in text_lines(file) if line and line.strip())
    return splits
