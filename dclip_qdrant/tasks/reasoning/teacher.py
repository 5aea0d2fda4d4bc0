"""What a frozen CLIP says of an example: vectors of picture, crops, sentence and words to distil, and how
sure it is of the right answer."""

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dclip_qdrant import metrics
from dclip_qdrant.pictures import images
from dclip_qdrant.pictures.regions import Regions
from dclip_qdrant.tasks.reasoning.examples import Example
from dclip_qdrant.training.evaluate import encode_texts
from dclip_qdrant.training.loop import Log
from dclip_qdrant.training.models.two_tower import TwoTower

logger = logging.getLogger(__name__)


@dataclass
class Seen:
    """Each picture once: P pictures, R crops each. `number`: a picture's place by its path or bytes."""

    number: dict[str | bytes, int]
    pixels: np.ndarray  # [P, S, S, 3] uint8, the student's
    image: np.ndarray  # [P, D]
    crops: np.ndarray  # [P, R, D]
    boxes: np.ndarray  # [P, R, 4] parts of the square that the student sees
    mask: np.ndarray  # [P, R]


@torch.no_grad()
def look(
    tower: TwoTower,
    pictures: Sequence[str | bytes],
    detector: Any,
    *,
    size: int,
    top_k: int = 4,
    plain: Collection[str | bytes] = (),
    device: str = "cpu",
    log: Log = logger.info,
) -> Seen:
    """Decodes, finds regions and embeds each picture and its crops. `size`: pixels a side of the student's
    input, to which the whole picture is squashed.

    Of `plain` pictures (nothing is learned from them) only the pixels are taken: no regions, vectors of
    zeros.
    """
    squash = replace(tower.preprocess, resize_mode="squash")
    small = replace(squash, size=size)
    known = set(pictures)
    number = {p: i for i, p in enumerate(dict.fromkeys([*pictures, *(p for p in plain if p not in known)]))}
    pixels, whole, crops = (
        [],
        np.zeros((len(number), tower.dim), np.float32),
        [np.zeros((0, tower.dim), np.float32)],
    )
    boxes, mask = np.zeros((len(number), top_k, 4), np.float32), np.zeros((len(number), top_k), bool)
    last_line = time.monotonic()
    for start in range(0, len(number), 64):
        if time.monotonic() - last_line > 10:
            last_line = time.monotonic()
            log(f"the teacher looked at {start:,} of {len(number):,} pictures")
        loaded = [
            images.open_rgb(
                p if isinstance(p, bytes) else images.read(p), p if isinstance(p, str) else "picture"
            )
            for p in list(number)[start : start + 64]
        ]
        pixels += [small.pixels(image) for image in loaded]
        loaded = loaded[: max(0, len(known) - start)]
        if not loaded:
            continue
        every_regions: list[Regions] = [r.top(top_k) for r in detector(loaded)]
        own: list[np.ndarray] = []
        for j, (image, regions) in enumerate(zip(loaded, every_regions, strict=True)):
            n = len(regions)
            boxes[start + j, :n] = regions.boxes / np.array([image.width, image.height] * 2)
            mask[start + j, :n] = True
            own += [squash.pixels(c) for c in regions.crops(image)]
        run = lambda px: np.concatenate(
            [
                tower.encode_image(tower.normalised(torch.from_numpy(np.stack(px[i : i + 64])).to(device)))
                .float()
                .cpu()
                .numpy()
                for i in range(0, len(px), 64)
            ]
        )
        whole[start : start + len(loaded)] = run([tower.preprocess.pixels(i) for i in loaded])
        crops.append(run(own) if own else crops[0])
    vectors = np.zeros((*mask.shape, tower.dim), np.float32)
    vectors[mask] = np.concatenate(crops)
    return Seen(number, np.stack(pixels), whole, vectors, boxes, mask)


def confidences(
    tower: TwoTower, examples: Sequence[Example], seen: Seen, *, batch: int = 256, device: str = "cpu"
) -> np.ndarray:
    """[N] 0..1: how sure CLIP is of the right answer, without training, at its own logit scale. Ours, where
    the paper's text could not be read:

    - choices: the softmax over them of cos(picture, choice) at the right one;
    - otherwise p, the softmax probability of the example's statement among those of `batch` examples in
      order, its own picture given; p where the statement is true, 1 - p where it is false, 1/2 where neither
      is known.
    """
    out = np.zeros(len(examples), np.float32)
    unit, scale = metrics.normalise, tower.logit_scale.item()
    image = unit(seen.image)
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        rows = np.array([seen.number[e.picture] for e in part])
        texts = unit(encode_texts(tower, [e.statement or e.text for e in part], device))
        logits = image[rows] @ texts.T * scale
        p = np.exp(logits - logits.max(1, keepdims=True))
        own = (p / p.sum(1, keepdims=True))[np.arange(len(part)), np.arange(len(part))]
        for j, e in enumerate(part):
            if e.choices:
                score = image[rows[j]] @ unit(encode_texts(tower, list(e.choices), device)).T * scale
                out[start + j] = np.exp(score[e.label] - score.max()) / np.exp(score - score.max()).sum()
            else:
                out[start + j] = 0.5 if e.truth is None else own[j] if e.truth else 1 - own[j]
    return out
