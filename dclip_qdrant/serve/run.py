"""Address, token, uvicorn."""

import ipaddress
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dclip_qdrant.errors import UsageError
from dclip_qdrant.lookup import need
from dclip_qdrant.serve.limits import Limits
from dclip_qdrant.student import Student


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def read_token(file: str | None) -> str | None:
    """The token in a file, or in DCLIP_SERVE_TOKEN. Raises UsageError for a file that can't be read."""
    if not file:
        return os.environ.get("DCLIP_SERVE_TOKEN") or None
    try:
        return Path(file).read_text().strip()
    except OSError as e:
        raise UsageError("--token-file", f"{file}: {e.strerror}") from e


def build(
    students: list[str],
    *,
    host: str = "127.0.0.1",
    token: str | None = None,
    limits: Limits | None = None,
    detector: Any = None,
    edge: str | None = None,
    url: str | None = None,
    api_key: str | None = None,
    pictures: list[str] | None = None,
    threads: int | None = None,
) -> Any:
    """The service, ready to be run.

    Raises:
        UsageError: an address that others can reach without a token; two students of one name. StudentError. MissingExtra.
    """
    for package in ("starlette", "uvicorn", "prometheus_client"):
        need(package, "serve")
    if not is_loopback(host) and not token:
        raise UsageError("--host", f"{host} can be reached by others", "a token", "set DCLIP_SERVE_TOKEN (or --token-file)")
    if token is not None and len(token) < 16:
        raise UsageError("token", f"{len(token)} characters", "16 or more", "e.g. openssl rand -hex 32")
    from dclip_qdrant.detectors import build as build_detector
    from dclip_qdrant.serve.app import Service
    from dclip_qdrant.serve.engine import Engine
    from dclip_qdrant.serve.gallery import Gallery
    from dclip_qdrant.stores import place

    engine = Engine(
        [Student.load(s, threads=threads, spin=False) for s in students],
        limits=limits or Limits(),
        detector=detector or build_detector("grid", {}),
    )
    gallery = None
    if edge or url:
        roots = (
            [Path(p) for p in pictures] if pictures else [] if url else None
        )  # a server's payload may be anybody's: no pictures without --pictures
        gallery = Gallery(engine, place(url=url, edge=edge, api_key=api_key), roots=roots)
    return Service(engine, gallery=gallery, token=token, loopback=is_loopback(host))


def run(service: Any, *, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serves until it is told to stop (Ctrl-C, SIGTERM); requests under way are finished first.

    Raises:
        UsageError: the port is taken.
    """
    import uvicorn

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(
        family, socket.SOCK_STREAM, socket.IPPROTO_TCP
    )  # asyncio sets TCP_NODELAY only where it reads TCP here: without it 40 ms an answer
    if os.name != "nt":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host.strip("[]"), port))
    except OSError as e:
        sock.close()
        raise UsageError("--port", f"{host}:{port}: {e.strerror or e}", "a free port", "--port 0 picks one") from e
    address = f"http://{host}:{sock.getsockname()[1]}"
    say(f"{', '.join(service.engine.students)} at {address}/inference" + (f", search page at {address}/" if service.gallery else ""))
    config = uvicorn.Config(service.app, log_level="warning", access_log=False, timeout_graceful_shutdown=20, server_header=False)
    for asked in (signal.SIGTERM, signal.SIGINT):
        signal.signal(
            asked, lambda *_: None
        )  # uvicorn stops on them, then raises them once more: a service that was asked to stop ends with 0
    uvicorn.Server(config).run(sockets=[sock])
