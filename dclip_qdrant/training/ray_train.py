"""Runs on Ray Train workers. Ray restarts killed workers; each run finds its own newest checkpoint, as it does when the whole job is submitted again."""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from dclip_qdrant.cluster import cpus, gpus
from dclip_qdrant.errors import UsageError
from dclip_qdrant.training.runs import Run, Worker


def _work(config: dict[str, Any]) -> None:
    """One worker: every run in order."""
    import ray.train
    import torch

    from dclip_qdrant.training.distributed import Comm

    comm = Comm.current()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // comm.world))
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def say(line: str) -> None:
        if comm.rank == 0:
            sys.stdout.write(line + "\n")  # not print: Ray Train patches that to say everything twice
            sys.stdout.flush()

    worker = Worker(comm, device, say)
    for run in config["runs"]:
        worker.do(Run(**run))
        ray.train.report({"label": Run(**run).label})


def run_all(runs: list[Run], *, workers: int, storage: str, say: Callable[[str], None]) -> None:
    """Does the runs that are not done, on `workers` workers (with a GPU each where the cluster has them).

    Raises:
        UsageError: more workers than the cluster can hold; Ray would wait for ever.
    """
    todo = [r for r in runs if not r.stage.done]
    for r in runs:
        if r not in todo:
            say(f"{r.label}: reused {r.stage.path.name}")
    if not todo:
        return
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    use_gpu = gpus() > 0
    most = gpus() if use_gpu else cpus()
    if workers > most:
        raise UsageError("--workers", f"{workers} on a cluster of {most} {'GPUs' if use_gpu else 'CPUs'}", f"at most {most}")
    trainer = TorchTrainer(
        _work,
        train_loop_config={"runs": [r.as_dict() for r in todo]},
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": 1, **({"GPU": 1} if use_gpu else {})}
        ),
        run_config=RunConfig(name=f"runs-{int(time.time())}", storage_path=storage, failure_config=FailureConfig(max_failures=3)),
    )
    trainer.fit()
