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
}


def job(name, *args, env=ENV):
    return python(f"ray_jobs/{name}.py", *args, cwd=ROOT, env=env)
