"""Collections searched and looked at."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from dclip_qdrant.cli import front
from dclip_qdrant.cli.commands import command
from dclip_qdrant.cli.options import (
    opened_store,
    store_options,
    student_option,
    table_or_json,
)

if TYPE_CHECKING:
    from dclip_qdrant.serving.examples import Example
    from dclip_qdrant.serving.search import Hit


def _fusion(_: click.Context, __: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    if value is None:
        return None
    try:
        weights = tuple(float(weight) for weight in value.split(","))
    except ValueError:
        weights = ()
    if len(weights) not in (2, 3):
        raise click.BadParameter(f"{value!r}: expected two or three numbers, e.g. 1,0.5 or 1,0.5,0.3")
    return (*weights, 0.0)[:3]


@command(
    "search",
    example=(
        'dclip-qdrant search "a red bicycle" --student /data/run/student --collection '
        'pictures --mode hybrid --filter "labels=bicycle"'
    ),
)
@click.argument("text", required=False)
@click.option(
    "--image", metavar="FILE", help="Search with a picture, a path or a URI; with TEXT, both count."
)
@click.option(
    "--like",
    multiple=True,
    metavar="KEY|FILE",
    help="More like this picture, of the collection by its key or id, or a file; repeatable.",
)
@click.option("--unlike", multiple=True, metavar="KEY|FILE", help="Less like this picture; repeatable.")
@click.option("--minus", metavar="TEXT", help="Words for what is not wanted.")
@student_option
@store_options
@click.option(
    "--mode",
    type=click.Choice(["dense", "regions", "hybrid"]),
    default="dense",
    help="Whole pictures; their best regions; dense and BM25 over captions.",
)
@click.option(
    "--filter",
    "where",
    multiple=True,
    metavar="COND",
    help="labels=dog|cat, labels!=car, caption~red ball, width>=640; repeatable, all must hold.",
)
@click.option("--limit", "-n", type=click.IntRange(1), default=10, help="Hits at most.")
@click.option(
    "--candidates", type=click.IntRange(1), default=100, help="What hybrid and regions choose from."
)
@click.option(
    "--weights",
    callback=_fusion,
    metavar="D,B[,R]",
    help="Of dense, BM25 and regions in hybrid.  [default: what `tune` left in the collection, else 1,1,0]",
)
@click.option("--diversity", default=0.0, help="0 to 1: fewer pictures that look alike (MMR).")
@click.option(
    "--min-probability",
    type=float,
    metavar="P",
    help="0 to 1: leave out hits below it, so that a text without an answer finds nothing (after `tune`).",
)
@click.option("--explain", is_flag=True, help="Show each hit's rank in each stage.")
@click.option("--format", "form", type=click.Choice(["table", "json", "jsonl", "paths"]), default="table")
def search_command(
    text: str | None,
    image: str | None,
    like: tuple[str, ...],
    unlike: tuple[str, ...],
    minus: str | None,
    student: str,
    collection: str,
    url: str | None,
    edge: str | None,
    api_key: str | None,
    mode: str,
    where: tuple[str, ...],
    limit: int,
    candidates: int,
    weights: tuple[float, ...] | None,
    diversity: float,
    min_probability: float | None,
    explain: bool,
    form: str,
) -> None:
    """Finds pictures by TEXT, --image, examples (--like, --unlike), or all of them together."""
    from dclip_qdrant.pictures.images import as_rgb
    from dclip_qdrant.serving.search import Fusion, parse_filter, search
    from dclip_qdrant.serving.student import Student

    conditions = [parse_filter(condition) for condition in where]
    picture = as_rgb(image) if image else None
    loaded = Student.load(student)
    with opened_store(collection, url, edge, api_key, looking_up=True) as store:
        hits = search(
            store,
            loaded,
            text=text,
            image=picture,
            like=[_example(name) for name in like],
            unlike=[_example(name) for name in unlike],
            minus=minus,
            mode=mode,
            where=conditions,
            limit=limit,
            candidates=candidates,
            fusion=Fusion(dense=weights[0], bm25=weights[1], regions=weights[2]) if weights else None,
            diversity=diversity,
            explain=explain,
            min_probability=min_probability,
        )
    PRINTERS[form](hits)
    if not hits:
        few = f" with a probability of {min_probability:g} or more" if min_probability else ""
        front.say("nothing found" + (" with these filters" if where else "") + few)


def _example(name: str) -> "Example":
    """A file or a URI as its picture; anything else is a picture of the collection."""
    from dclip_qdrant.pictures.images import as_rgb
    from dclip_qdrant.tables.storage import as_path, is_uri

    return as_rgb(name) if is_uri(name) or as_path(name).is_file() else name


def _print_table(hits: "list[Hit]") -> None:
    for rank, hit in enumerate(hits, 1):
        caption = (hit.payload.get("caption") or "").split("\n")[0]
        chance = f"  {hit.probability * 100:3.0f}%" if hit.probability is not None else ""
        line = f"{rank:>3}  {hit.score:.4f}{chance}  {hit.payload.get('key')}  {caption[:70]}"
        if hit.box is not None:
            line += f"  [{hit.label} at {', '.join(f'{v:.0f}' for v in hit.box)}]"
        if hit.ranks is not None:
            line += "  (" + ", ".join(f"{stage} {place or '-'}" for stage, place in hit.ranks.items()) + ")"
        click.echo(line)


def _print_json(hits: "list[Hit]") -> None:
    click.echo(json.dumps([hit.row() for hit in hits], indent=1))


def _print_lines(hits: "list[Hit]") -> None:
    for hit in hits:
        click.echo(json.dumps(hit.row()))


def _print_paths(hits: "list[Hit]") -> None:
    for hit in hits:
        click.echo(hit.payload.get("uri") or hit.payload.get("key") or hit.id)


PRINTERS: "dict[str, Callable[[list[Hit]], None]]" = {
    "table": _print_table,
    "json": _print_json,
    "jsonl": _print_lines,
    "paths": _print_paths,
}


@command("inspect", example="dclip-qdrant inspect /data/run/student --format json")
@click.argument("target", metavar="DIR|COLLECTION")
@click.option(
    "--url", envvar="QDRANT_URL", show_envvar=True, metavar="URL", help="A collection on this server."
)
@click.option("--edge", metavar="DIR", help="An embedded collection in this folder.")
@click.option("--api-key", envvar="QDRANT_API_KEY", show_envvar=True, metavar="KEY", help="The server's key.")
@table_or_json
def inspect_command(target: str, url: str | None, edge: str | None, api_key: str | None, form: str) -> None:
    """Says what a student folder or a collection is."""
    from dclip_qdrant.serving.collection import META
    from dclip_qdrant.serving.student import Student
    from dclip_qdrant.tables.storage import as_path

    if as_path(target).is_dir() and not edge:
        facts = Student.load(target).facts()
    else:
        with opened_store(target, url, edge, api_key, looking_up=True) as store:
            filler = store.metadata().get(META, {}).get("student", "something else than dclip-qdrant")
            facts = {"collection": target, **store.describe(), "filled_by": filler}
    if form == "json":
        click.echo(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        click.echo(f"{name:<16} {shown}")


COMMANDS = (search_command, inspect_command)
