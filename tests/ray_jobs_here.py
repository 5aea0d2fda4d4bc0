"""Jobs as a user runs them: the scripts in `ray_jobs`."""

import os
import sys
from pathlib import Path

from processes import python

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")  # somebody's own cluster
ENV = {
    **{name: value for name, value in os.environ.items() if name not in ELSEWHERE},
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "YOLO_OFFLINE": "true",
    # Ray Train looks at its workers every two seconds otherwise: our runs are as short as that
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # as private clusters have it
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    "RAY_worker_niceness": "0",  # of the head too, as private clusters have it
}


def job(name, *args, env=ENV):
    return python(f"ray_jobs/{name}.py", *args, cwd=ROOT, env=env)
