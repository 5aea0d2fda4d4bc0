"""A webdataset shard: members of one basename are one sample; captions in .txt (a line each) or .json."""

import lzma
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, NoReturn

from upath import UPath

from dclip_qdrant.pairs.readers.json_file import loads
from dclip_qdrant.pairs.readers.picture import (
    CAPTION_COLUMNS,
    SourcePicture,
    captions_of,
    find_column,
    plain,
    split_of,
    unusable,
)
from dclip_qdrant.pictures.images import SUFFIXES

SYSTEM_FOLDERS = {
    "@eaDir",
    "#recycle",
    "@Recycle",
    "$RECYCLE.BIN",
    "__MACOSX",
    "lost+found",
    "System Volume Information",
}
CAPTION_SUFFIXES = ("txt", "caption", "text")
BROKEN = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError)

Members = dict[str, bytes]  # of one sample: by their names behind the sample's own


class _Member(tarfile.TarInfo):
    """tarfile takes a header that was cut for the end of the archive, and says nothing."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "tarfile.TarInfo":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # pyright: ignore[reportAttributeAccessIssue]  (an empty block: the end)
            raise
        except tarfile.HeaderError as e:
            _cut(e)


def _cut(e: Exception) -> NoReturn:
    raise tarfile.ReadError(f"cut short, or damaged ({e})") from None


def read_tar(path: UPath, root: UPath) -> Iterator[SourcePicture]:
    """What a shard holds; where it breaks off, what stood before that, and the shard itself as unusable."""
    sample: Members = {}
    current = ""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=_Member) as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if not member.isfile() or is_litter(name):
                    continue
                stem, suffix = _stem(name)
                if stem != current and sample:
                    yield from _pictures(path, current, sample)
                    sample = {}
                current = stem
                extracted = tar.extractfile(member)
                sample[suffix] = extracted.read() if extracted else b""
    except BROKEN as e:
        if sample:  # its members that are here are whole
            yield from _pictures(path, current, sample)
        behind = f"; {current!r} is the last that was read" if sample else ""
        yield unusable(path.name, path, f"a tar that can't be read to its end: {e}{behind}")
        return
    if sample:
        yield from _pictures(path, current, sample)


def is_litter(name: str) -> bool:
    """What Macs put beside files: `._name` (AppleDouble), `__MACOSX`, `.DS_Store`."""
    parts = name.split("/")
    return parts[-1].startswith("._") or parts[-1] == ".DS_Store" or "__MACOSX" in parts


def is_system_folder(name: str) -> bool:
    """Thumbnails, bins and the like, which Macs, Windows and NAS systems keep beside pictures; hidden
    folders."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def _stem(name: str) -> tuple[str, str]:
    """webdataset's rule: a sample's name ends at the first dot of the basename."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", suffix


def _pictures(path: UPath, stem: str, sample: Members) -> Iterator[SourcePicture]:
    """The pictures of a sample: one as a rule, several where names have dots (`a.v1.jpg`, `a.v2.jpg`), each
    with the captions under its own name."""
    names = [suffix for suffix in sample if "." + suffix.rpartition(".")[2].lower() in SUFFIXES]
    if not names:
        where = f"{path}#{stem}"
        yield unusable(stem, where, f"no picture among {', '.join(sorted(sample))}", "members side by side")
        return
    for suffix in names:
        inner = suffix.rpartition(".")[0]
        own = {
            s.rpartition(".")[2].lower(): data
            for s, data in sample.items()
            if s.rpartition(".")[0] == inner and s != suffix
        }
        yield _picture(path, f"{stem}.{inner}" if inner else stem, sample[suffix], own)


def _picture(path: UPath, key: str, image: bytes, beside: Members) -> SourcePicture:
    where = f"{path}#{key}"
    try:
        row = _object(beside["json"]) if "json" in beside else {}
        captions = _captions(row, beside)
        taken = (find_column(list(row), CAPTION_COLUMNS), find_column(list(row), ("split",)))
        extra = {k: plain(v) for k, v in row.items() if k not in taken}
    except UnicodeDecodeError:
        return unusable(key, where, "captions that are not UTF-8 text")
    except ValueError as e:
        return unusable(key, where, str(e))
    split = split_of(row[taken[1]]) if taken[1] else None
    return SourcePicture(key, where, captions, image=image, split=split, extra=extra)


def _captions(row: dict[str, Any], beside: Members) -> list[str]:
    for suffix in CAPTION_SUFFIXES:
        if suffix in beside:
            return [line for line in beside[suffix].decode("utf-8-sig").split("\n") if line.strip()]
    column = find_column(list(row), CAPTION_COLUMNS)
    return captions_of(row[column]) if column else []


def _object(data: bytes) -> dict[str, Any]:
    value = loads(data)
    if not isinstance(value, dict):
        raise ValueError(f"a .json that is no object: {str(value)[:40]!r}")
    return value
