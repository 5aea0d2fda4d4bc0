"""A Ray head of one's own on loopback: own ports, own folder, own process group; it ends only what it
started."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BIN = Path(sys.executable).parent
START_S = 600  # a head on a busy machine takes minutes
STARTS = 3
STOP_S = 5  # between asking and ending


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class HeadNotStarted(Exception):
    """It ended by itself, or gives no answer."""


class RayHead:
    """`with RayHead(log, env) as head:` submit to `head.address`, or join it with RAY_ADDRESS=`head.gcs`.
    `env`: what the head and its workers run in."""

    def __init__(self, log: Path, env: dict[str, str]) -> None:
        self.path, self.env = log, env

    def __enter__(self) -> "RayHead":
        for attempt in range(1, STARTS + 1):
            try:
                return self._start()
            except HeadNotStarted:  # Ray gives its own start 30 s, which isn't enough on a busy machine
                if attempt == STARTS:
                    sys.exit(f"the Ray head did not start; see {self.path}")
        raise AssertionError("unreachable")

    def _start(self) -> "RayHead":
        gcs, dashboard, agent, grpc, metrics, client = free_ports(6)
        self.address, self.gcs = f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}"
        self.folder = tempfile.mkdtemp(prefix="dclip-ray-")
        flags = {
            "port": gcs,
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": agent,
            "dashboard-agent-grpc-port": grpc,
            "metrics-export-port": metrics,
            "ray-client-server-port": client,
            "num-cpus": max(4, os.cpu_count() or 1),
            "object-store-memory": 1 << 30,
            "temp-dir": self.folder,
            "node-ip-address": "127.0.0.1",
            "dashboard-host": "127.0.0.1",
            "include-dashboard": "true",
        }
        command = [
            str(BIN / "ray"),
            "start",
            "--head",
            "--block",
            "--disable-usage-stats",
            *(f"--{k}={v}" for k, v in flags.items()),
        ]
        self.log = self.path.open("w")
        # Ray Train looks for a cluster on the machine where it isn't told one, and finds somebody else's
        env = self.env | {"RAY_ADDRESS": self.gcs}
        self.process = subprocess.Popen(
            command, env=env, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait_until_ready(self) -> None:
        probe = [str(BIN / "ray"), "job", "submit", "--no-wait", "--address", self.address, "--", "true"]
        end = time.monotonic() + START_S
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if subprocess.run(probe, env=self.env, capture_output=True, timeout=120).returncode == 0:
                    return
            except subprocess.TimeoutExpired:
                pass
            time.sleep(1)
        raise HeadNotStarted

    def __exit__(self, *_: object) -> None:
        for sent in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, sent)
                self.process.wait(STOP_S)
                time.sleep(1)  # its children
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self.process.wait(60)
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)
