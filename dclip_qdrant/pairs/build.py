"""From what people have to the pairs contract: read, judge, split, refuse leaks, write."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from dclip_qdrant.errors import DclipError, ImageError, InputError, LeakError, UsageError
from dclip_qdrant.pairs.readers import Account, SourcePicture, left_out_line, open_source
from dclip_qdrant.pairs.splits import SPLIT_NAMES, SPLITS, unit_hash
from dclip_qdrant.pairs.writer import PairsWriter, fingerprint_of
from dclip_qdrant.pictures import images
from dclip_qdrant.tables import storage
from dclip_qdrant.tables.contracts import PAIRS
from dclip_qdrant.tables.storage import open_for_arrow

logger = logging.getLogger(__name__)

TELLING_TEST = 300  # one point of R@1 on 1,000 pictures is about one standard error; on 300 about 1.8


@dataclass(frozen=True)
class BuildOptions:
    """How pairs are made.

    `captions`: False takes pictures alone, all for training: what a teacher says of them is distilled without
    a word. `embed`: pictures inside the Parquet files; None: only where the source has no file for each (tar,
    Parquet). `on_leak`: `refuse`, or `drop-train` to reject the train copies of test and val pictures.
    """

    images_root: str | None = None
    captions: bool = True
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    split_map: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    embed: bool | None = None
    on_leak: str = "refuse"
    threads: int = 4


@dataclass
class Ledger:
    """What became of every row of the source."""

    total: int = 0
    captions: int = 0
    copies: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    rejects: list[dict[str, str]] = field(default_factory=list)
    first_uri: dict[str, str] = field(default_factory=dict)  # by key
    # pixel hash -> split -> first key
    keys_by_pixels: dict[str, dict[str, str]] = field(default_factory=dict)


def build(
    source: str,
    out: str,
    *,
    images_root: str | None = None,
    captions: bool = True,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    split_map: dict[str, str] | None = None,
    seed: int = 0,
    embed: bool | None = None,
    on_leak: str = "refuse",
    overwrite: bool = False,
    threads: int = 4,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Writes `out/pairs-*.parquet`, `out/rejects.jsonl` and, last, `out/manifest.json`, which it returns.

    A picture's split is the source's own where it has one; otherwise it follows from (seed, decoded pixels),
    so that copies of a picture always stand on one side and adding pictures moves none. A source with `train`
    but without `val` gives part of train to val. Options: see `BuildOptions`; `out` may be a URI.

    Raises:
        LeakError: the same decoded picture in train and in val or test.
        InputError: nothing usable in the source.
        UsageError: `out` holds something else, or pairs without `overwrite`.
    """
    options = BuildOptions(images_root, captions, fractions, split_map or {}, seed, embed, on_leak, threads)
    if abs(sum(fractions) - 1) > 1e-6 or min(fractions) < 0:
        expected = "three numbers >= 0 that sum to 1"
        raise UsageError("`fractions`", ",".join(map(str, fractions)), expected)
    storage.check_free(out, storage.PAIRS_FOLDER, overwrite=overwrite)
    layout = open_source(source, images_root=images_root, captions=captions)
    account = Account(layout)
    with storage.new_folder(out, storage.PAIRS_FOLDER, overwrite=overwrite) as folder:
        ledger = Ledger()
        with PairsWriter(folder) as writer:
            for row in _judged(account.pictures(), options, ledger, progress):
                writer.add(row)
        files = writer.files
        if not ledger.splits:
            first = f", the first: {ledger.rejects[0]['reason']}" if ledger.rejects else ""
            came = f"{ledger.total} rows, none of them usable{first}"
            raise InputError(source, came, "pictures with captions")
        if captions and ledger.splits["train"] and not ledger.splits["val"]:
            _carve_val(files, options, ledger)
        _settle_leaks(source, files, options, ledger)
        test = ledger.splits["test"]
        if captions and test < TELLING_TEST:
            there = f"only {test} test pictures" if test else "no test pictures"
            logger.warning(
                "%s: a student's gain is usually smaller than what they can tell; give %d or more",
                there,
                TELLING_TEST,
            )
        storage.write_json_lines(folder / "rejects.jsonl", ledger.rejects)
        left_out = account.left_out()
        if left_out:
            logger.warning("%s: %s", source, left_out_line(layout.kind, left_out))
        manifest = {
            "contract": "pairs/1",
            "source": str(source),
            "kind": layout.kind,
            "seed": seed,
            "splits": {s: ledger.splits[s] for s in SPLITS if ledger.splits[s]},
            "captions": ledger.captions,
            "copies": ledger.copies,
            "rejects": len(ledger.rejects),
            "left_out": left_out,
            "fingerprint": fingerprint_of(files),
        }
        storage.write_json(folder / "manifest.json", manifest)
    return manifest


def _judged(
    pictures: Iterator[SourcePicture], options: BuildOptions, ledger: Ledger, progress: Callable[[int], None]
) -> Iterator[dict[str, Any]]:
    """The rows that are good, each with its split; the others are entered as rejects."""
    for picture, verdict in _judge_all(pictures, options):
        ledger.total += 1
        progress(ledger.total)
        if isinstance(verdict, dict) and options.captions:
            ledger.rejects += _captions_left_out(picture)
        if isinstance(verdict, dict) and verdict["key"] in ledger.first_uri:
            came = f"a second picture named {picture.key!r} (first: {ledger.first_uri[picture.key]})"
            verdict = InputError(picture.uri, came, "unique names")
        if isinstance(verdict, DclipError):
            ledger.rejects.append({"key": picture.key, "path": picture.uri, "reason": str(verdict)})
            continue
        row = verdict
        ledger.first_uri[row["key"]] = picture.uri
        row["split"] = row["split"] or _draw_split(row["pixel_hash"], options.seed, options.fractions)
        same_pixels = ledger.keys_by_pixels.setdefault(row["pixel_hash"], {})
        ledger.copies += bool(same_pixels)
        same_pixels.setdefault(row["split"], row["key"])
        ledger.splits[row["split"]] += 1
        ledger.captions += len(row["captions"])
        yield row


def _judge_all(
    pictures: Iterator[SourcePicture], options: BuildOptions
) -> Iterator[tuple[SourcePicture, dict[str, Any] | DclipError]]:
    """Decodes on threads, keeps the order, holds only a window of pictures in memory."""
    with ThreadPoolExecutor(options.threads) as pool:
        while window := list(islice(pictures, options.threads * 16)):
            verdicts = pool.map(lambda picture: _judge(picture, options), window)
            yield from zip(window, verdicts, strict=True)


def _judge(picture: SourcePicture, options: BuildOptions) -> dict[str, Any] | DclipError:
    """A row of the pairs contract, or why the picture is rejected."""
    if picture.error is not None:
        return picture.error
    try:
        captions = [" ".join(c.split()) for c in picture.captions if c.strip()] if options.captions else []
        if options.captions and not captions:
            came = "an empty caption" if picture.captions else "no caption"
            raise InputError(picture.uri, came, "at least one caption that is not empty")
        if picture.image is None and picture.uri.startswith(("http://", "https://")):
            do = "dclip-qdrant fetch gets pictures by their addresses, then make pairs of its folder"
            raise InputError(picture.uri, "an address on the web, which is never fetched here", "a file", do)
        split = _own_split(picture, options.split_map) if options.captions else "train"
        data = picture.image if picture.image is not None else images.read(picture.uri)
        image = images.open_rgb(data, picture.uri)
    except (InputError, ImageError) as e:
        return e
    inside = picture.image is not None if options.embed is None else options.embed
    if not inside and picture.image is not None:
        came = "a picture inside an archive"
        return InputError(picture.uri, came, "a file for each picture", "`embed`: pictures go into the files")
    return {
        "key": picture.key,
        "uri": picture.uri,
        "image": data if inside else None,
        "width": image.width,
        "height": image.height,
        "captions": captions,
        "split": split,
        "pixel_hash": images.pixel_hash(image),
    }


def _captions_left_out(picture: SourcePicture) -> list[dict[str, str]]:
    """A reject for each empty caption of a picture that has others."""
    count = sum(not caption.strip() for caption in picture.captions)
    return [
        {"key": picture.key, "path": picture.uri, "reason": "an empty caption; the others are kept"}
    ] * count


def _own_split(picture: SourcePicture, split_map: dict[str, str]) -> str | None:
    """The split that the source says, under our names; None where it says none."""
    if not picture.split:
        return None
    name = picture.split.strip().lower()
    name = split_map.get(name, name)
    name = SPLIT_NAMES.get(name, name)
    if name and name not in SPLITS:
        do = f"`split_map` {picture.split}=train"
        raise InputError(picture.uri, f"split {picture.split!r}", "train, val or test", do)
    return name or None


def _draw_split(pixel_hash: str, seed: int, fractions: tuple[float, float, float]) -> str:
    u = unit_hash(pixel_hash, f"split-{seed}")
    if u < fractions[0]:
        return "train"
    return "val" if u < fractions[0] + fractions[1] else "test"


def _rewrite(file: UPath, table: pa.Table) -> None:
    with file.open("wb") as f:
        pq.write_table(table.replace_schema_metadata(PAIRS.schema.metadata), f, row_group_size=256)


def _carve_val(files: list[UPath], options: BuildOptions, ledger: Ledger) -> None:
    """Gives part of train to val, where the source has no val of its own."""
    fraction = max(options.fractions[1], 0.1)
    counts: Counter[str] = Counter()
    for file in files:
        with open_for_arrow(file) as f:
            table = pq.read_table(f)
        columns = (table[name].to_pylist() for name in ("split", "pixel_hash", "key"))
        splits = []
        for split, pixels, key in zip(*columns, strict=True):
            if split == "train" and unit_hash(pixels, f"val-{options.seed}") < fraction:
                split = "val"
            if split == "val":
                ledger.keys_by_pixels[pixels].pop("train", None)
                ledger.keys_by_pixels[pixels].setdefault("val", key)
            splits.append(split)
        counts.update(splits)
        column = table.schema.get_field_index("split")
        _rewrite(file, table.set_column(column, "split", pa.array(splits)))
    ledger.splits = counts


def _settle_leaks(source: str, files: list[UPath], options: BuildOptions, ledger: Ledger) -> None:
    """Refuses pictures that stand in train and in val or test, or drops their train copies."""
    leaks = {p: keys for p, keys in ledger.keys_by_pixels.items() if "train" in keys and len(keys) > 1}
    if not leaks:
        return
    if options.on_leak == "refuse":
        keys = next(iter(leaks.values()))
        twin = next(key for split, key in keys.items() if split != "train")
        came = f"{len(leaks)} pictures stand in train and in val or test, e.g. {keys['train']!r} is {twin!r}"
        do = "`on_leak` drop-train rejects the train copies"
        raise LeakError(source, came, "no decoded picture on both sides", do)
    dropped = _drop_train(files, set(leaks))
    ledger.splits["train"] -= len(dropped)
    reason = "stands in val or test too (same decoded pixels)"
    ledger.rejects += [{"key": key, "path": uri, "reason": reason} for key, uri in dropped]


def _drop_train(files: list[UPath], pixel_hashes: set[str]) -> list[tuple[str, str]]:
    """Takes the train copies of these pictures out of the files; their keys and URIs."""
    dropped = []
    for file in files:
        with open_for_arrow(file) as f:
            table = pq.read_table(f)
        rows = table.select(["split", "pixel_hash", "key", "uri"]).to_pylist()
        out = [r["split"] == "train" and r["pixel_hash"] in pixel_hashes for r in rows]
        if any(out):
            dropped += [(r["key"], r["uri"]) for r, gone in zip(rows, out, strict=True) if gone]
            _rewrite(file, table.filter(pa.array([not gone for gone in out])))
    return dropped
