"""What people have, as a stream of `SourcePicture`: one reader a format, each a generator. Nothing is decoded
or judged here."""

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from dclip_qdrant.errors import InputError, UsageError
from dclip_qdrant.pictures.images import SUFFIXES
from dclip_qdrant.tables import storage

KEY_COLUMNS = ("key", "image_id", "id")
IMAGE_COLUMNS = (
    "image",
    "file_name",
    "filename",
    "image_name",
    "image_path",
    "filepath",
    "path",
    "file",
    "uri",
    "jpg",
    "bytes",
)
CAPTION_COLUMNS = ("captions", "caption", "text", "sentences", "sentence", "comment", "title", "description")
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


@dataclass
class SourcePicture:
    """One picture as its source tells it. `image` holds its bytes, or `uri` says where they are."""

    key: str
    uri: str
    captions: list[str]
    image: bytes | None = None
    split: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    place: str = ""  # where in its source it stands: file and number, the same at every reading


def read_any(
    source: str, *, images_root: str | None = None, captions: bool = True
) -> tuple[str, Iterator[SourcePicture]]:
    """The name of the format and its pictures.

    A folder is read by what lies in it: a captions file, Parquet files, tar shards, or (with captions=False,
    as ingestion asks) just pictures.

    Raises:
        UsageError: nothing there, or nothing that a reader knows.
    """
    path = storage.as_path(source)
    if path.is_dir():
        kind, files = _kind_of_folder(path, captions)
    elif path.exists():
        kind, files = _kind_of_file(path), [path]
    else:
        expected = "a folder, or a CSV, TSV, JSONL, JSON, token, tar or Parquet file"
        raise UsageError(source, "no such file or folder", expected)
    root = storage.as_path(images_root) if images_root else None
    if root is not None and not root.is_dir():
        raise UsageError("`images_root`", f"no folder {images_root}")
    return kind, _read(READERS[kind], files, root)


def _read(reader: "Reader", files: list[UPath], root: UPath | None) -> Iterator[SourcePicture]:
    for file in files:
        for number, picture in enumerate(reader(file, root or _image_root(file))):
            picture.place = f"{file}#{number}"
            yield picture


def _kind_of_folder(path: UPath, captions: bool) -> tuple[str, list[UPath]]:
    for name in CAPTION_FILES:
        if (path / name).is_file():
            return _kind_of_file(path / name), [path / name]
    tokens = sorted(path.glob("*.token"))
    if tokens:
        return "token", tokens[:1] if len(tokens) == 1 else _refuse_several(tokens)
    for kind, suffix in (("parquet", "*.parquet"), ("tar", "*.tar")):
        files = sorted(path.glob(suffix))
        if files:
            return kind, files
    if captions:
        loose = [
            f
            for pattern in ("*.jsonl", "*.csv", "*.tsv", "*.json", "*.txt")
            for f in sorted(path.glob(pattern))
        ]
        if len(loose) == 1:
            return _kind_of_file(loose[0]), loose
        raise UsageError(
            path,
            f"{len(loose)} files that could be captions"
            if loose
            else "no captions file, Parquet or tar shards in this folder",
            "one of " + ", ".join(CAPTION_FILES),
            "name the captions file itself, and the pictures with `images_root`",
        )
    return "folder", [path]


def _refuse_several(files: list[UPath]) -> list[UPath]:
    raise UsageError(
        files[0].parent,
        f"{len(files)} .token files",
        "one",
        "name the file itself, and the pictures with `images_root`",
    )


def _kind_of_file(path: UPath) -> str:
    kinds = {
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
    if path.suffix.lower() not in kinds:
        raise UsageError(path, f"a file ending in {path.suffix!r}", "one of " + ", ".join(kinds))
    return kinds[path.suffix.lower()]


def _image_root(file: UPath) -> UPath:
    """Where the pictures of a captions file are: the usual folder beside it, else its own folder."""
    if file.is_dir():
        return file
    for name in ("images", "Images", "flickr30k-images", "Flicker8k_Dataset"):
        if (file.parent / name).is_dir() and not (file.parent / name / name).is_dir():
            return file.parent / name
    return file.parent


def _locate(root: UPath, name: str) -> str:
    """`name` under the picture root, or beside it when the name already says the folder."""
    if "://" in name or name.startswith("/"):
        return name
    here = root / name
    return str(here if here.exists() or not (root.parent / name).exists() else root.parent / name)


def _pick(columns: list[str], among: tuple[str, ...], where: object, meaning: str) -> str:
    clean = {c.strip().lower(): c for c in columns}
    for name in among:
        if name in clean:
            return clean[name]
    raise InputError(
        where,
        f"columns {', '.join(columns) or 'none'}",
        f"a column for the {meaning}: one of {', '.join(among)}",
    )


def _text(path: UPath) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(path, f"not UTF-8 text (byte {e.start})") from e


def _group(rows: Iterator[tuple[str, str, str | None]], root: UPath) -> Iterator[SourcePicture]:
    """(file name, caption, split) rows, one a caption -> one picture each, in order of first sight."""
    picture_of: dict[str, SourcePicture] = {}
    for name, caption, split in rows:
        if name not in picture_of:
            picture_of[name] = SourcePicture(name, _locate(root, name), [], split=split)
        picture_of[name].captions.append(caption)
    yield from picture_of.values()


def _csv(path: UPath, root: UPath) -> Iterator[SourcePicture]:
    """CSV, TSV, Flickr's captions.txt (comma) and results.csv (bar); one row a caption or one row a
    picture."""
    text = _text(path)
    head = text.split("\n", 1)[0]
    delimiter = max(",\t|;", key=head.count)
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
    columns = list(reader.fieldnames or [])
    image = _pick(columns, IMAGE_COLUMNS, path, "picture")
    caption = _pick(columns, CAPTION_COLUMNS, path, "captions")
    split = next((c for c in columns if c.strip().lower() == "split"), None)
    yield from _group(
        ((row[image] or "", row[caption] or "", row[split] if split else None) for row in reader), root
    )


def _token(path: UPath, root: UPath) -> Iterator[SourcePicture]:
    def rows() -> Iterator[tuple[str, str, None]]:
        for number, line in enumerate(_text(path).splitlines(), 1):
            if line.strip():
                name, tab, caption = line.partition("\t")
                if not tab or "#" not in name:
                    raise InputError(f"{path}:{number}", repr(line[:60]), "name.jpg#0<tab>caption")
                yield name.rsplit("#", 1)[0], caption, None

    yield from _group(rows(), root)


def _jsonl(path: UPath, root: UPath) -> Iterator[SourcePicture]:
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise InputError(f"{path}:{number}", f"not JSON ({e.msg})", "one object a line") from e
        image = _pick(list(row), (*IMAGE_COLUMNS[1:], "image"), f"{path}:{number}", "picture")
        captions = next((row[c] for c in CAPTION_COLUMNS if c in row), [])
        key = next((str(row[c]) for c in KEY_COLUMNS if c in row), str(row[image]))
        known = {image, "split", *KEY_COLUMNS, *CAPTION_COLUMNS}
        yield SourcePicture(
            key,
            _locate(root, str(row[image])),
            _as_list(captions),
            split=row.get("split"),
            extra={k: v for k, v in row.items() if k not in known},
        )


def _as_list(captions: Any) -> list[str]:
    if captions is None:
        return []
    if isinstance(captions, str):
        return [captions]
    return [c["raw"] if isinstance(c, dict) and "raw" in c else str(c) for c in captions]


def _json(path: UPath, root: UPath) -> Iterator[SourcePicture]:
    """COCO captions ({"images", "annotations"}) or a Karpathy split ({"images": [{"sentences",
    "split"}]})."""
    try:
        data = json.loads(_text(path))
    except json.JSONDecodeError as e:
        raise InputError(path, f"not JSON ({e.msg}, line {e.lineno})") from e
    images = data.get("images") if isinstance(data, dict) else None
    if not isinstance(images, list):
        raise InputError(path, "JSON without an images list", "COCO captions or a Karpathy split")
    if "annotations" in data:
        captions: dict[Any, list[str]] = {}
        for a in data["annotations"]:
            captions.setdefault(a["image_id"], []).append(a["caption"])
        for row in images:
            yield SourcePicture(
                row["file_name"], _locate(root, row["file_name"]), captions.get(row["id"], [])
            )
        return
    for row in images:
        name = "/".join(part for part in (row.get("filepath"), row["filename"]) if part)
        # Karpathy's restval belongs to training
        split = {"restval": "train"}.get(row.get("split"), row.get("split"))
        yield SourcePicture(name, _locate(root, name), _as_list(row.get("sentences")), split=split)


def _tar(path: UPath, root: UPath) -> Iterator[SourcePicture]:
    """A webdataset shard: members of one basename are one sample; captions in .txt (a line each) or .json."""
    sample: dict[str, bytes] = {}
    current: str | None = None
    with path.open("rb") as f, tarfile.open(fileobj=f, mode="r|*") as tar:
        for member in tar:
            if not member.isfile():
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            stem = f"{folder}/{stem}" if folder else stem
            if stem != current and sample:
                yield _of_sample(path, str(current), sample)
                sample = {}
            current = stem
            extracted = tar.extractfile(member)
            sample[suffix.lower()] = extracted.read() if extracted else b""
    if sample:
        yield _of_sample(path, str(current), sample)


def _of_sample(path: UPath, stem: str, sample: dict[str, bytes]) -> SourcePicture:
    image = next((sample[s] for s in sample if "." + s.rsplit(".", 1)[-1] in SUFFIXES), None)
    captions, split = [], None
    if "txt" in sample:
        captions = [line for line in sample["txt"].decode("utf-8", "replace").splitlines() if line.strip()]
    elif "json" in sample:
        row = json.loads(sample["json"])
        captions, split = _as_list(next((row[c] for c in CAPTION_COLUMNS if c in row), [])), row.get("split")
    return SourcePicture(
        stem, f"{path}#{stem}", captions, image=image if image is not None else b"", split=split
    )


def _parquet(path: UPath, root: UPath) -> Iterator[SourcePicture]:
    """Ours, datasets' ({bytes, path}), or any table with a picture column (bytes or paths) and a captions
    column."""
    with storage.open_for_arrow(path) as f:
        try:
            file = pq.ParquetFile(f)
        except pa.ArrowInvalid as e:
            raise InputError(path, f"not Parquet ({e})") from e
        columns = file.schema_arrow.names
        image = _pick(columns, IMAGE_COLUMNS, path, "picture")
        caption = next((c for c in CAPTION_COLUMNS if c in columns), None)
        key = next((c for c in KEY_COLUMNS if c in columns), None)
        known = {image, caption, key, "split", "width", "height", "uri", "pixel_hash"}
        number = 0
        for batch in file.iter_batches(batch_size=64):
            for row in batch.to_pylist():
                value = row[image]
                inner = value if isinstance(value, dict) else {}
                data = inner.get("bytes") if inner else value if isinstance(value, bytes) else None
                name = inner.get("path") if inner else value if isinstance(value, str) else row.get("uri")
                ident = str(row[key]) if key and row[key] is not None else name or f"{path.name}-{number:08d}"
                uri = _locate(root, name) if name and data is None else f"{path}#{ident}"
                extra = {k: v for k, v in row.items() if k not in known and not isinstance(v, bytes)}
                yield SourcePicture(
                    ident,
                    uri,
                    _as_list(row[caption]) if caption else [],
                    image=data,
                    split=row.get("split"),
                    extra=extra,
                )
                number += 1


def _folder(path: UPath, root: UPath) -> Iterator[SourcePicture]:
    """Every file with a picture's suffix below the folder, in order of name; no captions."""
    import os

    if "://" not in str(path):
        for folder, folders, files in os.walk(str(path)):
            folders.sort()
            for name in sorted(files):
                if name.lower().endswith(SUFFIXES):
                    full = UPath(folder) / name
                    yield SourcePicture(full.relative_to(path).as_posix(), str(full), [])
        return
    for file in sorted(path.rglob("*"), key=str):
        if file.suffix.lower() in SUFFIXES and file.is_file():
            yield SourcePicture(str(file).removeprefix(str(path)).lstrip("/"), str(file), [])


Reader = Callable[[UPath, UPath], Iterator[SourcePicture]]
READERS: dict[str, Reader] = {
    "parquet": _parquet,
    "tar": _tar,
    "csv": _csv,
    "jsonl": _jsonl,
    "token": _token,
    "json": _json,
    "folder": _folder,
}
