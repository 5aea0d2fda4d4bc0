"""The service on Ray Serve: as many replicas as the load asks for, behind one address."""

import logging
import signal
import threading
from dataclasses import dataclass
from typing import Any

from dclip_qdrant.errors import UsageError
from dclip_qdrant.jobs.cluster import connect
from dclip_qdrant.lookup import need
from dclip_qdrant.service.run import build_service

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServeRequest:
    """`students`: absolute folders or URIs that every worker can read."""

    students: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 7070
    token: str | None = None
    min_replicas: int = 1
    max_replicas: int = 4
    target_requests: int = 16  # under way in one replica; more of them start another
    cpus: float = 1.0  # of a replica
    name: str = "dclip"


def serve_until_stopped(request: ServeRequest) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        UsageError: replicas that can't be meant, an address that others can reach without a token.
    """
    if not request.min_replicas <= request.max_replicas:
        came = f"{request.min_replicas} of at most {request.max_replicas}"
        raise UsageError("`min_replicas`", came, "at most `max_replicas`")
    students = list(request.students)
    # what is wrong is said here, not in a replica's log
    build_service(students, host=request.host, token=request.token)
    connect()
    need("fastapi", "serve-on-ray")
    from ray import serve

    def app() -> Any:  # an ASGI app, made in each replica
        threads = max(1, int(request.cpus))
        return build_service(students, host=request.host, token=request.token, threads=threads).app

    deployment = serve.deployment(serve.ingress(app)()).options(
        name="students",
        autoscaling_config={
            "min_replicas": request.min_replicas,
            "max_replicas": request.max_replicas,
            "target_ongoing_requests": request.target_requests,
        },
        max_ongoing_requests=4 * request.target_requests,
        ray_actor_options={"num_cpus": request.cpus},
    )
    asked_to_stop = threading.Event()
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda *_: asked_to_stop.set())
    serve.start(http_options={"host": request.host, "port": request.port})
    serve.run(deployment.bind(), name=request.name, route_prefix="/")
    address = f"http://{request.host}:{request.port}/inference"
    replicas = f"{request.min_replicas} to {request.max_replicas} replicas"
    logger.info("%s at %s, %s", ", ".join(students), address, replicas)
    asked_to_stop.wait()
    serve.delete(request.name)
