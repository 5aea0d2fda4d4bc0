"""Mixing pairs: near-duplicates, captions that don't fit, counts; pictures by URL, from a server of the
test's own."""

import io
import json

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from dclip_qdrant.errors import InputError, UsageError
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.pairs.build import build
from dclip_qdrant.pairs.curate import curate, difference_hash
from dclip_qdrant.pairs.leak import leak


def picture(seed, size=64):
    """Soft blobs: a hash needs structure."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def jpeg(image, quality=90):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def made(folder, rows):
    """Pairs from (name, image, captions, split)."""
    (folder / "src").mkdir(parents=True)
    for name, image, _, _ in rows:
        (folder / "src" / f"{name}.jpg").write_bytes(jpeg(image))
    lines = [
        {"file_name": f"{name}.jpg", "captions": captions, "split": split}
        for name, _, captions, split in rows
    ]
    (folder / "src" / "captions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    build(str(folder / "src"), str(folder / "pairs"))
    return str(folder / "pairs")


def keys(path, split=None):
    return set(Pairs.open(str(path)).table(["key"], (split,) if split else None)["key"].to_pylist())


def reasons(out):
    return {r["key"]: r["reason"] for r in map(json.loads, (out / "rejects.jsonl").read_text().splitlines())}


def test_a_difference_hash_survives_what_does_not_change_the_picture():
    a = picture(1)
    near = [a.resize((48, 48)), ImageEnhance.Brightness(a).enhance(1.1), Image.open(io.BytesIO(jpeg(a, 40)))]
    assert all((difference_hash(a) ^ difference_hash(b)).bit_count() <= 3 for b in near)
    others = [(difference_hash(a) ^ difference_hash(picture(s))).bit_count() for s in range(2, 30)]
    assert min(others) > 10


def test_a_difference_hash_by_hand():
    rising = Image.fromarray(np.tile(np.arange(0, 250, 28, dtype=np.uint8)[:9], (8, 1)))
    assert difference_hash(rising) == 2**64 - 1
    assert difference_hash(rising.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == 0


def test_near_duplicates_leave_train_and_test_stays_whole(tmp_path):
    a = made(
        tmp_path / "a",
        [
            ("one", picture(1), ["x"], "train"),
            ("again", picture(1, 60), ["y"], "train"),
            ("two", picture(2), ["z"], "train"),
            ("v", picture(9), ["v"], "val"),
        ],
    )
    b = made(tmp_path / "b", [("held", picture(2, 62), ["t"], "test"), ("three", picture(3), ["w"], "train")])
    m = curate([(a, None), (b, None)], str(tmp_path / "out"))
    assert keys(tmp_path / "out", "test") == {"1/held.jpg"}
    assert keys(tmp_path / "out", "train") == {
        "0/again.jpg",
        "1/three.jpg",
    }  # the first by name of the two copies; `two` is like a test picture
    why = reasons(tmp_path / "out")
    assert why == {
        "0/one.jpg": "near-duplicate: like 0/again.jpg (train)",
        "0/two.jpg": "near-duplicate: like 1/held.jpg (test)",
    }
    assert m["left_out"] == {"near-duplicate": 2}
    assert m["splits"] == {"train": 2, "val": 1, "test": 1}


def test_counts_are_kept_and_follow_from_the_seed(tmp_path):
    a = made(
        tmp_path / "a",
        [(f"p{i}", picture(i), ["x"], "train") for i in range(12)] + [("v", picture(99), ["v"], "val")],
    )
    curate([(a, 5)], str(tmp_path / "x"))
    curate([(a, 5)], str(tmp_path / "y"))
    curate([(a, 5)], str(tmp_path / "z"), seed=1)
    assert len(keys(tmp_path / "x", "train")) == 5
    assert keys(tmp_path / "x") == keys(tmp_path / "y") != keys(tmp_path / "z")
    assert len(keys(tmp_path / "x", "val")) == 1
    assert len(reasons(tmp_path / "x")) == 7
    with pytest.raises(InputError, match="12 train pictures are left; expected 50"):
        curate([(a, 50)], str(tmp_path / "w"))
    with pytest.raises(UsageError, match="there are pairs here already"):
        curate([(a, 5)], str(tmp_path / "x"))


class Judge:
    """Fits a caption to a picture by its first letter: g(ood) 1, b(ad) 0."""

    class preprocess:
        @staticmethod
        def pixels(image):
            return np.zeros((1, 1, 3), np.uint8)

    def embed_pixels(self, pixels):
        return np.array([[1.0, 0.0] for _ in pixels])

    def embed_texts(self, texts):
        return np.array([[1.0, 0.0] if t.startswith("g") else [0.0, 1.0] for t in texts])


def test_captions_that_do_not_fit_leave_and_a_picture_without_any_leaves_too(tmp_path):
    a = made(
        tmp_path / "a",
        [
            ("one", picture(1), ["good", "bad"], "train"),
            ("two", picture(2), ["bad"], "train"),
            ("v", picture(3), ["bad"], "val"),
        ],
    )
    curate([(a, None)], str(tmp_path / "out"), scorer=Judge(), min_score=0.5)
    table = Pairs.open(str(tmp_path / "out")).table(["key", "captions"]).to_pylist()
    assert {r["key"]: r["captions"] for r in table} == {
        "0/one.jpg": ["good"],
        "0/v.jpg": ["bad"],
    }  # what is measured stays as it is
    assert reasons(tmp_path / "out")["0/two.jpg"].startswith(
        "caption 0: scores 0.000 with its picture, below 0.500"
    )
    with pytest.raises(UsageError, match="`student`"):
        curate([(a, None)], str(tmp_path / "o2"), min_score=0.5)


def test_curated_pairs_are_pairs(tmp_path):
    from dclip_qdrant.tables.contracts import PAIRS

    a = made(tmp_path / "a", [("one", picture(1), ["x"], "train"), ("v", picture(3), ["y"], "val")])
    curate([(a, None)], str(tmp_path / "out"))
    pairs = Pairs.open(str(tmp_path / "out"))
    assert pairs.table(list(PAIRS.columns)).num_rows == 2
    assert len(pairs.fingerprint) == 64


def test_a_leak_on_purpose(tmp_path):
    a = made(
        tmp_path / "a",
        [("one", picture(1), ["x"], "train")]
        + [(f"t{i}", picture(10 + i), ["y"], "test") for i in range(40)]
        + [("v", picture(3), ["z"], "val")],
    )
    count = leak(a, str(tmp_path / "leaked"), share=0.5)
    assert 10 < count < 30
    assert len(keys(tmp_path / "leaked", "test")) == 40
    assert len(keys(tmp_path / "leaked", "train")) == 1 + count
    assert leak(a, str(tmp_path / "leaked"), share=0.5) == count
    assert Pairs.open(str(tmp_path / "leaked")).fingerprint != Pairs.open(a).fingerprint
