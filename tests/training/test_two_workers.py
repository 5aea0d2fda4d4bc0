"""Every objective, by name, over two gloo workers: the same loss and the same gradient as plain torch gives
over the whole batch."""

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from ray_head import free_ports
from torch import nn

from dclip_qdrant.lookup import names
from dclip_qdrant.training.distributed import Comm
from dclip_qdrant.training.encoded import Encoded
from dclip_qdrant.training.loop import gradients
from dclip_qdrant.training.objectives import build

pytestmark = pytest.mark.slow
ALL = [n for n in names("objectives") if n != "__init__"]
N, C, D, TEACHER = 12, 2, 6, 5  # pictures, captions a picture, the student's width, the teacher's
# what an objective compares component by component, so that widths must agree
SAME_WIDTH = {"targeted_tokens", "random_alignment"}
KINDS = ("regions", "rois", "words", "spans")  # beside image and text


class Everything:
    """One linear layer for each kind of vector that an objective may read; the batch's order is (picture,
    caption)."""

    def __init__(self, name):
        torch.manual_seed(0)
        self.modules = nn.ModuleDict({k: nn.Linear(D, D) for k in ("image", "text", *KINDS)})
        self.teacher = D if name in SAME_WIDTH else TEACHER
        self.objectives = build(name, student_dim=D, teacher_dim=self.teacher)
        g = torch.Generator().manual_seed(1)
        draw = lambda *shape: torch.randn(*shape, generator=g)
        shapes = {
            "image": (N,),
            "text": (N, C),
            "regions": (N,),
            "rois": (N, 3),
            "words": (N, C, 4),
            "spans": (N,),
        }
        self.x = {k: draw(*s, D) for k, s in shapes.items()}
        self.t = {k: draw(*s, D if k in KINDS else self.teacher) for k, s in shapes.items()}
        self.t["noise"] = draw(N, C, D)
        self.masks = {
            "roi_mask": torch.arange(N * 3).reshape(N, 3) % 3 < 2,
            "word_mask": torch.arange(N * C * 4).reshape(N, C, 4) % 5 < 4,
        }

    def part(self, batch, start, stop):
        return batch[start:stop]

    def encode(self, part):
        return {k: layer(_rows(self.x[k][part], k)) for k, layer in self.modules.items()}

    def fixed(self, batch):
        return {k: _rows(v[batch], k) for k, v in (self.t | self.masks).items()}

    def loss(self, live, fixed):
        owner = torch.arange(len(live["image"])).repeat_interleave(C)
        masks = {k: fixed[k].bool() for k in self.masks}
        more = lambda v: {k: v[k] for k in KINDS}
        student = Encoded(
            live["image"],
            live["text"],
            owner,
            torch.tensor(20.0),
            noise=fixed["noise"],
            **masks,
            **more(live),
        )
        other = Encoded(fixed["image"].flip(1), fixed["text"].flip(1), owner, torch.tensor(20.0))
        teacher = Encoded(
            fixed["image"], fixed["text"], owner, torch.tensor(20.0), others=(other,), **more(fixed)
        )
        return self.objectives(student, teacher), {}

    def grads(self):
        return {
            n: p.grad.clone()
            for where in (self.modules, self.objectives)
            for n, p in where.named_parameters()
            if p.grad is not None
        }


def _rows(x, kind):
    """[n, C, ...] -> [n * C, ...] for what there is once a caption."""
    return x.flatten(0, 1) if kind in ("text", "words", "word_mask", "noise") else x


def _worker(rank, port, out):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results = {}
    for name in ALL:
        for chunk in (N, 2):
            task, comm = Everything(name), Comm.current()
            mine = np.arange(N)[rank::2]
            value, _ = gradients(task, mine, len(mine), chunk, comm, "cpu")
            comm.sum_gradients(task.modules.parameters())
            comm.mean_gradients(task.objectives.parameters())
            results[f"{name} {chunk}"] = (value, task.grads())
    torch.save(results, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    (port,) = free_ports(1)
    out = tmp_path_factory.mktemp("gloo")
    mp.spawn(_worker, (port, str(out)), nprocs=2)
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("chunk", [N, 2])
def test_two_workers_give_the_whole_batchs_loss_and_gradient(name, chunk, two_workers):
    alone = Everything(name)
    index = np.concatenate([np.arange(N)[0::2], np.arange(N)[1::2]])  # parts are gathered rank by rank
    loss, _ = alone.loss(alone.encode(index), alone.fixed(index))
    loss.backward()
    wanted = {n: g for n, g in alone.grads().items() if g.abs().sum() > 0}
    assert wanted
    for rank in two_workers:
        value, got = rank[f"{name} {chunk}"]
        # a divergence near zero is a difference of numbers near one
        assert value == pytest.approx(loss.item(), rel=1e-5, abs=5e-8)
        for n, g in wanted.items():
            torch.testing.assert_close(got[n], g, atol=1e-6, rtol=1e-4)
