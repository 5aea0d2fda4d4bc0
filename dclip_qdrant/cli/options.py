"""Options that several commands share: one name, one meaning, wherever they stand."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from dclip_qdrant.cli import front
from dclip_qdrant.cli.commands import RenamedOption
from dclip_qdrant.errors import PartialError, UsageError

if TYPE_CHECKING:
    from dclip_qdrant.detectors import Detector
    from dclip_qdrant.serving.items import Report
    from dclip_qdrant.serving.stores import Place, Store

Decorator = Callable[[Any], Any]
WAIT = "dclip_qdrant.wait"  # what `--wait` says, in click's context
LOOKING_UP = 10.0  # seconds of waiting where a person waits for an answer


def together(*decorators: Decorator) -> Decorator:
    """Several options as one decorator, shown in this order."""

    def apply(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


quiet_option = click.option("--quiet", is_flag=True, help="No progress on stderr.")
threads_option = click.option(
    "--threads", type=click.IntRange(1), help="Threads for decoding.  [default: all]"
)
table_or_json = click.option("--format", "form", type=click.Choice(["table", "json"]), default="table")
student_option = click.option("--student", required=True, metavar="DIR", help="A student folder, or its URI.")
prefix_option = click.option(
    "--prefix", default="", metavar="TEXT", help="Stands before every key, to keep sources apart."
)
images_option = click.option(
    "--images",
    "images_root",
    metavar="DIR",
    help="Where the pictures are, when not beside the file that names them.",
)
spec_option = click.option(
    "--spec",
    default="default",
    metavar="NAME|FILE",
    help="What a new collection is: a name in schemas/collections, or a .toml file.",
)
rejects_option = click.option(
    "--rejects",
    metavar="FILE",
    help="Where rejected pictures are listed.  [default: COLLECTION-rejects.jsonl]",
)


def detector_weights_option(help_text: str) -> Decorator:
    return click.option(
        "--detector-weights", cls=RenamedOption, former=["--weights"], metavar="FILE", help=help_text
    )


def _keep_wait(context: click.Context, _: click.Parameter, seconds: float | None) -> None:
    """For `opened_place` and `opened_store`, wherever the command calls them."""
    context.meta[WAIT] = seconds


place_options = together(
    click.option(
        "--url",
        envvar="QDRANT_URL",
        show_envvar=True,
        metavar="URL",
        help="A Qdrant server, http://… or grpc://…; else embedded collections.",
    ),
    click.option(
        "--edge", metavar="DIR", help="Folder of embedded collections (qdrant-edge).  [default: ./dclip-edge]"
    ),
    click.option(
        "--api-key",
        envvar="QDRANT_API_KEY",
        show_envvar=True,
        metavar="KEY",
        help="The server's key; better in the environment than on the command line.",
    ),
    click.option(
        "--wait",
        type=click.FloatRange(0),
        expose_value=False,
        callback=_keep_wait,
        metavar="SECONDS",
        help="How long to wait for a server that is busy or away.  [default: 120; 10 to look something up]",
    ),
)
store_options = together(
    click.option(
        "--collection",
        required=True,
        envvar="COLLECTION_NAME",
        show_envvar=True,
        metavar="NAME",
        help="The collection's name, or an alias.",
    ),
    place_options,
)
detector_options = together(
    click.option("--detector", metavar="NAME", help="Finds regions: yolo, grid, or package.module:Class."),
    detector_weights_option("The detector's weights: a file, or a name that it fetches."),
    click.option(
        "--detector-set",
        "detector_settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="An option of the detector, e.g. min_score=0.4; repeatable.",
    ),
)


def number_list(_: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """`0,1,2` -> (0, 1, 2)."""
    if value is None:
        return None
    try:
        return tuple(int(number) for number in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r}: expected numbers with commas, e.g. 0,1,2") from None


def name_list(_: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """`train,val` -> ("train", "val"); of an option that may be repeated."""
    return tuple(name.strip() for value in values for name in value.split(",") if name.strip())


def detector_arguments(
    name: str | None, weights: str | None, settings: tuple[str, ...]
) -> tuple[str, dict[str, Any]] | None:
    """A detector's name and options; None where none is wanted.

    Raises:
        UsageError: weights or options without a detector.
    """
    from dclip_qdrant.settings import options

    if not name:
        if weights or settings:
            given = "`detector_weights`" if weights else "`detector_settings`"
            raise UsageError(given, "without a detector", "`detector` yolo")
        return None
    return name, options(settings, "`detector_settings`") | ({"weights": weights} if weights else {})


def make_detector(arguments: tuple[str, dict[str, Any]] | None) -> "Detector | None":
    from dclip_qdrant.detectors import build

    return build(*arguments) if arguments else None


def where(url: str | None, edge: str | None) -> dict[str, str | None]:
    """A flag on the command line beats QDRANT_URL of the environment; without either, a folder here."""
    return {"url": None if edge else url, "edge": edge or (None if url else "dclip-edge")}


def patience(looking_up: bool = False) -> float | None:
    """What `--wait` says, or what commands do without it."""
    context = click.get_current_context(silent=True)
    said = context.meta.get(WAIT) if context else None
    return LOOKING_UP if said is None and looking_up else said


@contextmanager
def opened_place(
    url: str | None, edge: str | None, api_key: str | None, *, looking_up: bool = False
) -> "Iterator[Place]":
    from dclip_qdrant.serving import stores

    place = stores.place(**where(url, edge), api_key=api_key, patience=patience(looking_up))
    try:
        yield place
    finally:
        place.close()


@contextmanager
def opened_store(
    collection: str, url: str | None, edge: str | None, api_key: str | None, *, looking_up: bool = False
) -> "Iterator[Store]":
    from dclip_qdrant.serving import stores

    place = {**where(url, edge), "api_key": api_key, "patience": patience(looking_up)}
    store = stores.open_store(collection, **place)
    try:
        yield store
    finally:
        store.close()


def raise_rejected(report: "Report", source: str, rejects: str | None) -> None:
    """Says the first reasons and ends with exit code 3, if pictures were rejected."""
    if not report.rejected:
        return
    for reason in report.reasons:
        front.say(f"  rejected: {reason}")
    do = f"reasons are in {rejects}" if rejects else f"the first: {report.reasons[0]}"
    raise PartialError(source, f"{report.rejected:,} pictures rejected", do=do)
