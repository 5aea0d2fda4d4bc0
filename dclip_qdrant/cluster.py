"""Ray, as our jobs use it: connect, know how much there is, map an actor pool over pairs, and get our own errors back out."""

import os
import socket
import time
from collections.abc import Callable
from typing import Any

from upath import UPath

from dclip_qdrant.contracts import Contract
from dclip_qdrant.errors import DclipError, UsageError
from dclip_qdrant.lookup import need
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.stages import done_keys

# What CPU workers want in their environment; benchmarks/cpu.py measures both. Read when a process starts: workers of a private cluster inherit it, a cluster's own
# have it from `ray start`. Not a runtime_env: with one of those no worker that is there already is used, and each task waits for a new one.
# glibc gives large blocks back to the system at once and gets them anew for every layer; told to keep them, the same CPU ran a MobileNet 3.7 times as fast
# (it is torch's own advice to use an allocator that keeps them).
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "67108864"}
# An OpenMP thread without work turns in a loop for a while before it sleeps, and keeps a core from whoever has work. With this two processes of all cores each ran
# 2.2 times as fast (MobileNet) to 7 times (small transformers, which have more to wait for); alone it costs nothing to 5%. (GNU's OpenMP, which torch's wheels have.)
SLEEP_SOON = {"GOMP_SPINCOUNT": "10000"}
CPU_SETTINGS = KEEP_MEMORY | SLEEP_SOON
READ_COLUMNS = ["key", "uri", "image", "width", "height", "captions", "split"]


def connect() -> None:
    """Joins the cluster of the job (or RAY_ADDRESS), else starts a private one on this machine."""
    need("ray", "this job")
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    if os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        ray.init(log_to_driver=True)
    else:
        for name, value in CPU_SETTINGS.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a private cluster on loopback, gone with this process
        # the dashboard, on a port of its own: without it Ray Train's controller complains every second
        ray.init(
            address="local",
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=free_port(),
            num_cpus=max(4, os.cpu_count() or 1),
            object_store_memory=1 << 30,
            log_to_driver=True,
        )


def free_port() -> int:
    """A port of loopback that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def cpus() -> int:
    import ray

    return int(ray.cluster_resources().get("CPU", 1))


def gpus() -> int:
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def pool_size(wanted: int | None) -> int:
    """How many actors: what was asked for, or one for every two CPUs (the models use threads themselves), or one a GPU.

    Raises:
        UsageError: more than the cluster has beside the one CPU that reading needs; Ray would wait for ever.
    """
    have = cpus()
    if wanted is None:
        return max(1, gpus() or have // 4)
    if wanted > max(1, have - 1):
        raise UsageError("--actors", f"{wanted} on a cluster of {have} CPUs", f"at most {max(1, have - 1)}: reading needs a CPU too")
    return wanted


def absolute(path: str | None, flag: str) -> str | None:
    """The path as every worker will find it. A job submitted with --working-dir runs in an uploaded copy: a relative path would point into that.

    Raises:
        UsageError: a relative path inside such a copy.
    """
    if path is None or "://" in path or os.path.isabs(path):
        return path
    if "runtime_resources" in os.getcwd():
        raise UsageError(
            flag,
            f"the relative path {path!r} in a submitted job (it would point into the uploaded copy of your folder)",
            "an absolute path or a URI",
        )
    return os.path.abspath(path)


def model(name: str, flag: str) -> str:
    """A model's name as it is; a folder as every worker will find it. Workers have another current folder than the job: `examples/base` would not be there."""
    return absolute(name, flag) if name.startswith(".") or "\\" in name or os.path.isdir(name) else name


def threads_for(actors: int) -> int:
    """Compute threads of each actor on one machine."""
    return max(1, (os.cpu_count() or 1) // max(1, actors))


def map_pairs(
    pairs: Pairs,
    actor: type,
    kwargs: dict[str, Any],
    *,
    out: UPath,
    contract: Contract,
    actors: int | None,
    batch: int,
    say: Callable[[str], None],
    columns: list[str] | None = None,
) -> int:
    """Maps an actor pool over the pairs whose keys `out` doesn't have yet; how many it did.

    Actors write their own parts (whole files, named by their keys), so a killed job loses at most the batches in flight.
    """
    import pyarrow as pa
    import ray

    have = done_keys(out, contract)
    total = sum(pairs.splits().values())
    todo = total - len(have)
    if todo <= 0:
        return 0
    if have:
        say(f"{len(have):,} of {total:,} pictures are there already, {todo:,} to do")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # Ray 2.60's new reader makes one block of all files, so that the first actor waits for all of them, and its listing may end with a traceback (a race of its threads)
    context.use_datasource_v2 = False
    size = pool_size(actors)
    ds = ray.data.read_parquet([str(f) for f in pairs.files], columns=columns or READ_COLUMNS)
    if have:
        keys = ray.put(have)

        def fresh(table: pa.Table) -> pa.Table:
            known = ray.get(keys)
            return table.filter(pa.array([k not in known for k in table["key"].to_pylist()], pa.bool_()))

        ds = ds.map_batches(fresh, batch_format="pyarrow", zero_copy_batch=True)
    # small blocks: all actors have work and progress shows
    ds = ds.repartition(target_num_rows_per_block=max(batch, min(256, todo // (4 * size))))
    ds = ds.map_batches(
        actor, fn_constructor_kwargs={**kwargs, "out": str(out), "threads": threads_for(size)}, batch_format="pyarrow", batch_size=batch, num_cpus=1,
        num_gpus=1 if gpus() else None, compute=ray.data.ActorPoolStrategy(size=size),
    )  # fmt: skip
    did, began, said = 0, time.monotonic(), time.monotonic()
    for part in ds.iter_batches(batch_size=None, batch_format="pyarrow"):
        did += sum(part["done"].to_pylist())
        if time.monotonic() - said > 10:
            said = time.monotonic()
            say(f"{did:,} of {todo:,} pictures ({did / (said - began):.0f}/s)")
    return did


def once(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """f(*args, say=…, device=…, **kwargs) as one Ray task, on a GPU where the cluster has one; its lines come out as they are said."""
    connect()
    import ray

    @ray.remote(num_cpus=1, num_gpus=1 if gpus() else 0, max_retries=3)
    def task() -> Any:
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
        return f(*args, say=lambda line: print(line, flush=True), device="cuda" if torch.cuda.is_available() else "cpu", **kwargs)

    return ray.get(task.remote())


def ours(error: BaseException) -> DclipError | None:
    """The DclipError inside what Ray raised, if there is one: workers' errors come wrapped several deep."""
    seen: set[int] = set()
    todo: list[Any] = [error]
    while todo:
        e = todo.pop()
        if e is None or id(e) in seen:
            continue
        seen.add(id(e))
        if isinstance(e, DclipError):
            return e
        todo += [getattr(e, name, None) for name in ("cause", "__cause__", "__context__")]
        if isinstance(getattr(e, "worker_failures", None), dict):
            todo += list(e.worker_failures.values())
    return None
