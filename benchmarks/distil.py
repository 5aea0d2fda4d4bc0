"""Distillation's samples/s over a bare torch step at the same batch, for a student that trains whole:
decoding, drawing, gathering, objectives and checkpoints are what the difference holds.

    python benchmarks/distil.py --pairs PAIRS --base MODEL [--pictures 512] [--batch 64]

The two take turns, so that what else the machine does meets both alike: quote the ratio.
"""

import argparse
import time

import numpy as np
import torch

from dclip_qdrant.pairs import Pairs
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.training.data import Cache, Pictures
from dclip_qdrant.training.encoded import Encoded
from dclip_qdrant.training.loop import fit
from dclip_qdrant.training.models import two_tower
from dclip_qdrant.training.models.two_tower import TwoTower
from dclip_qdrant.training.objectives.info_nce import InfoNce
from dclip_qdrant.training.student_task import StudentTask

ROUNDS = 3


def task_of(model: TwoTower, pairs: Pairs, most: int, batch: int) -> StudentTask:
    """Plain fine-tuning of both towers, nothing cached."""
    pictures = Pictures(pairs, "train")
    captions = pairs.table(["captions"], ("train",))["captions"].to_pylist()[:most]
    pictures.keep(list(range(len(captions))))
    count = len(captions)
    cache = Cache(
        keys=pictures.keys,
        crop=np.tile(np.array([0, 0, 1, 1], np.float32), (count, 1, 1)),
        flip=np.zeros((count, 1), bool),
        trunk=np.zeros((count, 1, 0), np.float16),
        image=np.zeros((count, 1, model.dim), np.float16),
        texts=np.zeros((sum(map(len, captions)), model.dim), np.float16),
        first=np.concatenate([[0], np.cumsum([len(own) for own in captions])]),
    )
    settings = ['student.train="full"', 'student.text="full"', "train.captions=1"]
    recipe = Recipe.load("sft", [*settings, f"train.batch_size={batch}"])
    return StudentTask(model, recipe, pictures, captions, cache, seed=0, same_base=False)


def ours(task: StudentTask, batch: int) -> float:
    """Samples a second of an epoch."""
    began = time.perf_counter()
    fit(
        task,
        epochs=1,
        batch_size=batch,
        chunk_size=batch,
        warmup=0.0,
        schedule="constant",
        clip_norm=1.0,
        checkpoint_s=1e9,
        seed=0,
        log=lambda line: None,
    )
    return task.size // batch * batch / (time.perf_counter() - began)


def bare(task: StudentTask, batch: int) -> float:
    """Samples a second of the same forward, loss, backward and optimizer step on one batch in memory."""
    model, loss_of = task.model, InfoNce(student_dim=0, teacher_dim=0)
    one = task.batch(np.arange(batch), 0)
    optimizer = torch.optim.AdamW(task.groups())
    owner, scale = torch.arange(batch), torch.ones(())
    steps = task.size // batch
    began = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        image = model.encode_image(model.normalised(one.images))
        encoded = Encoded(image, model.encode_text(one.texts.long()), owner, scale)
        loss_of(encoded, encoded).backward()
        optimizer.step()
    return steps * batch / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    model = two_tower.load(args.base)
    task = task_of(model, Pairs.open(args.pairs), args.pictures, args.batch)
    bare(task, args.batch)  # warms up
    rates = np.array([(ours(task, args.batch), bare(task, args.batch)) for _ in range(ROUNDS)])
    for number, (own, plain) in enumerate(rates):
        print(f"round {number + 1}: distil {own:.1f}, bare {plain:.1f} samples/s, ratio {own / plain:.2f}")
    later = rates[1:]  # decoded pictures stay in memory: the first epoch decodes, the later ones don't
    first, others = rates[0, 0] / rates[0, 1], np.median(later[:, 0] / later[:, 1])
    print(f"first epoch {first:.2f}, later epochs {others:.2f}")


if __name__ == "__main__":
    main()
