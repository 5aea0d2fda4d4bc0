"""The commands of documentation pages."""

import re
import shlex
import signal
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

from processes import STOP_S, started, wait_until
from ray_head import free_ports

OURS = re.compile(r"^(PICTURES|BASE)=")  # the test's own pictures and base stand there
SETUP = re.compile(r"^(make|pip) ")  # what set the tests up


def commands(page: Path) -> list[str]:
    """The lines of a page's shell blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.strip() and not OURS.match(line) and not SETUP.match(line)]


def check_serving(line: str, env: dict[str, str], folder: Path) -> None:
    """The line starts a server that gives the search page, and that ends well when it is asked to."""
    (port,) = free_ports(1)
    log = folder / "serve.log"

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
                return b"<html" in answer.read()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    env = env | {"DCLIP_SERVE_PORT": str(port)}
    with (
        log.open("w") as sink,
        started(shlex.split(line), env=env, cwd=folder, stdout=sink, stderr=subprocess.STDOUT) as process,
    ):
        wait_until(answers, process, log=log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_S) == 0, log.read_text()
