"""Statements about real photos in SNLI-VE's files, made from the captions of pairs: for CLIP-TD's own task.

    python benchmarks/statements.py PAIRS DIR [--photos N]
    dclip-qdrant clip-td --task snli_ve --train DIR/train.jsonl --test DIR/test.jsonl --images DIR/images ...

The first caption of every photo is stated of three photos:

    entailment     its own
    neutral        the photo whose captions are nearest to it: much the same could be said of that one
    contradiction  a photo drawn from the quarter whose captions are furthest from it

Near is the cosine of TF-IDF vectors, words of a caption against all words of a photo's captions. As every
sentence stands under each label once, no label follows from the words alone: who doesn't look is right in a
third. No person has judged these labels: some neighbour's photo does show what is stated.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

from dclip_qdrant import metrics
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.training.data import Pictures
from dclip_qdrant.training.evaluate import spread

TELLING = 3  # letters: what is shorter tells little
FEWEST = 4  # photos of a split


def words(text: str) -> list[str]:
    return [w for w in re.findall(r"[a-z]+", text.lower()) if len(w) >= TELLING]


def similarities(stated: list[str], told: list[str]) -> np.ndarray:
    """[N, N]: cosines of the TF-IDF vectors of N sentences and of N photos' captions put together."""
    place = {w: i for i, w in enumerate(sorted({w for text in told for w in words(text)}))}
    counts = counted(told, place)
    rarity = np.log(len(told) / (counts > 0).sum(0))
    sentences, photos = (metrics.normalise(np.log1p(x) * rarity) for x in (counted(stated, place), counts))
    return sentences @ photos.T


def counted(texts: list[str], place: dict[str, int]) -> np.ndarray:
    """[N, V]: how often each known word stands in each text."""
    counts = np.zeros((len(texts), len(place)), np.float32)
    for row, text in enumerate(texts):
        for w in words(text):
            if w in place:
                counts[row, place[w]] += 1
    return counts


def examples(keys: list[str], captions: list[list[str]], rng: np.random.Generator) -> list[dict[str, str]]:
    """Three a photo, in SNLI-VE's words, shuffled."""
    stated = [own[0] for own in captions]
    near = similarities(stated, [" ".join(own) for own in captions])
    np.fill_diagonal(near, np.nan)
    out = []
    for i, sentence in enumerate(stated):
        far = np.flatnonzero(near[i] <= np.nanquantile(near[i], 0.25))
        photos = {
            "entailment": i,
            "neutral": int(np.nanargmax(near[i])),
            "contradiction": int(rng.choice(far)),
        }
        out += [
            {
                "pairID": f"{keys[i]}-{label}",
                "gold_label": label,
                "sentence2": sentence,
                "Flickr30K_ID": keys[photo],
            }
            for label, photo in photos.items()
        ]
    return [out[i] for i in rng.permutation(len(out))]


def with_captions(pairs: Pairs, split: str, most: int) -> np.ndarray:
    """Rows of no more than `most` photos of a split that have captions, evenly spread over it."""
    counts = np.array([len(c) for c in pairs.table(["captions"], (split,))["captions"].to_pylist()])
    rows = np.flatnonzero(counts)
    if len(rows) < len(counts):
        print(f"{split}: {len(counts) - len(rows):,} of {len(counts):,} photos have no caption: left out")
    if len(rows) < FEWEST:
        sys.exit(f"{split}: {len(rows)} photos with captions, {FEWEST} at least: a neighbour and a quarter")
    return rows[spread(len(rows), most)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pairs", metavar="PAIRS")
    parser.add_argument("out", type=Path, metavar="DIR")
    parser.add_argument("--photos", type=int, default=4000, help="at most, of each split")
    args = parser.parse_args()
    pairs, images = Pairs.open(args.pairs), args.out / "images"
    if args.out.exists():
        parser.error(f"{args.out} is there already; name a folder that isn't")
    images.mkdir(parents=True)
    for split in ("train", "test"):
        rows = with_captions(pairs, split, args.photos)
        pictures = Pictures(pairs, split, rows)
        names = [f"{split}-{row}" for row in rows]
        for i, name in enumerate(names):
            pictures.load(i).save(images / f"{name}.jpg", quality=95)
        captions = pairs.table(["captions"], (split,), rows=rows)["captions"].to_pylist()
        made = examples(names, captions, np.random.default_rng(0))
        (args.out / f"{split}.jsonl").write_text("".join(json.dumps(e) + "\n" for e in made))
        print(f"{split}: {len(made):,} statements of {len(rows):,} photos")


if __name__ == "__main__":
    main()
