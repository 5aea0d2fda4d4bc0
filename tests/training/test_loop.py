"""The training loop: gradient caching, two workers, resuming, learning-rate schedule; against plain torch."""

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from ray_head import free_ports
from torch import nn
from upath import UPath

from dclip_qdrant.errors import DclipError
from dclip_qdrant.training.checkpoint import Checkpoints
from dclip_qdrant.training.distributed import Comm
from dclip_qdrant.training.encoded import Encoded
from dclip_qdrant.training.loop import fit, gradients, rate
from dclip_qdrant.training.objectives.cosine import Cosine
from dclip_qdrant.training.objectives.info_nce import InfoNce
from dclip_qdrant.training.reading import order

N, D = 24, 6


class Toy:
    """Two linear towers, InfoNCE plus a cosine term with a learned projection."""

    size = N

    def __init__(self):
        torch.manual_seed(0)
        self.modules = nn.ModuleDict({"image": nn.Linear(D, D), "text": nn.Linear(D, D)})
        self.objectives = nn.ModuleList(
            [InfoNce(student_dim=D, teacher_dim=D), Cosine(student_dim=D, teacher_dim=4)]
        )
        g = torch.Generator().manual_seed(1)
        self.x, self.y, self.t = (torch.randn(N, w, generator=g) for w in (D, D, 4))

    def groups(self):
        return [{"params": list(self.modules.parameters()), "lr": 1e-2, "weight_decay": 0.0}]

    def begin(self, epoch):
        pass

    def batch(self, index, epoch):
        return self.x[index], self.y[index], self.t[index]

    def part(self, batch, start, stop):
        return tuple(v[start:stop] for v in batch)

    def encode(self, part):
        return {"image": self.modules["image"](part[0]), "text": self.modules["text"](part[1])}

    def fixed(self, batch):
        return {"image": batch[2]}

    def loss(self, live, fixed):
        n = len(live["image"])
        s = Encoded(live["image"], live["text"], torch.arange(n), torch.tensor(20.0))
        return self.objectives[0](s, s) + 3 * self.objectives[1](
            s, s.with_vectors(fixed["image"], live["text"])
        ), {}


def grads(task):
    return [p.grad.clone() for p in [*task.modules.parameters(), *task.objectives.parameters()]]


def whole_batch(index):
    """Loss and gradients by plain torch: the truth."""
    task = Toy()
    batch = task.batch(index, 0)
    loss, _ = task.loss(task.encode(batch), task.fixed(batch))
    loss.backward()
    return loss.item(), grads(task)


@pytest.mark.parametrize("chunk", [1, 5, 8, 24, 100])
def test_gradient_caching_gives_the_whole_batchs_gradient(chunk):
    index = np.arange(N)
    task = Toy()
    value, _ = gradients(task, task.batch(index, 0), N, chunk, Comm(), "cpu")
    expected, wanted = whole_batch(index)
    assert value == pytest.approx(expected, rel=1e-6)
    for a, b in zip(grads(task), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def _worker(rank, world, chunk, port, out):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    task, comm = Toy(), Comm.current()
    mine = np.arange(N)[rank::world]
    value, _ = gradients(task, task.batch(mine, 0), len(mine), chunk, comm, "cpu")
    comm.sum_gradients(task.modules.parameters())
    comm.mean_gradients(task.objectives.parameters())
    torch.save((value, grads(task)), f"{out}/{rank}.pt")
    fitted = Toy()
    fit(
        fitted,
        epochs=2,
        batch_size=8,
        chunk_size=chunk,
        warmup=0.1,
        schedule="cosine",
        clip_norm=1.0,
        checkpoint_s=1e9,
        seed=0,
        comm=comm,
    )
    torch.save(fitted.modules.state_dict(), f"{out}/fit-{rank}.pt")
    did = []
    answers = comm.spread(list("abcde"), lambda item: did.append(item) or item.upper())
    torch.save((answers, did), f"{out}/spread-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [100, 5])
def test_two_gloo_workers_give_the_single_process_loss_gradient_and_weights(chunk, tmp_path):
    mp.spawn(_worker, (2, chunk, *free_ports(1), str(tmp_path)), nprocs=2)
    # rank-strided parts gathered rank by rank: the loss doesn't care for the order of the batch
    expected, wanted = whole_batch(np.concatenate([np.arange(N)[0::2], np.arange(N)[1::2]]))
    for rank in range(2):
        value, got = torch.load(tmp_path / f"{rank}.pt")
        assert value == pytest.approx(expected, rel=1e-6)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    alone = Toy()
    fit(
        alone,
        epochs=2,
        batch_size=8,
        chunk_size=chunk,
        warmup=0.1,
        schedule="cosine",
        clip_norm=1.0,
        checkpoint_s=1e9,
        seed=0,
    )
    for rank in range(2):
        for name, value in torch.load(tmp_path / f"fit-{rank}.pt").items():
            torch.testing.assert_close(value, alone.modules.state_dict()[name], atol=1e-5, rtol=1e-4)
    # all ranks have every answer, in order, and each did its own share
    shares = [torch.load(tmp_path / f"spread-{rank}.pt") for rank in range(2)]
    assert [answers for answers, _ in shares] == [list("ABCDE")] * 2
    assert [did for _, did in shares] == [list("ace"), list("bd")]


class Killed(Exception):
    pass


class Dies(Toy):
    """Dies once, at its n-th batch."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def encode(self, part):
        self.left -= 1
        if self.left == 0:
            raise Killed
        return super().encode(part)


@pytest.mark.parametrize("at", [2, 4, 8])
@pytest.mark.parametrize("extras", [{}, {"ema": 0.9, "l2_sp": 0.01}])
def test_a_killed_run_resumes_to_the_same_weights_and_history(at, extras, tmp_path):
    options = {
        "epochs": 3,
        "batch_size": 8,
        "chunk_size": 100,
        "warmup": 0.2,
        "schedule": "cosine",
        "clip_norm": 1.0,
        "checkpoint_s": 0.0,
        "seed": 3,
        **extras,
    }
    unbroken = Toy()
    wanted = fit(unbroken, **options)
    points = Checkpoints(UPath(tmp_path))
    with pytest.raises(Killed):
        fit(Dies(at), checkpoints=points, **options)
    resumed = Toy()
    lines = []
    got = fit(resumed, checkpoints=points, log=lines.append, **options)
    assert lines[0].startswith("resumed at epoch")
    for a, b in zip(unbroken.modules.parameters(), resumed.modules.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert [r["loss"] for r in got] == pytest.approx([r["loss"] for r in wanted])


@pytest.mark.parametrize("broken", [b"PK\x03\x04 cut short", bytes(5000), b"garbage" * 99, b"", b"\x80\x04."])
def test_a_broken_checkpoint_is_passed_over_and_said(tmp_path, broken, caplog):
    points = Checkpoints(UPath(tmp_path))
    points.save(1, {"v": torch.tensor(1)})
    (tmp_path / "step-2.pt").write_bytes(broken)
    with caplog.at_level("WARNING", "dclip_qdrant"):
        assert points.load()["v"] == 1
    assert "step-2.pt can't be read" in caplog.text


def test_training_learns():
    task = Toy()
    history = fit(
        task,
        epochs=30,
        batch_size=8,
        chunk_size=8,
        warmup=0.1,
        schedule="cosine",
        clip_norm=None,
        checkpoint_s=1e9,
        seed=0,
    )
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]


def test_a_diverging_run_stops_with_a_word():
    task = Toy()
    task.x[3] = float("nan")
    with pytest.raises(DclipError, match="lower the learning rate"):
        fit(
            task,
            epochs=1,
            batch_size=N,
            chunk_size=N,
            warmup=0.0,
            schedule="constant",
            clip_norm=None,
            checkpoint_s=1e9,
            seed=0,
        )


def test_order_covers_the_epoch_and_follows_from_the_seed():
    a = order(10, 4, seed=1, epoch=0)
    assert a.shape == (2, 4)
    assert len(set(a.ravel())) == 8
    np.testing.assert_array_equal(a, order(10, 4, seed=1, epoch=0))
    assert (order(10, 4, seed=1, epoch=1) != a).any()


def test_rate_by_hand():
    assert rate(0, 100, 0.1, "cosine") == pytest.approx(1 / 11)
    assert rate(10, 100, 0.1, "cosine") == pytest.approx(1.0)
    assert rate(55, 100, 0.1, "cosine") == pytest.approx(0.5)
    assert rate(99, 100, 0.0, "constant") == 1.0


def test_decoded_pixels_are_kept_up_to_the_limit_and_come_in_order():
    from concurrent.futures import ThreadPoolExecutor

    from dclip_qdrant.training.data import Decoded

    made = []

    def call(keys):
        def make(j):
            made.append(keys[j])
            return np.full((2, 2, 3), keys[j], np.uint8)

        return decoded(keys, make)[:, 0, 0, 0].tolist()

    decoded = Decoded(limit=2 * 12, pool=ThreadPoolExecutor(2))  # room for two
    assert call([3, 1, 2]) == [3, 1, 2]
    assert call([2, 1, 3, 3]) == [2, 1, 3, 3]
    assert made.count(3) == made.count(1) == 1  # kept
    assert made.count(2) == 2  # the third had no room
