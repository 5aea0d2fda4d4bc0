"""Students inside applications: registered in Python, or behind HTTP."""

import json

import click

from dclip_qdrant.cli import front
from dclip_qdrant.cli.commands import command
from dclip_qdrant.cli.options import (
    detector_arguments,
    detector_weights_option,
    make_detector,
    table_or_json,
    together,
)
from dclip_qdrant.errors import UsageError

students_option = click.option(
    "--student",
    "students",
    required=True,
    multiple=True,
    metavar="DIR",
    help="A student folder; may be given several times.",
)
address_options = together(
    click.option("--host", default="127.0.0.1", help="Anything but loopback needs a token."),
    click.option("--port", type=click.IntRange(0, 65535), default=7070, help="0 picks a free one."),
    click.option(
        "--token-file",
        type=click.Path(dir_okay=False),
        metavar="FILE",
        help="A file with the token; or DCLIP_SERVE_TOKEN.",
    ),
)


@command("autoregister", example="dclip-qdrant autoregister --enable /data/run/student")
@click.option(
    "--enable", metavar="DIR", help="Register this student in every program of this Python environment."
)
@click.option("--disable", is_flag=True, help="Take everything back.")
@click.option("--status", is_flag=True, help="Say what is enabled.")
@table_or_json
def autoregister_command(enable: str | None, disable: bool, status: bool, form: str) -> None:
    """Lets apps use a student that never mention it: `models.Document(text=..., model="dclip/NAME")` works in
    this environment.

    Writes a .pth file into this environment's site-packages; DCLIP_AUTOREGISTER=0 switches it off for a
    process.
    """
    from dclip_qdrant.apps import autoregister

    if sum((enable is not None, disable, status)) != 1:
        raise UsageError("autoregister", "expected one of `enable` DIR, `disable`, `status`")
    try:
        if enable:
            name = autoregister.enable_student(enable)
            front.say(f"{name} in {autoregister.site()}")
        elif disable:
            autoregister.disable()
            front.say(f"nothing is registered in {autoregister.site()}")
    except OSError as e:
        came = f"can't be written: {e.strerror}"
        raise UsageError(autoregister.site(), came, "a virtual environment of your own") from e
    if status:
        _print_status(form)


def _print_status(form: str) -> None:
    from dclip_qdrant.apps import autoregister

    rows = autoregister.status()
    if form == "json":
        click.echo(json.dumps({"enabled": autoregister.enabled(), "students": rows}, indent=1))
        return
    click.echo("on" if autoregister.enabled() else "off")
    for row in rows:
        click.echo(f"{row['name'] or 'broken'}  {row['folder']}  {row['error'] or ''}".rstrip())


@command(
    "serve",
    example="dclip-qdrant serve --student /data/run/student --edge ./dclip-edge",
)
@students_option
@address_options
@click.option("--edge", metavar="DIR", help="Search page: a folder of embedded collections.")
@click.option(
    "--url", envvar="QDRANT_URL", show_envvar=True, metavar="URL", help="Search page: a Qdrant server."
)
@click.option("--api-key", envvar="QDRANT_API_KEY", show_envvar=True, metavar="KEY", help="The server's key.")
@click.option(
    "--pictures",
    multiple=True,
    metavar="DIR",
    help="Search page: folders whose pictures may be shown; needed with --url.",
)
@click.option(
    "--detector", default="grid", metavar="NAME", help="What finds regions in pictures sent to MODEL/regions."
)
@detector_weights_option("The detector's weights.")
@click.option(
    "--detector-set",
    "detector_settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the detector; repeatable.",
)
@click.option(
    "--allow-host",
    "hosts",
    multiple=True,
    metavar="HOST[:PORT]",
    help="Fetch pictures from URLs of this host.  [default: no URLs]",
)
@click.option("--max-body-mb", type=click.IntRange(1), default=32, help="Of one request.")
@click.option("--max-inputs", type=click.IntRange(1), default=256, help="Texts and pictures in one request.")
@click.option(
    "--max-waiting",
    type=click.IntRange(1),
    default=4096,
    help="Inputs in line before requests are answered with 429.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads of each tower.  [default: all cores]")
def serve_command(
    students: tuple[str, ...],
    host: str,
    port: int,
    token_file: str | None,
    edge: str | None,
    url: str | None,
    api_key: str | None,
    pictures: tuple[str, ...],
    detector: str,
    detector_weights: str | None,
    detector_settings: tuple[str, ...],
    hosts: tuple[str, ...],
    max_body_mb: int,
    max_inputs: int,
    max_waiting: int,
    threads: int | None,
) -> None:
    """Answers for students over HTTP: the Qdrant server's inference protocol, the OpenAI embeddings shape,
    and a search page.

    Start a Qdrant server with QDRANT__INFERENCE__ADDRESS=http://HOST:PORT/inference, and every client in
    every language can send {"text": "...", "model": "dclip/NAME"} in place of a vector.
    """
    from dclip_qdrant.service.limits import Limits
    from dclip_qdrant.service.run import build_service, read_token, run

    token = read_token(token_file)
    limits = Limits(
        body_bytes=max_body_mb << 20,
        picture_bytes=min(20, max_body_mb) << 20,
        inputs=max_inputs,
        waiting=max_waiting,
        fetch_hosts=hosts,
    )
    service = build_service(
        list(students),
        host=host,
        token=token,
        limits=limits,
        detector=make_detector(detector_arguments(detector, detector_weights, detector_settings)),
        edge=edge,
        url=None if edge else url,
        api_key=api_key,
        pictures=list(pictures),
        threads=threads,
    )
    run(service, host=host, port=port)


@command(
    "serve-on-ray",
    example="dclip-qdrant serve-on-ray --student /data/run/student --host 0.0.0.0 --max-replicas 8",
)
@students_option
@address_options
@click.option("--min-replicas", type=click.IntRange(1), default=1, help="Kept warm.")
@click.option("--max-replicas", type=click.IntRange(1), default=4, help="At the busiest.")
@click.option(
    "--target-requests",
    type=click.IntRange(1),
    default=16,
    help="Requests under way that one replica should have; more start another.",
)
@click.option("--cpus", default=1.0, help="Of one replica.")
@click.option("--app-name", "name", default="dclip", help="Of the Serve application.")
def serve_on_ray_command(
    students: tuple[str, ...],
    host: str,
    port: int,
    token_file: str | None,
    min_replicas: int,
    max_replicas: int,
    target_requests: int,
    cpus: float,
    name: str,
) -> None:
    """`serve` for a cluster: replicas of the service on Ray Serve, as many as the load asks for, behind one
    address.

    Runs until it is stopped (Ctrl-C, `ray job stop`). On one machine `serve` answers more. /metrics answers
    for one replica; Ray's own metrics for all of them.
    """
    from dclip_qdrant.jobs.cluster import absolute
    from dclip_qdrant.jobs.serve import ServeRequest, serve_until_stopped
    from dclip_qdrant.service.run import read_token

    request = ServeRequest(
        students=tuple(absolute(folder, "students") for folder in students),
        host=host,
        port=port,
        token=read_token(token_file),
        min_replicas=min_replicas,
        max_replicas=max_replicas,
        target_requests=target_requests,
        cpus=cpus,
        name=name,
    )
    serve_until_stopped(request)


COMMANDS = (serve_command, serve_on_ray_command, autoregister_command)
