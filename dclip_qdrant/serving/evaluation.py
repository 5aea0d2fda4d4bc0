"""What a student folder is worth: retrieval, zero-shot accuracy, retention, size and speed, as users will get
them (onnxruntime, one machine).

`KEYS` documents the JSON; keys are stable.
"""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from dclip_qdrant import metrics
from dclip_qdrant.pairs import Pairs, load_image
from dclip_qdrant.pairs.labelled import Labelled
from dclip_qdrant.pairs.splits import pick_split
from dclip_qdrant.serving.index_recall import KEYS as INDEX_KEYS
from dclip_qdrant.serving.student import Student
from dclip_qdrant.tables.student_folder import MANIFEST

KEYS = {
    "student": "the student's versioned name",
    "split": "the split that was measured",
    "t2i": "text to image, over captions: r@1, r@5, r@10, mrr, map (one right picture: map is mrr)",
    "i2t": (
        "image to text, over pictures: r@k by the best-ranked own caption, mrr likewise, map "
        "over all own captions"
    ),
    "mrr": "mean of both directions; what DCLIP's code calls MAP",
    "map": "mean of both directions' mean average precision",
    "mean_r@1": "mean of both directions' r@1",
    "n_images": "pictures measured",
    "n_texts": "captions measured",
    "ci": "95% bootstrap intervals over pictures, in the same shape",
    "zero_shot": "top-1 accuracy on the labelled pictures, or null",
    "retention": "zero_shot over the base's on the same pictures, or null",
    "n_labelled": "labelled pictures measured",
    "parameters": "image and text tower",
    "onnx_bytes": "image.onnx and text.onnx",
    "ms_per_image": "tower alone, batches of 32, median",
    "ms_per_text": "tokens and tower, one text at a time, median",
}
THROUGH = {  # besides, with --through
    "index": "a row for each index setting: " + "; ".join(f"{k}: {v}" for k, v in INDEX_KEYS.items()),
    "index_beside": "with `beside`: the other student and its rows",
}


def evaluate(
    student: Student,
    pairs: Pairs,
    *,
    split: str | None = None,
    labelled: str | None = None,
    base: Student | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    speed: bool = True,
) -> dict[str, Any]:
    """All figures of `KEYS`. Retention needs `labelled` and the base as a student folder; `find_base` knows
    where distill puts it."""
    split = pick_split(pairs, split)
    image, text, owner, captions = embed(student, pairs, split)
    out: dict[str, Any] = {"student": student.model_name, "split": split}
    out |= metrics.retrieval(metrics.ranks(image, text, owner), bootstrap=bootstrap, seed=seed)
    out |= {"zero_shot": None, "retention": None, "n_labelled": 0}
    if labelled:
        data = Labelled.open(labelled)
        out["zero_shot"], out["n_labelled"] = accuracy(student, data), len(data)
        if base is not None:
            out["retention"] = out["zero_shot"] / max(accuracy(base, data), 1e-9)
    out["parameters"] = student.manifest["parameters"]
    out["onnx_bytes"] = {t: (student.folder / f"{t}.onnx").stat().st_size for t in ("image", "text")}
    if speed:
        out |= latency(student, captions)
    return out


def embed(student: Student, pairs: Pairs, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """A split's image [N, D] and text [M, D] unit rows, the picture of each caption [M], and the captions."""
    captions: list[str] = []
    owner: list[int] = []
    vectors, number = [], 0
    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        for rows in pairs.rows(["key", "uri", "image", "captions"], (split,), batch=64):
            vectors.append(
                student.embed_pixels(pool.map(lambda r: student.preprocess.pixels(load_image(r)), rows))
            )
            for r in rows:
                owner += [number] * len(r["captions"])
                captions += r["captions"]
                number += 1
    return np.concatenate(vectors), student.embed_texts(captions), np.array(owner), captions


def accuracy(student: Student, data: Labelled) -> float:
    """Zero-shot top-1 on labelled pictures."""
    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        image = student.embed_pixels(
            pool.map(lambda i: student.preprocess.pixels(data.load(i)), range(len(data)))
        )
    return metrics.zero_shot(image, np.array(data.labels), student.embed_texts(data.prompts))


def find_base(student: Student) -> Student | None:
    """The base that distill exported beside the student, if it is still there and still the same."""
    remembered = json.loads((student.folder / "metrics.json").read_text()).get("base_student")
    folder = student.folder / remembered["folder"] if remembered else None
    if folder is None or not (folder / MANIFEST).is_file():
        return None
    base = Student.load(folder)
    return base if base.fingerprint == remembered["fingerprint"] else None


def latency(student: Student, texts: list[str]) -> dict[str, float]:
    """Median milliseconds an image (tower alone, batch 32) and a text (one at a time)."""
    pixels = list(
        np.random.default_rng(0).integers(
            0, 256, (32, student.preprocess.size, student.preprocess.size, 3), dtype=np.uint8
        )
    )

    def median(f: Any, n: int) -> float:
        f()
        times = []
        for _ in range(n):
            began = time.perf_counter()
            f()
            times.append(time.perf_counter() - began)
        return float(np.median(times)) * 1000

    some = iter(texts * (1 + 60 // max(1, len(texts))))
    return {
        "ms_per_image": median(lambda: student.embed_pixels(pixels), 5) / 32,
        "ms_per_text": median(lambda: student.embed_texts([next(some)]), 50),
    }


def describe(result: dict[str, Any]) -> str:
    """One evaluation for a person."""
    ci = result.get("ci", {})
    lines = [
        f"{result['student']} on {result['split']}: {result['n_images']:,} pictures, "
        f"{result['n_texts']:,} captions"
    ]
    for way, name in (("t2i", "text -> image"), ("i2t", "image -> text")):
        cells = [
            f"R@{k} {result[way][f'r@{k}'] * 100:5.1f}"
            + (" [{:.1f}, {:.1f}]".format(*(100 * v for v in ci[way][f"r@{k}"])) if ci else "")
            for k in metrics.KS
        ]
        lines.append(f"  {name}   " + "   ".join(cells) + f"   mAP {result[way]['map'] * 100:.1f}")
    lines.append(f"  MRR {result['mrr'] * 100:.1f}   mAP {result['map'] * 100:.1f}")
    if result["zero_shot"] is not None:
        kept = (
            f"{result['retention']:.3f} of the base's"
            if result["retention"] is not None
            else "no base student was given"
        )
        lines.append(
            f"  zero-shot {result['zero_shot'] * 100:.1f}% of {result['n_labelled']:,} pictures ({kept})"
        )
    if "ms_per_image" in result:
        p, b = result["parameters"], result["onnx_bytes"]
        lines.append(
            f"  {p['image'] / 1e6:.1f} + {p['text'] / 1e6:.1f} M parameters, "
            f"{b['image'] / 1e6:.1f} + {b['text'] / 1e6:.1f} MB ONNX, "
            f"{result['ms_per_image']:.1f} ms an image, {result['ms_per_text']:.1f} ms a text"
        )
    return "\n".join(lines)
