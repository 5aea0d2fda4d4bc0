"""Runs on Ray Train workers, one after another. Ray restarts killed workers; each run finds its own newest
checkpoint, as it does when the whole job is submitted again."""

import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from upath import UPath

from dclip_qdrant import errors
from dclip_qdrant.errors import UsageError
from dclip_qdrant.jobs.cluster import cpus, gpus, own_error
from dclip_qdrant.tables.storage import as_path, write_text
from dclip_qdrant.training.run import Run
from dclip_qdrant.training.streaming import OpenStream
from dclip_qdrant.training.worker import Worker

logger = logging.getLogger(__name__)

# a rank that waits while the first one measures a large test split is not lost; Ray's default is half an hour
GIVE_UP_S = 6 * 3600


def _work(config: dict[str, Any]) -> None:
    """One worker: every run in order."""
    import ray.train
    import torch

    from dclip_qdrant.jobs.stream import name_of, opened
    from dclip_qdrant.training.distributed import Comm

    comm = Comm.current()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // comm.world))
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def log(line: str) -> None:
        if comm.rank == 0:
            sys.stdout.write(line + "\n")  # not print: Ray Train patches that to say everything twice
            sys.stdout.flush()

    # our own lines say how far it is: no account of every model that open_clip opens, nor of Ray's reports
    for name in ("", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)
    complaint = UPath(config["complaint"])
    if complaint.exists():
        return  # Ray starts everything once more after an error; this one would come again

    def open_stream(run: Run) -> OpenStream:
        return lambda: opened(ray.train.get_dataset_shard(name_of(run, comm.rank)))

    worker = Worker(comm, device, log, open_stream)
    try:
        for raw in config["runs"]:
            run = Run(**raw)
            worker.do(run)
            ray.train.report({"label": run.label})
    except Exception as e:
        own = own_error(e)  # one that a task of Ray Data met comes wrapped
        if own is None:
            raise
        write_text(complaint, own.as_json())
        if comm.world > 1:  # else the others would wait for this one; Ray prints what is raised, at length
            raise own from None
    finally:
        worker.close()


def not_done(runs: Sequence[Run]) -> list[Run]:
    """The runs that are still to do; those that are done are named."""
    waiting = [run for run in runs if not run.stage.done]
    for run in runs:
        if run not in waiting:
            logger.info("%s: reused %s", run.label, run.stage.path.name)
    return waiting


def run_in_order(runs: Sequence[Run], *, workers: int, storage: str) -> dict[str, str]:
    """Does the runs that are not done, on `workers` workers (with a GPU each where the cluster has them).

    A run that fails ends the job: nothing is ever left out, so that the answer is always empty.

    Raises:
        UsageError: more workers than the cluster can hold; Ray would wait for ever.
        DclipError: what a run met. It isn't tried again; killed workers are.
    """
    waiting = not_done(runs)
    if not waiting:
        return {}
    from ray.data import ExecutionOptions
    from ray.train import DataConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from dclip_qdrant.jobs.stream import datasets_of

    use_gpu = gpus() > 0
    most, unit = (gpus(), "GPUs") if use_gpu else (cpus(), "CPUs")
    if workers > most:
        raise UsageError("`workers`", f"{workers} on a cluster of {most} {unit}", f"at most {most}")
    streamed = [run for run in waiting if run.streams]
    if streamed and workers >= cpus():
        came = f"{workers} on a cluster of {cpus()} CPUs, with a reader that streams"
        raise UsageError("`workers`", came, f"at most {cpus() - 1}: reading needs a CPU too")
    datasets = {name: make for run in streamed for name, make in datasets_of(run, workers).items()}
    name = f"runs-{time.time_ns()}"
    complaint = as_path(storage) / f"{name}-error.json"
    resources = {"CPU": 1.0} | ({"GPU": 1.0} if use_gpu else {})
    trainer = TorchTrainer(
        _work,
        train_loop_config={"runs": [run.as_dict() for run in waiting], "complaint": str(complaint)},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=resources),
        torch_config=TorchConfig(timeout_s=GIVE_UP_S),
        datasets=datasets,
        # each rank has a dataset of its own, so that which pictures it gets doesn't hang on how fast it is
        dataset_config=DataConfig([], execution_options=ExecutionOptions(preserve_order=True)),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=3),
            logging_config=LoggingConfig(log_level="WARNING"),  # our own lines say how far it is
        ),
    )
    try:
        trainer.fit()
    finally:
        if complaint.exists():
            raise errors.of_json(complaint.read_text()) from None
    return {}
