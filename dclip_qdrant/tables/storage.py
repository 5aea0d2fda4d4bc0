"""Paths and files: one path type for local folders and URIs (fsspec), and one way to write: whole or not at
all.

A file is written under another name and then renamed, so that a crash leaves either the old file or the new
one. A folder is filled beside its place and moved there when it is complete. A folder that holds something
else is never removed.
"""

import fnmatch
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
from upath import UPath

from dclip_qdrant.errors import UsageError

PARTIAL = ".partial"


@dataclass(frozen=True)
class FolderKind:
    """A folder that we write as a whole, and how one of ours is told from a folder of the user's.

    `marker`: a JSON file that is written last and has the key `says`. `files`: patterns of everything that we
    put there; with anything else in it a folder is never replaced.
    """

    name: str  # for people: "pairs"
    marker: str
    says: str
    files: tuple[str, ...]


PAIRS_FOLDER = FolderKind("pairs", "manifest.json", "contract", ("pairs-*.parquet", "rejects.jsonl"))


def as_path(path: "str | Path | UPath") -> UPath:
    """A path or URI as the one type that the product works with; `file://` becomes a plain local path."""
    text = str(path)
    return UPath(text.removeprefix("file://")) if text.startswith("file://") else UPath(text)


def absolute(path: "str | Path | UPath") -> UPath:
    """The path as it holds from any current folder; a URI stays as it is."""
    plain = as_path(path)
    return plain if is_uri(plain) else plain.absolute()


def is_uri(path: "str | Path | UPath") -> bool:
    """Whether the path leads somewhere else than this machine's file system."""
    return "://" in str(path) and not str(path).startswith("file://")


def local_path(path: "str | Path | UPath", kind: str) -> Path:
    """The path, for what only a local file system can hold.

    Raises:
        UsageError: a URI; `kind` names the thing.
    """
    if is_uri(path):
        raise UsageError(
            kind, str(path), "a local path", "a bucket can't hold this: take a disk that you mount"
        )
    return Path(str(path).removeprefix("file://"))


def open_for_arrow(path: "Path | UPath") -> Any:
    """A binary file for pyarrow to read, to be used with `with`.

    A local one is Arrow's own: reading through a Python file, Arrow's threads may come for the interpreter
    when that is ending, and a process that did everything right ends with an abort (apache/arrow#34314; 3 of
    100 runs of `dclip-qdrant pairs` on a busy machine).
    """
    return pa.OSFile(str(path)) if isinstance(path, Path) else path.open("rb")


def write_bytes(path: "str | Path | UPath", data: bytes) -> UPath:
    """Writes a file whole or not at all; makes its folder where there is none."""
    with writing(path) as file:
        file.write(data)
    return as_path(path)


def write_text(path: "str | Path | UPath", text: str) -> UPath:
    return write_bytes(path, text.encode())


def write_json(path: "str | Path | UPath", value: Any) -> UPath:
    return write_text(path, json.dumps(value, indent=1) + "\n")


def write_json_lines(path: "str | Path | UPath", rows: "list[dict[str, Any]]") -> UPath:
    return write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def writing(path: "str | Path | UPath") -> Iterator[BinaryIO]:
    """A binary file to write to, which takes its place when the block ends without an error."""
    target = as_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_uri(target):
        # closing a remote file is what uploads it, also when an error closes it
        with tempfile.TemporaryFile() as local:
            yield cast(BinaryIO, local)
            local.seek(0)
            with target.open("wb") as file:
                shutil.copyfileobj(local, file)
        return
    part = target.with_name(target.name + PARTIAL)
    try:
        with part.open("wb") as file:
            yield file
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    part.replace(target)


def is_empty(folder: UPath) -> bool:
    """Whether there is no such folder, or nothing in it."""
    return not folder.exists() or (folder.is_dir() and next(iter(folder.iterdir()), None) is None)


def check_free(folder: "str | Path | UPath", kind: FolderKind, *, overwrite: bool) -> None:
    """Makes sure that `new_folder` may write here, before minutes of work.

    Raises:
        UsageError: something else lies there, or a folder of this kind that isn't to be overwritten, or one
            with other files in it.
    """
    target = as_path(folder)
    if is_empty(target):
        return
    if not target.is_dir():
        raise UsageError(folder, "a file", "an empty or new folder")
    if not _is_ours(target, kind):
        came = f"something else than {kind.name} lies here"
        raise UsageError(folder, came, "an empty or new folder", "another folder")
    if not overwrite:
        raise UsageError(folder, f"there are {kind.name} here already", do="`overwrite`, or another folder")
    ours = (kind.marker, *kind.files)
    for file in sorted(target.iterdir(), key=str):
        if file.is_dir() or not any(fnmatch.fnmatch(file.name, pattern) for pattern in ours):
            came = f"{file.name!r} lies among the {kind.name}, and replacing them would remove it"
            raise UsageError(folder, came, "nothing but our own files", "move it away, or another folder")


def _is_ours(folder: UPath, kind: FolderKind) -> bool:
    """Whether the marker is there and says what ours says: others have a manifest.json too."""
    marker = folder / kind.marker
    if not marker.is_file():
        return False
    try:
        facts = json.loads(marker.read_text())
    except ValueError:
        return False
    return isinstance(facts, dict) and kind.says in facts


@contextmanager
def new_folder(folder: "str | Path | UPath", kind: FolderKind, *, overwrite: bool) -> Iterator[UPath]:
    """An empty folder to fill, which takes its place when the block ends without an error.

    Only a folder of our own and of the same kind is ever replaced, and only with `overwrite`.

    Raises:
        UsageError: as in `check_free`.
    """
    target = as_path(folder)
    check_free(target, kind, overwrite=overwrite)
    part = target.parent / f".{target.name}{PARTIAL}"
    remove(part)
    part.mkdir(parents=True)
    try:
        yield part
        check_free(target, kind, overwrite=overwrite)
        remove(target)
        move(part, target)
    except BaseException:
        remove(part)
        raise


def move(source: UPath, target: UPath) -> None:
    """Moves a folder; on an object store file by file, the manifest last."""
    if not is_uri(source):
        source.rename(target)
        return
    files = [f for f in source.rglob("*") if f.is_file()]
    for file in sorted(files, key=lambda f: f.name == "manifest.json"):
        place = target / str(file).removeprefix(str(source)).lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
    remove(source)


def copy_folder(source: "str | Path | UPath", target: "str | Path | UPath") -> None:
    """Copies the files of a folder, the manifest last."""
    source, target = as_path(source), as_path(target)
    target.mkdir(parents=True, exist_ok=True)
    files = [f for f in source.iterdir() if f.is_file()]
    for file in sorted(files, key=lambda f: f.name == "manifest.json"):
        write_bytes(target / file.name, file.read_bytes())


def remove(folder: UPath) -> None:
    """Removes a folder of our own and everything in it; nothing where there is none."""
    if not is_uri(folder):
        shutil.rmtree(str(folder), ignore_errors=True)
        return
    if folder.exists():
        folder.fs.rm(folder.path, recursive=True)
