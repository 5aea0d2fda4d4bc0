"""Address, token, uvicorn."""

import ipaddress
import logging
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from dclip_qdrant.detectors import Detector, build
from dclip_qdrant.errors import UsageError
from dclip_qdrant.lookup import need
from dclip_qdrant.service.limits import Limits
from dclip_qdrant.serving.student import Student

if TYPE_CHECKING:
    from dclip_qdrant.service.app import Service

logger = logging.getLogger(__name__)

PATIENCE = 5.0  # seconds that a request waits for a Qdrant server that is busy or away

BACKLOG = 2048  # connections that wait, as uvicorn has it


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
        raise UsageError("`token_file`", f"{file}: {e.strerror}") from e


def build_service(
    students: list[str],
    *,
    host: str = "127.0.0.1",
    token: str | None = None,
    limits: Limits | None = None,
    detector: Detector | None = None,
    edge: str | None = None,
    url: str | None = None,
    api_key: str | None = None,
    pictures: list[str] | None = None,
    threads: int | None = None,
) -> "Service":
    """The service, ready to be run.

    Raises:
        UsageError: an address that others can reach without a token; two students of one name. StudentError.
            MissingExtra.
    """
    for package in ("starlette", "uvicorn", "prometheus_client"):
        need(package, "serve")
    if not is_loopback(host) and not token:
        raise UsageError(
            "`host`", f"{host} can be reached by others", "a token", "set DCLIP_SERVE_TOKEN (or `token_file`)"
        )
    if token is not None and len(token) < 16:
        raise UsageError("token", f"{len(token)} characters", "16 or more", "e.g. openssl rand -hex 32")
    from dclip_qdrant.service.app import Service
    from dclip_qdrant.service.engine import Engine
    from dclip_qdrant.service.gallery import Gallery
    from dclip_qdrant.serving.stores import place

    engine = Engine(
        [Student.load(s, threads=threads, spin=False) for s in students],
        limits=limits or Limits(),
        detector=detector or build("grid"),
    )
    gallery = None
    if edge or url:
        roots = [Path(p) for p in pictures or []]
        if not roots and not url:
            roots = None  # our own folder; a server's payload may be anybody's: nothing without `pictures`
        store = place(url=url, edge=edge, api_key=api_key, patience=PATIENCE)
        gallery = Gallery(engine, store, roots=roots)
    return Service(engine, gallery=gallery, token=token, loopback=is_loopback(host))


def run(service: "Service", *, host: str, port: int) -> None:
    """Serves until it is told to stop (Ctrl-C, SIGTERM); requests under way are finished first.

    Raises:
        UsageError: the port is taken.
    """
    import uvicorn

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only where it reads TCP here: without it 40 ms an answer
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if os.name != "nt":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host.strip("[]"), port))
    except OSError as e:
        sock.close()
        raise UsageError(
            "`port`", f"{host}:{port}: {e.strerror or e}", "a free port", "`port` 0 picks one"
        ) from e
    # now, not when uvicorn is up: whoever reads the address below may connect at once, and waits
    sock.listen(BACKLOG)
    address = f"http://{host}:{sock.getsockname()[1]}"
    page = f", search page at {address}/" if service.gallery else ""
    logger.info("%s at %s/inference%s", ", ".join(service.engine.students), address, page)
    config = uvicorn.Config(
        service.app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=20,
        server_header=False,
        backlog=BACKLOG,
    )
    for asked in (signal.SIGTERM, signal.SIGINT):
        # uvicorn stops on them, then raises them once more: a service that was asked to stop ends with 0
        signal.signal(asked, lambda *_: None)
    uvicorn.Server(config).run(sockets=[sock])
