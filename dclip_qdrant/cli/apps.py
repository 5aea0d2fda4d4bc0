"""Students inside applications: registered in Python, or behind HTTP."""

from pathlib import Path

import click

from dclip_qdrant import front
from dclip_qdrant.cli.options import key_values
from dclip_qdrant.errors import UsageError


@click.command()
@click.option("--enable", metavar="STUDENT_DIR", help="Register this student in every program of this Python environment.")
@click.option("--disable", is_flag=True, help="Take everything back.")
@click.option("--status", is_flag=True, help="Say what is enabled.")
def autoregister(enable, disable, status):
    """Lets apps use a student that never mention it: `models.Document(text=..., model="dclip/NAME")` works in this environment.

    Writes a .pth file into this environment's site-packages; DCLIP_AUTOREGISTER=0 switches it off for a process.
    """
    from dclip_qdrant import autoregister as auto
    from dclip_qdrant.student import Student

    if sum((bool(enable), disable, status)) != 1:
        raise UsageError("autoregister", "expected one of --enable STUDENT_DIR, --disable, --status")
    try:
        if enable:
            student = Student.load(enable)
            for folder in auto.students():
                if (
                    Path(folder).is_dir()
                    and Path(folder) != Path(enable).resolve()
                    and Student.load(folder, verify=False).name == student.name
                ):
                    raise UsageError(
                        "--enable",
                        f"dclip/{student.name} is {folder} already",
                        "one student a name",
                        "--disable first, or export with another --name",
                    )
            auto.enable(str(Path(enable).resolve()))
            front.say(f"{student.model_name} (and dclip/{student.name}) in {auto.site()}")
        elif disable:
            auto.disable()
            front.say(f"nothing is registered in {auto.site()}")
    except OSError as e:
        raise UsageError(auto.site(), f"can't be written: {e.strerror}", "a virtual environment of your own") from e
    if status:
        click.echo("on" if auto.enabled() else "off")
        for folder in auto.students():
            try:
                click.echo(f"{Student.load(folder, verify=False).model_name}  {folder}")
            except Exception as e:
                click.echo(f"broken  {folder}  {e}")


@click.command()
@click.option("--student", "students", required=True, multiple=True, help="A student folder; may be given several times.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Anything but loopback needs a token.")
@click.option("--port", default=7070, show_default=True, help="0 picks a free one.")
@click.option("--token-file", type=click.Path(dir_okay=False), help="A file with the token; or DCLIP_SERVE_TOKEN.")
@click.option("--edge", help="Search page: a folder of embedded collections.")
@click.option("--url", envvar="QDRANT_URL", help="Search page: a Qdrant server.")
@click.option("--api-key", envvar="QDRANT_API_KEY", help="The server's key; better in QDRANT_API_KEY.")
@click.option("--pictures", multiple=True, help="Search page: folders whose pictures may be shown. Needed with --url.")
@click.option("--detector", default="grid", show_default=True, help="What finds regions in pictures sent to MODEL/regions.")
@click.option("--weights", help="The detector's weights.")
@click.option("--detector-set", multiple=True, metavar="KEY=VALUE", help="The detector's options.")
@click.option(
    "--allow-host", "hosts", multiple=True, metavar="HOST[:PORT]", help="Fetch pictures from URLs of this host. Default: no URLs at all."
)
@click.option("--max-body-mb", default=32, show_default=True, help="Of one request.")
@click.option("--max-inputs", default=256, show_default=True, help="Texts and pictures in one request.")
@click.option("--max-waiting", default=4096, show_default=True, help="Inputs in line before requests are answered with 429.")
@click.option("--threads", type=int, help="Threads of each tower.  [default: all cores]")
def serve(
    students,
    host,
    port,
    token_file,
    edge,
    url,
    api_key,
    pictures,
    detector,
    weights,
    detector_set,
    hosts,
    max_body_mb,
    max_inputs,
    max_waiting,
    threads,
):
    """Answers for students over HTTP: the Qdrant server's inference protocol, the OpenAI embeddings shape, and a search page.

    Start a Qdrant server with QDRANT__INFERENCE__ADDRESS=http://HOST:PORT/inference, and every client in every language can send
    {"text": "...", "model": "dclip/NAME"} in place of a vector.
    """
    from dclip_qdrant.detectors import build as build_detector
    from dclip_qdrant.serve.limits import Limits
    from dclip_qdrant.serve.run import build, read_token, run

    token = read_token(token_file)
    limits = Limits(
        body_bytes=max_body_mb << 20, picture_bytes=min(20, max_body_mb) << 20, inputs=max_inputs, waiting=max_waiting, fetch_hosts=hosts
    )
    options = key_values(detector_set, "--detector-set") | ({"weights": weights} if weights else {})
    service = build(list(students), host=host, token=token, limits=limits, detector=build_detector(detector, options), edge=edge, url=None if edge else url, api_key=api_key,
                    pictures=list(pictures), threads=threads)  # fmt: skip
    run(service, host=host, port=port, say=front.say)


COMMANDS = (autoregister, serve)
