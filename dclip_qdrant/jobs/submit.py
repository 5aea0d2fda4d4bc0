"""A command of ours as a job of a Ray cluster that is there already, its output followed here."""

import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dclip_qdrant.errors import UsageError
from dclip_qdrant.lookup import need

logger = logging.getLogger(__name__)

POLL = 2.0  # seconds
EXCLUDED = [".venv", ".git", "demo", "node_modules"]  # of a checkout that travels


@contextmanager
def _this_address_alone() -> Iterator[None]:
    """Without the variables that Ray prefers to the address it is given: the job would run elsewhere."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def submit(address: str, arguments: Sequence[str]) -> int:
    """Submits `dclip-qdrant ARGUMENTS` with this very package, follows its log, and returns its exit code.

    Raises:
        UsageError: no cluster answers there, or a secret is among the arguments.
    """
    if any(argument.split("=")[0] == "--api-key" for argument in arguments):
        came = "a key on a job's command line, which the dashboard shows"
        raise UsageError("`api_key`", came, do="QDRANT_API_KEY in the cluster's environment")
    need("ray", "a submitted job")
    from ray.job_submission import JobStatus, JobSubmissionClient

    package = Path(__file__).parent.parent
    in_checkout = (package.parent / "pyproject.toml").is_file()
    carried = {"working_dir": str(package.parent)} if in_checkout else {"py_modules": [str(package)]}
    try:
        with _this_address_alone():
            client = JobSubmissionClient(address)
        job = client.submit_job(
            entrypoint=shlex.join(["python", "-m", "dclip_qdrant.cli", *arguments]),
            runtime_env={**carried, "excludes": EXCLUDED},
        )
    except (ConnectionError, RuntimeError) as e:
        came = f"{address}: {str(e).splitlines()[0][:200]}"
        raise UsageError("`submit_to`", came, "the address of a Ray cluster's dashboard") from e
    logger.info("%s runs at %s; to stop it: ray job stop --address %s %s", job, address, address, job)
    printed = 0
    while True:
        status = client.get_job_status(job)
        log = client.get_job_logs(job)
        sys.stdout.write(log[printed:])
        sys.stdout.flush()
        printed = len(log)
        if status.is_terminal():
            code = client.get_job_info(job).driver_exit_code
            return code if code is not None else int(status != JobStatus.SUCCEEDED)
        time.sleep(POLL)
