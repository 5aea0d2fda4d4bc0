"""What a source is read as: which files of it, in which format, and the splits that their names say."""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

from upath import UPath

from dclip_qdrant.errors import InputError, UsageError
from dclip_qdrant.pairs.readers.csv_file import picture_column, read_csv
from dclip_qdrant.pairs.readers.flickr_token import read_token
from dclip_qdrant.pairs.readers.folder import has_captions_beside, read_folder
from dclip_qdrant.pairs.readers.json_file import read_json, read_json_lines
from dclip_qdrant.pairs.readers.parquet_file import has_pictures, read_parquet
from dclip_qdrant.pairs.readers.picture import SourcePicture
from dclip_qdrant.pairs.readers.tar_file import is_litter, is_system_folder, read_tar
from dclip_qdrant.pairs.splits import SPLIT_NAMES
from dclip_qdrant.tables import storage

Reader = Callable[[UPath, UPath], Iterator[SourcePicture]]
READERS: dict[str, Reader] = {
    "parquet": read_parquet,
    "tar": read_tar,
    "csv": read_csv,
    "jsonl": read_json_lines,
    "token": read_token,
    "json": read_json,
    "folder": read_folder,
}
ARCHIVES = ("parquet", "tar")  # pictures inside, several files a source
KIND_OF_SUFFIX = {
    ".parquet": "parquet",
    ".tar": "tar",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".token": "token",
    ".json": "json",
}
CAPTION_FILES = (
    "captions.jsonl",
    "captions.csv",
    "captions.tsv",
    "captions.txt",
    "captions.token",
    "metadata.jsonl",
    "metadata.csv",
    "results.csv",
    "captions.json",
)
PICTURE_FOLDERS = ("images", "Images", "flickr30k-images", "Flicker8k_Dataset", "Flickr8k_Dataset")
# as Hugging Face, img2dataset and ImageFolder name files and folders
_SPLIT_WORD = re.compile(
    r"(?:^|[-_.=/])(train|training|validation|valid|val|dev|test|testing)(?=$|[-_.=/])", re.I
)
SPLIT_OF_WORD = SPLIT_NAMES | {"testing": "test"}
COMPARED = 8  # shards, when looking whether each counts from the same name


@dataclass(frozen=True)
class Layout:
    """The files of a source, and how they are read.

    `root`: where pictures of captions files are; None: beside each. `splits`: of each file, where names say
    so. `count_alone`: keys are unique in a shard only, so that the shard becomes part of them.
    """

    kind: str
    top: UPath
    files: tuple[UPath, ...]
    root: UPath | None
    splits: dict[str, str]
    count_alone: bool = False

    def pictures(self) -> Iterator[SourcePicture]:
        """Every picture, in order of the files; a key that another file had before gets its file's name."""
        met: set[int] = set()
        for file in self.files:
            own: list[int] = []
            for picture in self.pictures_of(file):
                if len(self.files) > 1 and picture.error is None:
                    if hash(picture.key) in met:
                        picture.key = f"{self._name(file)}/{picture.key}"
                    own.append(hash(picture.key))
                yield picture
            met.update(own)

    def pictures_of(self, file: UPath) -> Iterator[SourcePicture]:
        """The pictures of one of the files."""
        for number, picture in enumerate(READERS[self.kind](file, self.root or _image_root(file))):
            picture.place = f"{file}#{number}"
            picture.split = picture.split or self.splits.get(self._part(file, picture))
            if self.count_alone and picture.error is None:
                picture.key = f"{self._name(file)}/{picture.key}"
            yield picture

    def _part(self, file: UPath, picture: SourcePicture) -> str:
        """What `splits` goes by: the file, or the folder below the source that a picture lies in."""
        if self.kind != "folder":
            return str(file)
        return str(self.top / picture.key.split("/")[0])

    def _name(self, file: UPath) -> str:
        """What tells this file from the others: its path below the source, without the suffix; of a captions
        file its folder."""
        path = str(file).removeprefix(str(self.top)).lstrip("/")
        return path.rpartition(".")[0] if self.kind in ARCHIVES else path.rpartition("/")[0]


def open_source(
    source: str, *, images_root: str | None = None, captions: bool = True, read_as: str | None = None
) -> Layout:
    """A folder is read by what lies in it: a captions file, tar shards, Parquet files, pictures with text
    files beside them, or (with captions=False, as ingestion asks) just pictures. `read_as`: one of READERS
    instead.

    Raises:
        UsageError: nothing there, or nothing that a reader knows.
    """
    path = storage.absolute(source)
    root = storage.absolute(images_root) if images_root else None
    if root is not None and not root.is_dir():
        raise UsageError("`images_root`", f"no folder {images_root}")
    if path.is_dir():
        kind, files = _of_folder(path, captions) if read_as is None else _of_folder_as(path, read_as)
    elif path.exists():
        kind, files = read_as or _kind_of_file(path), [path]
        if kind == "folder":
            raise UsageError("`read_as`", f"folder for the file {source}", "the kind of a file")
    else:
        expected = "a folder, or a CSV, TSV, JSONL, JSON, token, tar or Parquet file"
        raise UsageError(source, "no such file or folder", expected)
    parts = _subfolders(path) if kind == "folder" else files
    layout = Layout(kind, path, tuple(files), root, _splits_by_name(path, parts))
    if len(files) > 1 and _same_first_key(layout):
        return Layout(kind, path, tuple(files), root, layout.splits, count_alone=True)
    return layout


def _of_folder(path: UPath, captions: bool) -> tuple[str, list[UPath]]:
    named = _captions_file(path, any_columns=captions)
    if named is not None:
        return _kind_of_file(named), [named]
    tokens = sorted((*path.glob("*.token"), *path.glob("*.token.txt")), key=str)
    tokens = [f for f in tokens if ".lemma" not in f.name.lower()] or tokens
    if tokens:
        return "token", tokens if len(tokens) == 1 else _refuse_several(tokens)
    archives = _archives(path, below=captions)
    if archives is not None:
        return archives
    below = [file for folder in _subfolders(path) if (file := _captions_file(folder, any_columns=captions))]
    if below:
        kinds = {_kind_of_file(file) for file in below}
        if len(kinds) == 1:
            return kinds.pop(), below
    if not captions:
        return "folder", [path]
    if has_captions_beside(path):
        return "folder", [path]
    loose = [
        file
        for pattern in ("*.jsonl", "*.csv", "*.tsv", "*.json", "*.txt")
        for file in sorted(path.glob(pattern), key=str)
        if not is_litter(file.name)
    ]
    if len(loose) == 1:
        return _kind_of_file(loose[0]), loose
    came = "no captions file, Parquet or tar shards in this folder"
    if loose:
        came = f"{len(loose)} files that could be captions"
    do = "name the captions file itself, and the pictures with `images_root`"
    raise UsageError(path, came, "one of " + ", ".join(CAPTION_FILES), do)


def _of_folder_as(path: UPath, kind: str) -> tuple[str, list[UPath]]:
    """The files of one kind in a folder; of captions files the one with a usual name, or the only one.

    Raises:
        UsageError: none, or several.
    """
    if kind not in READERS:
        raise UsageError("`read_as`", repr(kind), ", ".join(READERS))
    if kind == "folder":
        return kind, [path]
    suffixes = [suffix for suffix, own in KIND_OF_SUFFIX.items() if own == kind]
    for pattern in ("*", "**/*") if kind in ARCHIVES else ("*",):
        files = [file for suffix in suffixes for file in _shards(path, pattern + suffix)]
        usual = [file for file in files if file.name in CAPTION_FILES]
        files = files if kind in ARCHIVES else usual[:1] or files
        if files and (kind in ARCHIVES or len(files) == 1):
            return kind, files
    came = f"{len(files)} files of this kind" if files else f"no file ending in {' or '.join(suffixes)}"
    raise UsageError("`read_as`", f"{kind} for {path}, with {came}", "one", "name the file itself")


def _captions_file(folder: UPath, *, any_columns: bool = True) -> UPath | None:
    """The captions file of a folder; without `any_columns` only one that names pictures: beside photos lie
    tables of other things, too."""
    for name in CAPTION_FILES:
        with suppress(PermissionError):  # a folder that may not be entered: what is left out counts it
            if (folder / name).is_file() and (any_columns or _names_pictures(folder / name)):
                return folder / name
    return None


def _names_pictures(file: UPath) -> bool:
    if _kind_of_file(file) != "csv":
        return True
    with suppress(InputError):
        picture_column(file)
        return True
    return False


def _subfolders(path: UPath) -> list[UPath]:
    return sorted((f for f in path.iterdir() if f.is_dir() and not is_system_folder(f.name)), key=str)


def _archives(path: UPath, *, below: bool) -> tuple[str, list[UPath]] | None:
    """The shards in a folder, or in the folders `below` (Hugging Face's `data/`; not where pictures are
    looked for: a backup somewhere below a photo library would hide it). img2dataset puts a Parquet table of
    addresses beside each tar: the pictures are in the tars."""
    for pattern in ("*", "**/*") if below else ("*",):
        tars = _shards(path, f"{pattern}.tar")
        tables = _shards(path, f"{pattern}.parquet")
        if tables and has_pictures(tables[0]):
            return "parquet", tables
        if tars:
            return "tar", tars
    return None


def _shards(path: UPath, pattern: str) -> list[UPath]:
    return sorted((f for f in path.glob(pattern) if not f.name.startswith(".")), key=str)


def _refuse_several(files: list[UPath]) -> list[UPath]:
    raise UsageError(
        files[0].parent,
        f"{len(files)} .token files",
        "one",
        "name the file itself, and the pictures with `images_root`",
    )


def _kind_of_file(path: UPath) -> str:
    if path.name.lower().endswith(".token.txt"):
        return "token"
    if path.suffix.lower() not in KIND_OF_SUFFIX:
        raise UsageError(path, f"a file ending in {path.suffix!r}", "one of " + ", ".join(KIND_OF_SUFFIX))
    return KIND_OF_SUFFIX[path.suffix.lower()]


def _image_root(file: UPath) -> UPath:
    """Where the pictures of a captions file are: the usual folder beside it, else its own folder."""
    if file.is_dir():
        return file
    for name in PICTURE_FOLDERS:
        if (file.parent / name).is_dir() and not (file.parent / name / name).is_dir():
            return file.parent / name
    return file.parent


def _splits_by_name(top: UPath, files: list[UPath]) -> dict[str, str]:
    """The split that each file's name says (`train-00000-of-00001.parquet`, `test/metadata.jsonl`,
    `split=test/part.parquet`), where the files name different ones: a set that is called `test.parquet` alone
    says nothing of how its owner wants to divide it."""
    splits: dict[str, str] = {}
    for file in files:
        words = _SPLIT_WORD.findall(str(file).removeprefix(str(top)).lstrip("/"))
        if words:
            word = words[-1].lower()
            splits[str(file)] = str(SPLIT_OF_WORD.get(word, word))
    return splits if len(set(splits.values())) > 1 else {}


def _same_first_key(layout: Layout) -> bool:
    """Whether shards begin with the same key: each of them counts for itself then."""
    firsts = []
    for file in layout.files[:COMPARED]:
        firsts += [p.key for p in islice(layout.pictures_of(file), 1) if p.error is None]
    return len(set(firsts)) < len(firsts)
