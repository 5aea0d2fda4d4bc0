"""One set of pairs out of several: near-duplicates out, captions that don't fit out, so many pictures of each
source.

DCLIP mixes 45,000 pictures of COCO, 13,500 of Flickr30k and 9,000 of Conceptual Captions (docs/papers.md 1.2)
and calls that curated; its code takes the first that are there, test pictures among them. Here val and test
stand apart: what is like them leaves train.
"""

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image
from upath import UPath

from dclip_qdrant.errors import InputError, UsageError
from dclip_qdrant.pairs import Pairs, load_image
from dclip_qdrant.pairs.writer import PairsWriter, row_identity
from dclip_qdrant.pictures.preprocess import Preprocess
from dclip_qdrant.tables import storage
from dclip_qdrant.tables.contracts import PAIRS

logger = logging.getLogger(__name__)

DCLIP_MIX = (45_000, 13_500, 9_000)  # COCO, Flickr30k, Conceptual Captions
NEAR = 3  # bits of 64; 4 bands of 16 find every pair that near
READERS = 8  # threads
SPLIT_ORDER = {"test": 0, "val": 1, "train": 2}  # who stays when two pictures are alike


class Scorer(Protocol):
    """What judges how well a caption fits its picture: a `Student`."""

    preprocess: Preprocess

    def embed_pixels(self, pixels: Iterable[np.ndarray]) -> np.ndarray: ...

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray: ...


@dataclass(frozen=True)
class Source:
    """Pairs to take from; `wanted`: at most so many train pictures, None for all."""

    path: str
    wanted: int | None
    pairs: Pairs


@dataclass(frozen=True)
class Entry:
    """One picture of one source."""

    source: int
    split: str
    hash: int


def curate(
    sources: Sequence[tuple[str, int | None]],
    out: str,
    *,
    near: int = NEAR,
    scorer: Scorer | None = None,
    min_score: float | None = None,
    drop_worst: float = 0.0,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes pairs to `out`: of each source at most that many train pictures (val and test come whole),
    chosen by a hash of their keys.

    In this order: near-duplicates (difference hashes within `near` bits) keep one picture, in test before val
    before train; captions whose cosine with their picture under `scorer` is below `min_score`, or among the
    worst part `drop_worst` of their source, leave their picture, which leaves when it has none left (train
    alone: what is measured stays as it is); then the counts. What leaves is in `out/rejects.jsonl` with its
    reason.

    Raises:
        UsageError: pairs there already; a score without a scorer; a source twice.
        InputError: a source has fewer pictures than it was asked for.
    """
    storage.check_free(out, storage.PAIRS_FOLDER, overwrite=overwrite)
    if (min_score is not None or drop_worst) and scorer is None:
        expected = "`student`, e.g. the base that distill exports"
        raise UsageError("`min_score` or `drop_worst`", "without a student to judge", expected)
    if len({path for path, _ in sources}) != len(sources):
        raise UsageError("`sources`", "one of them twice", "different folders")
    if near > NEAR:
        expected = f"at most {NEAR}: hashes further apart are other pictures as often as not"
        raise UsageError("`near`", f"{near} bits", expected)
    opened = [Source(path, wanted, Pairs.open(path)) for path, wanted in sources]
    rejects: list[dict[str, str]] = []
    index = _index(opened, with_hashes=near > 0)
    gone = _near_duplicates(index, near, rejects) if near else set()
    captions: dict[str, list[int]] = {}
    if scorer is not None and (min_score is not None or drop_worst):
        captions = _fitting_captions(opened, gone, scorer, min_score, drop_worst, rejects)
    wordless = {key for key, kept in captions.items() if not kept}
    chosen = _choose(opened, index, gone | wordless, seed, rejects)
    with storage.new_folder(out, storage.PAIRS_FOLDER, overwrite=overwrite) as folder:
        manifest = _write(opened, chosen, captions, folder)
        storage.write_json_lines(folder / "rejects.jsonl", rejects)
        manifest |= {
            "sources": [{"path": s.path, "wanted": s.wanted} for s in opened],
            "left_out": dict(Counter(r["reason"].split(":")[0] for r in rejects)),
            "seed": seed,
        }
        storage.write_json(folder / "manifest.json", manifest)
    return manifest


def difference_hash(image: Image.Image) -> int:
    """64 bits: whether each of 9 x 8 grey cells is brighter than its left neighbour. Survives scaling,
    re-encoding and small changes of tone."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes())


def _new_key(number: int, key: str) -> str:
    return f"{number}/{key}"


def _index(sources: list[Source], *, with_hashes: bool) -> dict[str, Entry]:
    """Every picture under `<source>/<key>`."""
    index: dict[str, Entry] = {}
    for number, source in enumerate(sources):
        before = len(index)
        with ThreadPoolExecutor(READERS) as pool:
            for rows in source.pairs.rows(["key", "uri", "image", "split"]):
                hashes: Iterable[int] = [0] * len(rows)
                if with_hashes:
                    hashes = pool.map(lambda row: difference_hash(load_image(row)), rows)
                for row, value in zip(rows, hashes, strict=True):
                    index[_new_key(number, row["key"])] = Entry(number, row["split"], value)
        logger.info("%s: %s pictures", source.path, f"{len(index) - before:,}")
    return index


def _near_duplicates(index: dict[str, Entry], near: int, rejects: list[dict[str, str]]) -> set[str]:
    """Keys that leave because another that stays is near; test before val before train, then by name."""
    bands: dict[tuple[int, int], list[str]] = defaultdict(list)
    gone: set[str] = set()

    def twin_of(entry: Entry, places: list[tuple[int, int]]) -> str | None:
        for place in places:
            for other in bands[place]:
                if (index[other].hash ^ entry.hash).bit_count() <= near:
                    return other
        return None

    for key in sorted(index, key=lambda k: (SPLIT_ORDER[index[k].split], k)):
        entry = index[key]
        places = [(band, entry.hash >> (16 * band) & 0xFFFF) for band in range(4)]
        twin = twin_of(entry, places) if entry.split == "train" else None
        if twin is not None:
            gone.add(key)
            rejects.append({"key": key, "reason": f"near-duplicate: like {twin} ({index[twin].split})"})
            continue
        for place in places:
            bands[place].append(key)
    return gone


def _fitting_captions(
    sources: list[Source],
    gone: set[str],
    scorer: Scorer,
    min_score: float | None,
    drop_worst: float,
    rejects: list[dict[str, str]],
) -> dict[str, list[int]]:
    """Which captions of each train picture stay, by number."""
    kept: dict[str, list[int]] = {}
    for number, source in enumerate(sources):
        scores = _caption_scores(number, source, gone, scorer)
        line = -1.0 if min_score is None else min_score
        if drop_worst and scores:
            line = max(line, float(np.quantile(np.concatenate(list(scores.values())), drop_worst)))
        for key, values in scores.items():
            kept[key] = np.flatnonzero(values >= line).tolist()
            for i in np.flatnonzero(values < line):
                reason = f"caption {i}: scores {values[i]:.3f} with its picture, below {line:.3f}"
                rejects.append({"key": key, "reason": reason})
        logger.info("%s: captions below %.3f left out", source.path, line)
    return kept


def _caption_scores(number: int, source: Source, gone: set[str], scorer: Scorer) -> dict[str, np.ndarray]:
    """Cosines of each train picture with its captions [C]."""
    scores: dict[str, np.ndarray] = {}
    with ThreadPoolExecutor(READERS) as pool:
        for batch in source.pairs.rows(["key", "uri", "image", "captions", "split"], ("train",)):
            rows = [r for r in batch if _new_key(number, r["key"]) not in gone]
            if not rows:
                continue
            pixels = pool.map(lambda row: scorer.preprocess.pixels(load_image(row)), rows)
            images = scorer.embed_pixels(pixels)
            texts = scorer.embed_texts([c for r in rows for c in r["captions"]])
            ends = np.cumsum([len(r["captions"]) for r in rows])[:-1]
            for row, image, own in zip(rows, images, np.split(texts, ends), strict=True):
                scores[_new_key(number, row["key"])] = own @ image
    return scores


def _choose(
    sources: list[Source], index: dict[str, Entry], gone: set[str], seed: int, rejects: list[dict[str, str]]
) -> set[str]:
    """Keys that stay: val and test whole, of each source's train so many, by hash."""
    chosen = {key for key, entry in index.items() if entry.split != "train" and key not in gone}
    for number, source in enumerate(sources):
        own = [
            key
            for key, entry in index.items()
            if entry.source == number and entry.split == "train" and key not in gone
        ]
        own.sort(key=lambda key: hashlib.sha256(f"{seed}-{key}".encode()).digest())
        if source.wanted is None:
            chosen |= set(own)
            continue
        if len(own) < source.wanted:
            came = f"{len(own):,} train pictures are left"
            do = "ask for fewer, or loosen `min_score`"
            raise InputError(source.path, came, f"{source.wanted:,} as asked for", do)
        chosen |= set(own[: source.wanted])
        reason = "over the count: its source has more than was asked for"
        rejects += [{"key": key, "reason": reason} for key in own[source.wanted :]]
    return chosen


def _write(
    sources: list[Source], chosen: set[str], captions: dict[str, list[int]], folder: UPath
) -> dict[str, Any]:
    """The rows that stay, under their new keys; what the manifest says of them."""
    splits: Counter[str] = Counter()
    caption_count, fingerprint = 0, hashlib.sha256()
    with PairsWriter(folder) as writer:
        for number, source in enumerate(sources):
            for rows in source.pairs.rows(list(PAIRS.columns)):
                for row in rows:
                    key = _new_key(number, row["key"])
                    if key not in chosen:
                        continue
                    own = row["captions"]
                    if key in captions:
                        own = [own[i] for i in captions[key]]
                    splits[row["split"]] += 1
                    caption_count += len(own)
                    row |= {"key": key, "captions": own}
                    fingerprint.update(row_identity(row))
                    writer.add(row)
    if not splits:
        raise InputError(str(folder), "no picture is left", "at least one")
    return {
        "contract": "pairs/1",
        "kind": "curated",
        "splits": dict(splits),
        "captions": caption_count,
        "fingerprint": fingerprint.hexdigest(),
    }
