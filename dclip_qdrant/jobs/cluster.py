"""Ray, as our jobs use it: connect, know how much there is, map an actor pool over pairs, and get our own
errors back out."""

import logging
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from upath import UPath

from dclip_qdrant import errors
from dclip_qdrant.errors import DclipError, InputError, UsageError
from dclip_qdrant.lookup import need
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.progress import duration
from dclip_qdrant.tables.compact import compact
from dclip_qdrant.tables.contracts import Contract
from dclip_qdrant.tables.stages import done_keys

logger = logging.getLogger(__name__)

# What CPU workers want in their environment; benchmarks/cpu.py measures both. Read when a process starts:
# workers of a private cluster inherit it, a cluster's own have it from `ray start`. Not a runtime_env: with
# one of those no worker that is there already is used, and each task waits for a new one.
# glibc gives large blocks back to the system at once and gets them anew for every layer; told to keep them,
# the same CPU ran a MobileNet 2.8 times as fast (it is torch's own advice to use an allocator that keeps
# them). Ray Train and Ray Data run our code in threads, whose blocks glibc takes from small heaps that it
# gives back whatever it was told: only with one arena for all threads does it keep what it has (without, a
# MobileNet that learned spent 40% of its time on page faults).
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "67108864",
}
# An OpenMP thread without work turns in a loop for a while before it sleeps, and keeps a core from whoever
# has work. With this two processes of all cores each ran 2.2 times as fast (MobileNet) to 7 times (small
# transformers, which have more to wait for); alone it costs nothing to 5%. (GNU's OpenMP, in torch's wheels.)
SLEEP_SOON = {"GOMP_SPINCOUNT": "10000"}
CPU_SETTINGS = KEEP_MEMORY | SLEEP_SOON
READ_COLUMNS = ["key", "uri", "image", "width", "height", "captions", "split"]
THREADS_A_DECODER = 2
STARTS = 3  # of a private cluster
# Ray Data's own account of what it does; Ray configures the logger `ray.data` itself anew
QUIET = {"ray.data._internal": logging.WARNING, "ray.data._internal.progress": logging.ERROR}
LOG_EVERY = 10.0  # seconds between lines of progress


def connect(address: str | None = None) -> None:
    """Joins the cluster at `address`, of the job that this runs in, or of RAY_ADDRESS; else starts a private
    one on this machine, which ends with this process."""
    need("ray", "this job")
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "WARNING")  # of the actors that hand out a stream, too
    if address or os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        ray.init(address=address, log_to_driver=True)
        return
    for name, value in CPU_SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a private cluster on loopback
    # Ray gives its workers the priority of a background task: beside other work of the same terminal they
    # waited 8 minutes to start
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")  # the default is one minute
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a short run ends 2 s earlier
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # of nodes that a cloud takes back
    # the dashboard, on a port of its own: without it Ray Train's controller complains every second
    for attempt in range(1, STARTS + 1):
        try:
            with _own_address():
                ray.init(
                    address="local",
                    include_dashboard=True,
                    dashboard_host="127.0.0.1",
                    dashboard_port=free_port(),
                    num_cpus=max(4, os.cpu_count() or 1),
                    object_store_memory=1 << 30,
                    log_to_driver=True,
                )
            return
        except Exception as e:
            folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR")
            if folder and "AF_UNIX" in str(e):  # a socket's path has room for 107 bytes
                came = f"{folder}, too long a path for Ray's sockets"
                raise UsageError("RAY_TMPDIR or TMPDIR", came, "a short one", "RAY_TMPDIR=/tmp") from e
            # Ray gives its own start 30 s, which isn't enough on a busy machine
            if "timed out during startup" not in str(e) or attempt == STARTS:
                raise
            logger.warning("the private cluster did not start in time; once more")
            ray.shutdown()


@contextmanager
def _own_address() -> Iterator[None]:
    """A private cluster that starts in here tells its processes where it is.

    Ray Train asks the cluster whether a run's controller is alive, and looks on the machine for one where it
    isn't told: with somebody's `ray start --head` beside ours it asked that one, heard of no such controller
    and took a living run for dead, whose resources it then gives back; with a second job it ended in a
    traceback.
    """
    port = os.environ.get("RAY_GCS_SERVER_PORT") or str(free_port())
    own = {"RAY_GCS_SERVER_PORT": port, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:  # this process may start another one later
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


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


def check_memory(actors: int, memory: int, parameter: str = "actors") -> None:
    """Raises UsageError: nodes that can't hold so many actors of `memory` bytes each; Ray would wait for
    ever."""
    import ray

    nodes = [node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"]]
    room = sum(int(have // memory) for have in nodes)
    if actors > room:
        have = ", ".join(f"{own / 1e9:.1f}" for own in nodes)
        came = f"{actors}, of {memory / 1e9:.1f} GB each, on nodes with {have} GB"
        raise UsageError(f"`{parameter}`", came, f"at most {room}" if room else "nodes with more memory")


def node_memory() -> float:
    """Bytes of memory of the smallest node, as Ray counts it: what its tasks and its objects may use."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    have = [r.get("memory", 0.0) + r.get("object_store_memory", 0.0) for r in nodes]
    return min(have, default=0.0)


def pool_size(wanted: int | None, parameter: str = "actors") -> int:
    """How many actors: what was asked for, or one for every four CPUs (the models use threads themselves), or
    one a GPU.

    Raises:
        UsageError: more than the cluster has beside the one CPU that reading needs; Ray would wait for ever.
    """
    have = cpus()
    if wanted is None:
        return max(1, gpus() or have // 4)
    most = max(1, have - 1)
    if wanted > most:
        came = f"{wanted} on a cluster of {have} CPUs"
        raise UsageError(f"`{parameter}`", came, f"at most {most}: reading needs a CPU too")
    return wanted


def absolute(path: str, parameter: str) -> str:
    """The path as every worker will find it. A job submitted with --working-dir runs in an uploaded copy: a
    relative path would point into that.

    Raises:
        UsageError: a relative path inside such a copy.
    """
    if "://" in path or os.path.isabs(path):
        return path
    if "runtime_resources" in os.getcwd():
        came = (
            f"the relative path {path!r} in a submitted job (it would point into the uploaded copy of your "
            "folder)"
        )
        raise UsageError(f"`{parameter}`", came, "an absolute path or a URI")
    return os.path.abspath(path)


def absolute_or_none(path: str | None, parameter: str) -> str | None:
    return None if path is None else absolute(path, parameter)


def absolute_model(name: str, parameter: str) -> str:
    """A model's name as it is; a folder as every worker will find it. Workers have another current folder
    than the job: `examples/base` would not be there."""
    is_folder = name.startswith(".") or "\\" in name or os.path.isdir(name)
    return absolute(name, parameter) if is_folder else name


def absolute_weights(name: str | None, parameter: str) -> str | None:
    """A detector's weights: a file as every worker will find it; a name that the detector fetches as it
    is."""
    is_file = name is not None and ("/" in name or os.path.exists(name))
    return absolute_or_none(name, parameter) if is_file else name


def threads_for(actors: int) -> int:
    """Compute threads of each actor on one machine."""
    return max(1, (os.cpu_count() or 1) // max(1, actors))


def actor_threads(threads: int) -> ThreadPoolExecutor:
    """Gives torch so many threads in this process; a pool of as many (two at least) for decoding."""
    import torch

    torch.set_num_threads(threads)
    return ThreadPoolExecutor(max(2, threads))


def log_to_stdout() -> None:
    """In a worker: our own log lines go to its stdout, which Ray forwards to the driver."""
    ours = logging.getLogger("dclip_qdrant")
    if not ours.handlers:
        ours.addHandler(logging.StreamHandler(sys.stdout))
        ours.setLevel(logging.INFO)
        ours.propagate = False


def quiet_data_context() -> Any:
    """Ray Data's context without progress bars; our own lines say how far it is."""
    import ray

    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.issue_detectors_config.detectors = []  # they complain of models that take their time
    return context


class Guarded:
    """An actor of Ray Data whose own errors come back as rows: raised in an actor they would be tried again,
    printed with a hundred lines of Ray, and arrive without what they are."""

    def __init__(self, actor: type, arguments: dict[str, Any]) -> None:
        self.make, self.actor = (lambda: actor(**arguments)), None

    def __call__(self, batch: Any) -> Any:
        import pyarrow as pa

        done, error = 0, ""
        try:
            if self.actor is None:
                self.actor = self.make()
            done = int(np.asarray(self.actor(batch)["done"]).sum())
        except DclipError as e:
            error = e.as_json()
        return pa.table({"done": [done], "error": [error]})


def finished(dataset: Any) -> Iterator[int]:
    """Runs a dataset of `Guarded` actors; how many rows each block did.

    Raises:
        DclipError: the first that an actor met.
    """
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for told in filter(None, block["error"].to_pylist()):
            raise errors.of_json(told)
        yield int(np.asarray(block["done"]).sum())


def map_pairs(
    pairs: Pairs,
    actor: type,
    arguments: dict[str, Any],
    *,
    name: str,
    out: UPath,
    contract: Contract,
    actors: int | None,
    batch: int,
    memory: int,
    columns: list[str] | None = None,
    decode: tuple[type, dict[str, Any]] | None = None,
) -> int:
    """Maps an actor pool over the pairs whose keys `out` doesn't have yet; how many it did. `memory`: bytes
    of an actor, which Ray sets aside. `decode`: a class of CPU actors between the pairs
    and these, and what it is made with.

    Actors write their own parts (whole files, named by their keys), so a killed job loses at most the batches
    in flight.
    """
    import pyarrow as pa
    import ray

    have = done_keys(out, contract)
    total = sum(pairs.splits().values())
    todo = total - len(have)
    if todo <= 0:
        compact(out, contract)
        return 0
    if have:
        there = f"{len(have):,} of {total:,} pictures are there already"
        logger.info("%s: %s, %s to do", name, there, f"{todo:,}")
    context = quiet_data_context()
    # Ray 2.60's new reader makes one block of all files, so that the first actor waits for all of them, and
    # its listing may end with a traceback (a race of its threads)
    context.use_datasource_v2 = False
    size = pool_size(actors)
    check_memory(size, memory)
    # partitioning: columns come from the files alone; Ray would take `split=test` in a path for a column
    dataset = ray.data.read_parquet(
        [str(f) for f in pairs.files], columns=columns or READ_COLUMNS, partitioning=None
    )
    if have:
        keys = ray.put(have)

        def fresh(table: pa.Table) -> pa.Table:
            known = ray.get(keys)
            keep = [key not in known for key in table["key"].to_pylist()]
            return table.filter(pa.array(keep, pa.bool_()))

        dataset = dataset.map_batches(fresh, batch_format="pyarrow", zero_copy_batch=True)
    # small blocks: all actors have work and progress shows
    rows_a_block = max(batch, min(256, todo // (4 * size)))
    dataset = dataset.repartition(target_num_rows_per_block=rows_a_block)
    if decode is not None:
        made_by, with_these = decode
        decoders = max(1, (cpus() - size - 1) // THREADS_A_DECODER)
        dataset = dataset.map_batches(
            made_by,
            fn_constructor_kwargs=with_these | {"threads": THREADS_A_DECODER},
            batch_format="pyarrow",
            batch_size=batch,
            num_cpus=min(THREADS_A_DECODER, max(1, cpus() - size - 1)),
            compute=ray.data.ActorPoolStrategy(size=decoders),
        )
    dataset = dataset.map_batches(
        Guarded,
        fn_constructor_args=(actor, {**arguments, "out": str(out), "threads": threads_for(size)}),
        batch_format="pyarrow",
        batch_size=batch,
        num_cpus=1,
        num_gpus=1 if gpus() else None,
        memory=memory,
        compute=ray.data.ActorPoolStrategy(size=size),
    )
    done, began = 0, time.monotonic()
    last_line = began
    for count in finished(dataset):
        done += count
        now = time.monotonic()
        if now - last_line > LOG_EVERY:
            last_line = now
            speed = done / (now - began)
            left = duration((todo - done) / speed)
            far = f"{done:,} of {todo:,} pictures ({speed:.0f}/s, {left} left)"
            logger.info("%s: %s", name, far)
    if done != todo:
        came = f"{done:,} of {todo:,} pictures came out of this stage"
        raise InputError(
            name, came, "all of them", "submit it again; if that doesn't help, make the pairs again"
        )
    compact(out, contract)
    return done


def as_one_task(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """function(*args, device=…, **kwargs) as one Ray task, on a GPU where the cluster has one; its log lines
    come out as they are made."""
    connect()
    import ray

    @ray.remote(num_cpus=1, num_gpus=1 if gpus() else 0, max_retries=3)
    def task() -> Any:
        import torch

        log_to_stdout()
        torch.set_num_threads(os.cpu_count() or 1)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return function(*args, device=device, **kwargs)

    return ray.get(task.remote())


def own_error(error: BaseException) -> DclipError | None:
    """The DclipError inside what Ray raised, if there is one: workers' errors come wrapped several deep."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        e = waiting.pop()
        if e is None or id(e) in seen:
            continue
        seen.add(id(e))
        inside = getattr(e, "cause", None)
        # what a task raised is of its own class and of Ray's at once, and prints as Ray's: with its traceback
        if isinstance(e, DclipError):
            if not isinstance(inside, DclipError):
                return e
            inside.names = inside.names or e.names
        waiting += [getattr(e, name, None) for name in ("cause", "__cause__", "__context__")]
        failures = getattr(e, "worker_failures", None)
        if isinstance(failures, dict):
            waiting += list(failures.values())
        told = re.findall(r"^dclip_qdrant\.errors\.(\w+): (.+)$", str(getattr(e, "traceback_str", "")), re.M)
        if told:  # what is left of an error that Ray wrapped twice
            kind, line = told[-1]
            return errors.named(kind).of_line(line)
    return None
