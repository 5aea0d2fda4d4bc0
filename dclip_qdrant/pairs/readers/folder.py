"""Pictures in a folder, with the captions that lie beside them (`a.jpg`, `a.txt`), as img2dataset's `files`
format has them."""

import os
from collections.abc import Iterator

from upath import UPath

from dclip_qdrant.pairs.readers.json_file import loads
from dclip_qdrant.pairs.readers.picture import (
    CAPTION_COLUMNS,
    SourcePicture,
    captions_of,
    find_column,
    printable,
    unusable,
)
from dclip_qdrant.pairs.readers.tar_file import CAPTION_SUFFIXES, is_litter, is_system_folder
from dclip_qdrant.pictures.images import SUFFIXES

SIDECARS = (*CAPTION_SUFFIXES, "json")  # what lies beside a picture and says something of it


def read_folder(path: UPath, root: UPath) -> Iterator[SourcePicture]:
    """Every file with a picture's suffix below the folder, in order of name."""
    for folder, names in _folders(path):
        beside = set(names)
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES) and not is_litter(name):
                yield _picture(path, folder / name, beside)


def has_captions_beside(path: UPath) -> bool:
    """Whether a text file of the same name lies beside any picture below the folder."""
    for _, names in _folders(path):
        beside = set(names)
        stems = (name.rpartition(".")[0] for name in names if name.lower().endswith(SUFFIXES))
        if any(f"{stem}.{suffix}" in beside for stem in stems for suffix in CAPTION_SUFFIXES):
            return True
    return False


def _folders(path: UPath) -> Iterator[tuple[UPath, list[str]]]:
    """Each folder below (and the folder itself) with the names of its files."""
    if "://" not in str(path):
        for folder, folders, files in os.walk(str(path)):
            folders[:] = sorted(name for name in folders if not is_system_folder(name))
            yield UPath(folder), files
        return
    by_folder: dict[str, list[str]] = {}
    for file in sorted(path.rglob("*"), key=str):
        below = str(file.parent).removeprefix(str(path)).split("/")
        if file.is_file() and not any(is_system_folder(name) for name in below):
            by_folder.setdefault(str(file.parent), []).append(file.name)
    for folder, names in by_folder.items():
        yield UPath(folder), names


def _picture(top: UPath, file: UPath, beside: set[str]) -> SourcePicture:
    key = str(file).removeprefix(str(top)).lstrip("/")
    if printable(key) != key:
        return unusable(printable(key), printable(str(file)), "a file name that is not UTF-8")
    stem = file.name.rpartition(".")[0]
    for suffix in SIDECARS:
        name = f"{stem}.{suffix}"
        if name not in beside:
            continue
        sidecar = file.parent / name
        try:
            captions = _captions(sidecar.read_bytes(), suffix)
        except OSError as e:
            return unusable(key, sidecar, f"can't be read: {e.strerror or e}")
        except UnicodeDecodeError:
            return unusable(key, sidecar, "captions that are not UTF-8 text")
        except ValueError as e:
            return unusable(key, sidecar, str(e))
        return SourcePicture(key, str(file), captions)
    return SourcePicture(key, str(file), [])


def _captions(data: bytes, suffix: str) -> list[str]:
    if suffix != "json":
        return [line for line in data.decode("utf-8-sig").split("\n") if line.strip()]
    row = loads(data)
    column = find_column(list(row), CAPTION_COLUMNS) if isinstance(row, dict) else None
    return captions_of(row[column]) if column else []
