"""From what people have to the pairs contract: read, judge, split, refuse leaks, write."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from dclip_qdrant import images
from dclip_qdrant.arrow_file import opened
from dclip_qdrant.contracts import PAIRS
from dclip_qdrant.errors import DclipError, ImageError, InputError, LeakError, UsageError
from dclip_qdrant.pairs.readers import Found, read_any

SPLITS = ("train", "val", "test")
ROWS_A_FILE = 2000
BYTES_A_FILE = 256 << 20


def build(
    source: str,
    out: str,
    *,
    images_root: str | None = None,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    split_map: dict[str, str] | None = None,
    seed: int = 0,
    embed: bool | None = None,
    on_leak: str = "refuse",
    overwrite: bool = False,
    threads: int = 4,
    progress: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Writes `out/pairs-*.parquet`, `out/rejects.jsonl` and, last, `out/manifest.json`, which it returns.

    A picture's split is the source's own where it has one; otherwise it follows from (seed, decoded pixels), so that copies of a
    picture always stand on one side and adding pictures moves none. A source with `train` but without `val` gives part of train to val.

    Args:
        embed: pictures inside the Parquet files. None: only where the source has no file for each (tar, Parquet).
        on_leak: `refuse`, or `drop-train` to reject the train copies of test and val pictures.

    Raises:
        LeakError: the same decoded picture in train and in val or test.
        InputError: nothing usable in the source.
    """
    target = UPath(out)
    if (target / "manifest.json").exists() and not overwrite:
        raise UsageError(out, "there are pairs here already", do="--overwrite, or another folder")
    if abs(sum(fractions) - 1) > 1e-6 or min(fractions) < 0:
        raise UsageError("--fractions", ",".join(map(str, fractions)), "three numbers >= 0 that sum to 1")
    kind, found = read_any(source, images=images_root)
    part = UPath(str(target) + ".partial")
    if part.exists():
        shutil.rmtree(part) if "://" not in str(part) else part.rmdir()
    part.mkdir(parents=True)
    rejects: list[dict[str, str]] = []
    where: dict[str, dict[str, str]] = {}  # pixel hash -> split -> first key
    seen: dict[str, str] = {}
    counts: Counter[str] = Counter()
    captions = copies = total = 0
    fingerprint = hashlib.sha256()

    def judged() -> Iterator[dict[str, Any]]:
        nonlocal captions, copies, total
        for raw, verdict in _judge_all(found, embed, split_map or {}, threads):
            total += 1
            progress(total)
            if isinstance(verdict, dict) and verdict["key"] in seen:
                verdict = InputError(raw.uri, f"a second picture named {raw.key!r} (first: {seen[raw.key]})", "unique names")
            if isinstance(verdict, DclipError):
                rejects.append({"key": raw.key, "path": raw.uri, "reason": str(verdict)})
                continue
            seen[verdict["key"]] = raw.uri
            verdict["split"] = verdict["split"] or _draw_split(verdict["pixel_hash"], seed, fractions)
            at = where.setdefault(verdict["pixel_hash"], {})
            copies += bool(at)
            at.setdefault(verdict["split"], verdict["key"])
            counts[verdict["split"]] += 1
            captions += len(verdict["captions"])
            yield verdict

    files = _write(judged(), part)
    if not counts:
        first = f", the first: {rejects[0]['reason']}" if rejects else ""
        shutil.rmtree(part)
        raise InputError(source, f"{total} rows, none of them usable{first}", "pictures with captions")
    if counts["train"] and not counts["val"]:
        counts = _carve_val(files, seed, max(fractions[1], 0.1), where)
    leaks = [(h, at) for h, at in where.items() if "train" in at and len(at) > 1]
    if leaks and on_leak == "refuse":
        _h, at = leaks[0]
        shutil.rmtree(part)
        raise LeakError(source, f"{len(leaks)} pictures stand in train and in val or test, e.g. {at['train']!r} is {next(at[s] for s in at if s != 'train')!r}",
                        "no decoded picture on both sides", "--on-leak drop-train rejects the train copies")  # fmt: skip
    if leaks:
        dropped = _drop_train(files, {h for h, _ in leaks})
        counts["train"] -= len(dropped)
        rejects += [{"key": k, "path": u, "reason": "stands in val or test too (same decoded pixels)"} for k, u in dropped]
    for file in files:
        with opened(file) as f:
            for row in pq.read_table(f, columns=["key", "pixel_hash", "captions", "split"]).to_pylist():
                fingerprint.update(json.dumps(row, sort_keys=True).encode())
    with (part / "rejects.jsonl").open("w") as f:
        f.writelines(json.dumps(r) + "\n" for r in rejects)
    manifest = {
        "contract": "pairs/1", "source": str(source), "kind": kind, "seed": seed, "splits": {s: counts[s] for s in SPLITS if counts[s]},
        "captions": captions, "copies": copies, "rejects": len(rejects), "fingerprint": fingerprint.hexdigest(),
    }  # fmt: skip
    (part / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    if target.exists():
        shutil.rmtree(target)
    part.rename(target)
    return manifest


def _judge_all(
    found: Iterator[Found], embed: bool | None, split_map: dict[str, str], threads: int
) -> Iterator[tuple[Found, dict | DclipError]]:
    """Decodes on threads, keeps the order, holds only a window of pictures in memory."""
    with ThreadPoolExecutor(threads) as pool:
        while window := list(islice(found, threads * 16)):
            yield from zip(window, pool.map(lambda raw: _judge(raw, embed, split_map), window), strict=True)


def _judge(raw: Found, embed: bool | None, split_map: dict[str, str]) -> dict[str, Any] | DclipError:
    try:
        captions = [" ".join(c.split()) for c in raw.captions]
        if not captions or not all(captions):
            raise InputError(raw.uri, "no caption" if not captions else "an empty caption", "at least one caption, none of them empty")
        split = raw.split.strip().lower() if raw.split else None
        split = split_map.get(split, split) if split else None
        split = {"validation": "val", "valid": "val", "dev": "val", "training": "train"}.get(split or "", split)
        if split and split not in SPLITS:
            raise InputError(raw.uri, f"split {raw.split!r}", "train, val or test", f"--split-map {raw.split}=train")
        data = raw.image if raw.image is not None else images.read(raw.uri)
        image = images.open_rgb(data, raw.uri)
    except (InputError, ImageError) as e:
        return e
    inside = raw.image is not None if embed is None else embed
    if not inside and raw.image is not None:
        return InputError(raw.uri, "a picture inside an archive", "a file for each picture", "leave out --reference")
    return {"key": raw.key, "uri": raw.uri, "image": data if inside else None, "width": image.width, "height": image.height,
            "captions": captions, "split": split, "pixel_hash": images.pixel_hash(image)}  # fmt: skip


def _unit(pixel_hash: str, seed: int, what: str) -> float:
    return int.from_bytes(hashlib.sha256(f"{what}-{seed}-{pixel_hash}".encode()).digest()[:8]) / 2**64


def _draw_split(pixel_hash: str, seed: int, fractions: tuple[float, float, float]) -> str:
    u = _unit(pixel_hash, seed, "split")
    return "train" if u < fractions[0] else "val" if u < fractions[0] + fractions[1] else "test"


def _write(rows: Iterator[dict[str, Any]], folder: UPath) -> list[UPath]:
    files, held, size = [], [], 0

    def flush() -> None:
        file = folder / f"pairs-{len(files):05d}.parquet"
        with file.open("wb") as f:
            pq.write_table(PAIRS.table(held), f, row_group_size=256)
        files.append(file)

    for row in rows:
        held.append(row)
        size += len(row["image"] or b"")
        if len(held) >= ROWS_A_FILE or size >= BYTES_A_FILE:
            flush()
            held, size = [], 0
    if held:
        flush()
    return files


def _rewrite(file: UPath, table: pa.Table) -> None:
    with file.open("wb") as f:
        pq.write_table(table.replace_schema_metadata(PAIRS.schema.metadata), f, row_group_size=256)


def _carve_val(files: list[UPath], seed: int, fraction: float, where: dict[str, dict[str, str]]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for file in files:
        with opened(file) as f:
            table = pq.read_table(f)
        hashes, keys = table["pixel_hash"].to_pylist(), table["key"].to_pylist()
        splits = [
            "val" if s == "train" and _unit(h, seed, "val") < fraction else s
            for s, h in zip(table["split"].to_pylist(), hashes, strict=True)
        ]
        for s, h, k in zip(splits, hashes, keys, strict=True):
            if s == "val":
                where[h].pop("train", None)
                where[h].setdefault("val", k)
        counts.update(splits)
        _rewrite(file, table.set_column(table.schema.get_field_index("split"), "split", pa.array(splits)))
    return counts


def _drop_train(files: list[UPath], hashes: set[str]) -> list[tuple[str, str]]:
    dropped = []
    for file in files:
        with opened(file) as f:
            table = pq.read_table(f)
        out = [s == "train" and h in hashes for s, h in zip(table["split"].to_pylist(), table["pixel_hash"].to_pylist(), strict=True)]
        if any(out):
            dropped += [(k, u) for k, u, o in zip(table["key"].to_pylist(), table["uri"].to_pylist(), out, strict=True) if o]
            _rewrite(file, table.filter(pa.array([not o for o in out])))
    return dropped
