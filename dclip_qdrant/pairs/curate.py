"""One set of pairs out of several: near-duplicates out, captions that don't fit out, so many pictures of each source.

DCLIP mixes 45,000 pictures of COCO, 13,500 of Flickr30k and 9,000 of Conceptual Captions (docs/papers.md 1.2) and calls that curated; its code takes the first that
are there, test pictures among them. Here val and test stand apart: what is like them leaves train.
"""

import hashlib
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from dclip_qdrant.contracts import PAIRS
from dclip_qdrant.errors import InputError, UsageError
from dclip_qdrant.pairs import Pairs, load_image

DCLIP_MIX = (45_000, 13_500, 9_000)  # COCO, Flickr30k, Conceptual Captions
NEAR = 3  # bits of 64; 4 bands of 16 find every pair that near
Say = Callable[[str], None]


def curate(
    sources: Sequence[tuple[str, int | None]], out: str, *, near: int = NEAR, scorer: Any = None, min_score: float | None = None, drop_worst: float = 0.0, seed: int = 0, overwrite: bool = False,
    say: Say = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Writes pairs to `out`: of each source at most that many train pictures (val and test come whole), chosen by a hash of their keys.

    In this order: near-duplicates (difference hashes within `near` bits) keep one picture, in test before val before train; captions whose cosine with their
    picture under `scorer` (a Student) is below `min_score`, or among the worst part `drop_worst` of their source, leave their picture, which leaves when it has
    none left (train alone: what is measured stays as it is); then the counts. What leaves is in `out/rejects.jsonl` with its reason.

    Raises:
        UsageError: pairs there already; a score without a scorer; a source twice.
        InputError: a source has fewer pictures than it was asked for.
    """
    target = Path(out)
    if (target / "manifest.json").exists() and not overwrite:
        raise UsageError(out, "there are pairs here already", do="--overwrite, or another folder")
    if (min_score is not None or drop_worst) and scorer is None:
        raise UsageError("--min-score/--drop-worst", "without a student to judge", "--student DIR, e.g. the base that distill.py exports")
    if len({s for s, _ in sources}) != len(sources):
        raise UsageError("sources", "one of them twice", "different folders")
    opened = [(Pairs.open(path), wanted) for path, wanted in sources]
    rejects: list[dict[str, str]] = []
    index = _index(opened, near > 0, say)
    gone = _near_duplicates(index, near, rejects) if near else set()
    kept_captions = _captions(opened, index, gone, scorer, min_score, drop_worst, rejects, say)
    chosen = _counts(sources, index, gone | {k for k, c in kept_captions.items() if not c}, seed, rejects)
    part = Path(str(target) + ".partial")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    manifest = _write(opened, chosen, kept_captions, part)
    with (part / "rejects.jsonl").open("w") as f:
        f.writelines(json.dumps(r) + "\n" for r in rejects)
    reasons = Counter(r["reason"].split(":")[0] for r in rejects)
    manifest |= {"sources": [{"path": p, "wanted": n} for p, n in sources], "left_out": dict(reasons), "seed": seed}
    (part / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    return manifest


def difference_hash(image: Image.Image) -> int:
    """64 bits: whether each of 9 x 8 grey cells is brighter than its left neighbour. Survives scaling, re-encoding and small changes of tone."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes())


def _key(number: int, key: str) -> str:
    return f"{number}/{key}"


def _index(opened: list[tuple[Pairs, int | None]], hashes: bool, say: Say) -> dict[str, dict[str, Any]]:
    """Every picture under `<source>/<key>`: its source, split and hash."""
    out: dict[str, dict[str, Any]] = {}
    for number, (pairs, _) in enumerate(opened):
        with ThreadPoolExecutor(8) as pool:
            for rows in pairs.rows(["key", "uri", "image", "split"]):
                marks = pool.map(lambda r: difference_hash(load_image(r)), rows) if hashes else [0] * len(rows)
                for row, mark in zip(rows, marks, strict=True):
                    out[_key(number, row["key"])] = {"source": number, "split": row["split"], "hash": mark}
        say(f"{pairs.path}: {sum(v['source'] == number for v in out.values()):,} pictures")
    return out


def _near_duplicates(index: dict[str, dict[str, Any]], near: int, rejects: list[dict[str, str]]) -> set[str]:
    """Keys that leave because another that stays is near; test stays before val before train, then the first by name.

    Raises:
        UsageError: more bits than the bands can find.
    """
    if near > NEAR:
        raise UsageError("--near", f"{near} bits", f"at most {NEAR}: hashes further apart than that are other pictures as often as not")
    rank = {"test": 0, "val": 1, "train": 2}
    bands: dict[tuple[int, int], list[str]] = defaultdict(list)
    gone: set[str] = set()
    for key in sorted(index, key=lambda k: (rank[index[k]["split"]], k)):
        mark = index[key]["hash"]
        mine = [(b, mark >> (16 * b) & 0xFFFF) for b in range(4)]
        twin = next((o for band in mine for o in bands[band] if (index[o]["hash"] ^ mark).bit_count() <= near), None)
        if twin is not None and index[key]["split"] == "train":
            gone.add(key)
            rejects.append({"key": key, "reason": f"near-duplicate: like {twin} ({index[twin]['split']})"})
            continue
        for band in mine:
            bands[band].append(key)
    return gone


def _captions(
    opened: list[tuple[Pairs, int | None]], index: dict[str, dict[str, Any]], gone: set[str], scorer: Any, min_score: float | None, drop_worst: float, rejects: list[dict[str, str]], say: Say
) -> dict[str, list[int]]:  # fmt: skip
    """Which captions of each train picture stay, where they are judged."""
    if scorer is None or (min_score is None and not drop_worst):
        return {}
    kept: dict[str, list[int]] = {}
    for number, (pairs, _) in enumerate(opened):
        scores: dict[str, np.ndarray] = {}
        with ThreadPoolExecutor(8) as pool:
            for rows in pairs.rows(["key", "uri", "image", "captions", "split"], ("train",)):
                rows = [r for r in rows if _key(number, r["key"]) not in gone]
                if not rows:
                    continue
                image = scorer.embed_pixels(pool.map(lambda r: scorer.preprocess.pixels(load_image(r)), rows))
                text = scorer.embed_texts([c for r in rows for c in r["captions"]])
                ends = np.cumsum([len(r["captions"]) for r in rows])[:-1]
                for row, v, said in zip(rows, image, np.split(text, ends), strict=True):
                    scores[_key(number, row["key"])] = said @ v
        line = max(min_score if min_score is not None else -1.0, float(np.quantile(np.concatenate(list(scores.values())), drop_worst)) if drop_worst and scores else -1.0)
        for key, s in scores.items():
            kept[key] = np.flatnonzero(s >= line).tolist()
            for i in np.flatnonzero(s < line):
                rejects.append({"key": key, "reason": f"caption {i}: scores {s[i]:.3f} with its picture, below {line:.3f}"})
        say(f"{pairs.path}: captions below {line:.3f} left out")
    return kept


def _counts(sources: Sequence[tuple[str, int | None]], index: dict[str, dict[str, Any]], gone: set[str], seed: int, rejects: list[dict[str, str]]) -> set[str]:
    """Keys that stay: val and test whole, of each source's train so many, by hash."""
    chosen = {k for k, v in index.items() if v["split"] != "train" and k not in gone}
    for number, (path, wanted) in enumerate(sources):
        mine = sorted((k for k, v in index.items() if v["source"] == number and v["split"] == "train" and k not in gone), key=lambda k: hashlib.sha256(f"{seed}-{k}".encode()).digest())
        if wanted is not None and len(mine) < wanted:
            raise InputError(path, f"{len(mine):,} train pictures are left", f"{wanted:,} as asked for", "ask for fewer, or loosen --min-score")
        chosen |= set(mine[:wanted])
        rejects += [{"key": k, "reason": "over the count: its source has more than was asked for"} for k in mine[wanted:]] if wanted is not None else []
    return chosen


def _write(opened: list[tuple[Pairs, int | None]], chosen: set[str], captions: dict[str, list[int]], folder: Path) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    said, fingerprint, number_of_files = 0, hashlib.sha256(), 0

    def stay() -> Iterator[dict[str, Any]]:
        nonlocal said
        for number, (pairs, _) in enumerate(opened):
            for rows in pairs.rows(list(PAIRS.columns)):
                for row in rows:
                    key = _key(number, row["key"])
                    if key not in chosen:
                        continue
                    own = [row["captions"][i] for i in captions[key]] if key in captions else row["captions"]
                    counts[row["split"]] += 1
                    said += len(own)
                    row = row | {"key": key, "captions": own}
                    fingerprint.update(json.dumps({k: row[k] for k in ("key", "pixel_hash", "captions", "split")}, sort_keys=True).encode())
                    yield row

    held: list[dict[str, Any]] = []
    for row in stay():
        held.append(row)
        if len(held) == 2000:
            pq.write_table(PAIRS.table(held), folder / f"pairs-{number_of_files:05d}.parquet", row_group_size=256)
            held, number_of_files = [], number_of_files + 1
    if held:
        pq.write_table(PAIRS.table(held), folder / f"pairs-{number_of_files:05d}.parquet", row_group_size=256)
    if not counts:
        raise InputError(str(folder), "no picture is left", "at least one")
    return {"contract": "pairs/1", "kind": "curated", "splits": dict(counts), "captions": said, "fingerprint": fingerprint.hexdigest()}


__all__ = ["DCLIP_MIX", "curate", "difference_hash"]
