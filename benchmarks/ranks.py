"""A student's step over 1, 2, 4, 8 gloo ranks at one global batch: seconds, memory of a rank, and the part of
the ideal speed (one rank's time over the ranks, as far as there are cores).

    python benchmarks/ranks.py [--train full|proj] [--batch 256] [--ranks 1 --ranks 2]
    python benchmarks/ranks.py --losses     # InfoNCE over batches up to 32,768, in memory and in blocks

Synthetic pictures of 64 x 64 and a random MobileNet; one thread a rank.
"""

import argparse
import os
import resource
import socket
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from memory import TRUNK, WIDTH, write_model
from PIL import Image

from dclip_qdrant.recipe import Recipe
from dclip_qdrant.training import contrast
from dclip_qdrant.training.data import Cache
from dclip_qdrant.training.distributed import Comm
from dclip_qdrant.training.encoded import Encoded
from dclip_qdrant.training.loop import gradients
from dclip_qdrant.training.models import two_tower
from dclip_qdrant.training.objectives.info_nce import InfoNce
from dclip_qdrant.training.student_task import StudentTask

STEPS = 6  # timed, behind two that warm up


class Noise:
    def load(self, i: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def task_of(model: str, pictures: int, train: str) -> StudentTask:
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32).astype(np.float16)
    cache = Cache(
        keys=[str(i) for i in range(pictures)],
        crop=np.tile(np.array([0, 0, 1, 1], np.float32), (pictures, 1, 1)),
        flip=np.zeros((pictures, 1), bool),
        trunk=draw(pictures, 1, TRUNK if train == "proj" else 0),
        image=draw(pictures, 1, WIDTH),
        texts=draw(pictures, WIDTH),
        first=np.arange(pictures + 1),
    )
    captions = [[f"picture number {i}"] for i in range(pictures)]
    recipe = Recipe.load("sft", [f"student.train={train}", "train.captions=1"])
    return StudentTask(two_tower.load(model), recipe, Noise(), captions, cache, seed=0, same_base=True)


def rank_of(rank: int, world: int, port: int, model: str, batch: int, train: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    comm, task = Comm.current(), task_of(model, batch, train)
    own = task.batch(np.arange(batch)[rank::world], 0)
    optimizer, times = torch.optim.AdamW(task.groups()), []
    for _ in range(STEPS + 2):
        comm.barrier()
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        gradients(task, own, batch // world, batch, comm, "cpu")
        comm.sum_gradients([p for p in task.modules.parameters() if p.requires_grad])
        optimizer.step()
        times.append(time.perf_counter() - began)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    np.savetxt(f"{out}/{rank}", [float(np.median(times[2:])), memory])
    torch.distributed.destroy_process_group()


def scaling(ranks: list[int], batch: int, train: str) -> None:
    cores, alone = os.cpu_count() or 1, 0.0
    with tempfile.TemporaryDirectory() as root:
        model = write_model(Path(root) / "model")
        print(f"| ranks | s a step | MB a rank | of ideal on {cores} cores |\n|---|---|---|---|")
        for world in ranks:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = s.getsockname()[1]
            mp.spawn(rank_of, (world, port, model, batch, train, root), nprocs=world)
            seconds, memory = np.max([np.loadtxt(f"{root}/{rank}") for rank in range(world)], axis=0)
            alone = alone or seconds * min(world, cores)
            ideal = alone / min(world, cores)
            print(f"| {world} | {seconds:.2f} | {memory / 1e6:,.0f} | {ideal / seconds:.2f} |", flush=True)


def one_loss(batch: int, whole: bool, width: int) -> None:
    if whole:
        contrast.WHOLE = 1 << 62
    else:
        contrast.WHOLE = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    image, text = torch.randn(2, batch, width).requires_grad_().unbind(0)
    encoded = Encoded(image, text, torch.arange(batch), torch.ones(()))
    began = time.perf_counter()
    InfoNce(student_dim=width, teacher_dim=width)(encoded, encoded).backward()
    seconds = time.perf_counter() - began
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(f"| {batch:,} | {'whole' if whole else 'blocks'} | {more / 1e6:,.0f} | {seconds:.1f} |", flush=True)


def losses() -> None:
    print("| batch | logits | MB | s |\n|---|---|---|---|", flush=True)
    for batch in (4096, 8192, 16384, 32768):
        for whole in (True, False):
            if whole and batch > 16384:
                continue  # five matrices of 4.3 GB
            process = mp.get_context("spawn").Process(target=one_loss, args=(batch, whole, 512))
            process.start()
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", default="full", choices=["full", "proj"])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--ranks", type=int, action="append")
    parser.add_argument("--losses", action="store_true")
    args = parser.parse_args()
    if args.losses:
        losses()
    else:
        scaling(args.ranks or [1, 2, 4, 8], args.batch, args.train)


if __name__ == "__main__":
    main()
