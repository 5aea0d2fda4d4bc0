"""`dclip-qdrant serve` for a cluster: replicas of the service on Ray Serve, as many as the load asks for, behind one address.

    ray job submit --working-dir . -- python ray_jobs/serve.py --student /data/run/student --host 0.0.0.0 --port 7070 --max-replicas 8

The job runs until it is stopped (`ray job stop`). Anything but loopback needs a token (DCLIP_SERVE_TOKEN in the job's environment, or --token-file).
On one machine `dclip-qdrant serve` answers more (benchmarks/serve.py, with and without --ray).
/metrics answers for one replica; Ray's own metrics for all of them.
"""

import signal
import threading

import click

from dclip_qdrant import cluster, front
from dclip_qdrant.errors import UsageError
from dclip_qdrant.lookup import need


@click.command(help=__doc__)
@click.option(
    "--student", "students", required=True, multiple=True, help="A student folder that every worker can read; may be given several times."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Of Ray's proxy on each node; anything but loopback needs a token.")
@click.option("--port", default=7070, show_default=True)
@click.option("--token-file", type=click.Path(dir_okay=False), help="A file with the token; or DCLIP_SERVE_TOKEN.")
@click.option("--min-replicas", default=1, show_default=True, help="Kept warm.")
@click.option("--max-replicas", default=4, show_default=True)
@click.option(
    "--target-requests", default=16, show_default=True, help="Requests under way that one replica should have; more of them start another."
)
@click.option("--cpus", default=1.0, show_default=True, help="Of one replica.")
@click.option("--name", default="dclip", show_default=True, help="Of the Serve application.")
def main(students, host, port, token_file, min_replicas, max_replicas, target_requests, cpus, name):
    from dclip_qdrant.serve.run import build, read_token

    if not 1 <= min_replicas <= max_replicas:
        raise UsageError("--min-replicas", f"{min_replicas} of at most {max_replicas}", "1 <= min <= max")
    folders, token = [cluster.absolute(s, "--student") for s in students], read_token(token_file)
    build(folders, host=host, token=token)  # what is wrong is said here, not in a replica's log
    cluster.connect()
    need("fastapi", "ray_jobs/serve.py")
    from ray import serve

    def service():
        return build(folders, host=host, token=token, threads=max(1, int(cpus))).app

    scale = {"min_replicas": min_replicas, "max_replicas": max_replicas, "target_ongoing_requests": target_requests}
    deployment = serve.deployment(serve.ingress(service)()).options(
        name="students", autoscaling_config=scale, max_ongoing_requests=4 * target_requests, ray_actor_options={"num_cpus": cpus}
    )
    asked = threading.Event()
    for how in (signal.SIGTERM, signal.SIGINT):
        signal.signal(how, lambda *_: asked.set())
    serve.start(http_options={"host": host, "port": port})
    serve.run(deployment.bind(), name=name, route_prefix="/")
    front.say(f"{', '.join(folders)} at http://{host}:{port}/inference, {min_replicas} to {max_replicas} replicas")
    asked.wait()
    serve.delete(name)


if __name__ == "__main__":
    front.run(main)
