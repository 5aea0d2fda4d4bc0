"""The training loop: plain torch. A reader says which pictures come, a task what a batch of them is and what
its loss is; the loop steps, gathers, caches gradients and resumes.

Every draw (caption, view) follows from (seed, epoch, picture), never from a running generator.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dclip_qdrant.errors import DclipError
from dclip_qdrant.progress import duration
from dclip_qdrant.training.checkpoint import Checkpoints
from dclip_qdrant.training.distributed import Comm
from dclip_qdrant.training.reading import Drawn, InMemory, Reader

logger = logging.getLogger(__name__)

Log = Callable[[str], None]  # takes a line for people
Vectors = dict[str, Tensor]  # name -> [B, D] or [B * C, D]; rows of the batch in order


class Task(Protocol):
    """What a run trains."""

    size: int  # pictures
    modules: Any  # the nn.Module that learns behind `encode`
    objectives: Any  # the nn.Module that learns behind `loss`

    def groups(self) -> list[dict[str, Any]]: ...  # optimizer groups: params, lr, weight_decay

    def begin(self, epoch: int) -> None: ...  # before an epoch's first step: lets towers learn or rest

    def batch(self, drawn: Any, epoch: int) -> Any: ...  # loaded on another thread; slices with `part`

    def part(self, batch: Any, start: int, stop: int) -> Any: ...

    def encode(self, part: Any) -> Vectors: ...  # with gradient

    def fixed(self, batch: Any) -> Vectors: ...  # without: the teacher's vectors

    def loss(
        self, live: Vectors, fixed: Vectors
    ) -> tuple[Tensor, dict[str, float]]: ...  # of the whole batch


def fit(
    task: Task,
    *,
    epochs: int,
    batch_size: int,
    chunk_size: int,
    warmup: float,
    schedule: str,
    clip_norm: float | None,
    checkpoint_s: float,
    seed: int,
    reader: Reader | None = None,
    optimizer: str = "adamw",
    l2_sp: float = 0.0,
    ema: float = 0.0,
    comm: Comm | None = None,
    checkpoints: Checkpoints | None = None,
    device: str = "cpu",
    log: Log = logger.info,
    after_epoch: Callable[[int], dict[str, float]] | None = None,
    report: Callable[[list[dict[str, float]]], None] | None = None,
) -> list[dict[str, float]]:
    """Trains to the end, from the newest checkpoint if there is one; the history, one row an epoch.

    `reader`: where batches come from; None: positions in the task's own rows, by `seed`. `report` gets the
    history so far after each epoch, on the first rank.

    Raises:
        DclipError: the loss is no longer finite.
    """
    comm, reader = comm or Comm(), reader or InMemory(task.size, seed)
    batch_size = min(batch_size, reader.size) // comm.world * comm.world
    if batch_size == 0:
        raise ValueError(f"{reader.size} pictures are too few for {comm.world} workers")
    steps = reader.size // batch_size
    towers = [p for p in task.modules.parameters() if p.requires_grad]
    learned = [p for p in task.objectives.parameters() if p.requires_grad]
    groups = task.groups() + (
        [{"params": learned, "lr": max(g["lr"] for g in task.groups()), "weight_decay": 0.0}]
        if learned
        else []
    )
    opt = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer](groups)
    base_lr = [g["lr"] for g in opt.param_groups]
    start_point = [p.detach().clone() for p in towers] if l2_sp else []
    average = [p.detach().clone() for p in towers] if ema else []
    history: list[dict[str, float]] = []
    first_epoch = first_step = 0
    sums: dict[str, float] = {}
    saved = checkpoints.load() if checkpoints else None
    if saved:
        for p, v in zip([*towers, *learned, *average], saved["params"], strict=True):
            p.data.copy_(v)
        opt.load_state_dict(saved["optimizer"])
        first_epoch, first_step, history, sums = (
            saved["epoch"],
            saved["step"],
            saved["history"],
            saved["sums"],
        )
        if first_step and not reader.restore(saved["reader"], comm):
            first_step, sums = 0, {}
            log(f"epoch {first_epoch + 1} begins again: other workers than these {comm.world} had begun it")
        log(f"resumed at epoch {first_epoch + 1}, step {first_step} of {steps}")

    def save(epoch: int, step: int) -> None:
        """All ranks call it; the first one writes."""
        if not checkpoints:
            return
        progress = reader.state(comm) if step else {}
        if comm.rank:
            return
        params = [p.detach().cpu() for p in [*towers, *learned, *average]]
        checkpoints.save(
            epoch * steps + step,
            {
                "params": params,
                "optimizer": opt.state_dict(),
                "epoch": epoch,
                "step": step,
                "history": history,
                "sums": sums,
                "reader": progress,
            },
        )

    started = last_save = last_logged = time.monotonic()
    trained = 0  # steps since then
    with ThreadPoolExecutor(1) as ahead:  # the next batch is read while this one trains
        for epoch in range(first_epoch, epochs):
            began = time.monotonic()
            task.begin(epoch)
            step = first_step
            drawn = reader.batches(epoch, first_step, batch_size, comm)
            coming: Future = ahead.submit(_next, drawn, task, epoch)
            while step < steps:
                batch = coming.result()
                saves = step > first_step and time.monotonic() - last_save > checkpoint_s
                goes_on = batch is not None
                if not reader.even:  # one rank may have no batch left, and all must save together
                    goes_on, saves = comm.agree(goes_on, saves, device)
                if batch is None or not goes_on:
                    break
                if saves:
                    save(epoch, step)
                    last_save = time.monotonic()
                coming = ahead.submit(_next, drawn, task, epoch)
                factor = rate(epoch * steps + step, epochs * steps, warmup, schedule)
                for g, lr in zip(opt.param_groups, base_lr, strict=True):
                    g["lr"] = lr * factor
                opt.zero_grad(set_to_none=True)
                value, terms = gradients(task, batch, batch_size // comm.world, chunk_size, comm, device)
                if not math.isfinite(value):
                    came = f"the loss is {value} at epoch {epoch + 1}, step {step + 1}"
                    raise DclipError("training", came, "a finite number", "lower the learning rate")
                awake = [
                    p for p in towers if p.requires_grad
                ]  # a resting tower has no gradient on any worker, and no momentum moves it
                comm.sum_gradients(awake)
                comm.mean_gradients(learned)
                if clip_norm:
                    nn.utils.clip_grad_norm_([*awake, *learned], clip_norm)
                opt.step()
                with torch.no_grad():
                    if l2_sp:
                        for p, p0 in zip(towers, start_point, strict=True):
                            p.sub_(p - p0, alpha=l2_sp * factor)
                    for a, p in zip(average, towers, strict=True) if ema else ():
                        a.lerp_(p, 1 - ema)
                for k, v in {"loss": value, **terms}.items():
                    sums[k] = sums.get(k, 0.0) + v
                reader.trained()
                step, trained = step + 1, trained + 1
                now = time.monotonic()
                if now - last_logged > 10:
                    left = duration((epochs * steps - epoch * steps - step) * (now - started) / trained)
                    log(f"epoch {epoch + 1}/{epochs} step {step}/{steps} loss {value:.4f} ({left} left)")
                    last_logged = now
            coming.result()
            for _ in drawn:  # what doesn't fill a batch on every rank
                pass
            if step < steps:
                log(f"epoch {epoch + 1}/{epochs}: {step} of {steps} batches, the rest is left for others")
            seconds = time.monotonic() - began
            row = {k: v / max(1, step) for k, v in sums.items()}
            row |= {"epoch": epoch + 1, "seconds": round(seconds, 2)}
            if after_epoch and comm.rank == 0:
                row |= after_epoch(epoch)
            comm.barrier()
            history.append(row)
            if report and comm.rank == 0:
                report(history)
            sums, first_step = {}, 0
            if epoch + 1 == epochs or time.monotonic() - last_save > checkpoint_s:
                save(epoch + 1, 0)
                last_save = time.monotonic()
            log(
                " ".join(
                    [
                        f"epoch {epoch + 1}/{epochs}",
                        *(f"{k} {v:.4f}" for k, v in row.items() if k not in ("epoch", "seconds")),
                        f"({seconds:.1f} s)",
                    ]
                )
            )
    if ema:
        for p, a in zip(towers, average, strict=True):
            p.data.copy_(a)
    return history


def _next(drawn: Iterator[Drawn], task: Task, epoch: int) -> Any | None:
    """The next batch; None at an epoch's end."""
    read = next(drawn, None)
    return None if read is None else task.batch(read, epoch)


def rate(step: int, total: int, warmup: float, schedule: str) -> float:
    """The learning rate's factor: linear warm-up over that part of all steps, then cosine to 0 or
    constant."""
    rise = warmup * total
    if step < rise:
        return (step + 1) / (rise + 1)
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1.0, total - rise)))


def gradients(
    task: Task, batch: Any, n: int, chunk: int, comm: Comm, device: str
) -> tuple[float, dict[str, float]]:
    """Leaves the batch's gradient in `.grad`; the loss and its terms.

    A part of more than `chunk` pictures is gradient-cached (GradCache, Gao et al. 2021): vectors of all
    chunks without a graph, the loss's gradient with respect to the vectors, then each chunk again with its
    graph. The gradient is the same; memory is one chunk's.
    """
    cast = torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda"))

    def encode(part: Any) -> Vectors:
        with cast:
            return {k: v.float() for k, v in task.encode(part).items()}

    with torch.no_grad(), cast:
        fixed = {k: comm.gather(v.float()) for k, v in task.fixed(batch).items()}
    if n <= chunk:
        loss, terms = task.loss({k: comm.gather(v) for k, v in encode(batch).items()}, fixed)
        loss.backward()
        return loss.item(), terms
    spans = [(s, min(s + chunk, n)) for s in range(0, n, chunk)]
    with torch.no_grad():
        pieces = [encode(task.part(batch, *span)) for span in spans]
    leaves = {k: torch.cat([p[k] for p in pieces]).requires_grad_() for k in pieces[0]}
    loss, terms = task.loss({k: comm.gather(v) for k, v in leaves.items()}, fixed)
    loss.backward()
    at = dict.fromkeys(leaves, 0)
    for span in spans:
        live = encode(task.part(batch, *span))
        out, grads = [], []
        for k, v in live.items():
            grad = leaves[k].grad
            if v.requires_grad and grad is not None:
                out.append(v)
                grads.append(grad[at[k] : at[k] + len(v)])
            at[k] += len(v)
        if out:
            torch.autograd.backward(out, grads)
    return loss.item(), terms
