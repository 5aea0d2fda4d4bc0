"""Collections: fill, search, look at."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import click

from dclip_qdrant.cli import front
from dclip_qdrant.cli.commands import command
from dclip_qdrant.cli.options import (
    detector_arguments,
    detector_options,
    images_option,
    make_detector,
    name_list,
    opened_store,
    prefix_option,
    quiet_option,
    raise_rejected,
    rejects_option,
    spec_option,
    store_options,
    student_option,
    table_or_json,
    threads_option,
    together,
)
from dclip_qdrant.cli.submit import submit_option
from dclip_qdrant.errors import UsageError

if TYPE_CHECKING:
    from dclip_qdrant.serving.embedder import Layout
    from dclip_qdrant.serving.search import Hit
    from dclip_qdrant.serving.stores.qdrant import Qdrant

regions_option = click.option(
    "--regions",
    metavar="DIR",
    help="Regions that are there already: a stage of extract-regions, or parts in the contract.",
)
top_k_option = click.option(
    "--top-k", type=click.IntRange(1), default=4, help="Regions kept a picture, by confidence x area."
)
splits_option = together(
    click.option(
        "--splits",
        callback=name_list,
        metavar="NAME,NAME",
        help="Only these splits of a source that has splits.",
    ),
    click.option("--split", "splits_too", multiple=True, hidden=True),
)
captions_option = click.option(
    "--captions",
    type=click.IntRange(1),
    metavar="N",
    help=(
        "Index the first N captions of each picture: the others stay for tune and --golden.  [default: all]"
    ),
)
replace_option = click.option("--replace", is_flag=True, help="A key that another picture has is taken over.")


@command(
    "ingest",
    example=(
        "dclip-qdrant ingest /data/shop --student /data/run/student --collection pictures --detector yolo"
    ),
)
@click.argument("source")
@student_option
@store_options
@detector_options
@regions_option
@top_k_option
@spec_option
@images_option
@splits_option
@captions_option
@prefix_option
@click.option(
    "--payload-layout",
    "layout",
    type=click.Choice(["flat", "langchain"]),
    default="flat",
    help="langchain adds page_content and metadata.",
)
@click.option(
    "--into-existing",
    metavar="FIELD",
    help=(
        "Add our vectors to the points of somebody's collection (--url) whose payload FIELD "
        "holds a picture's key."
    ),
)
@replace_option
@click.option("--limit", type=click.IntRange(1), help="Stop after so many pictures.")
@rejects_option
@threads_option
@quiet_option
def ingest_command(
    source: str,
    student: str,
    collection: str,
    url: str | None,
    edge: str | None,
    api_key: str | None,
    detector: str | None,
    detector_weights: str | None,
    detector_weights_too: str | None,
    detector_settings: tuple[str, ...],
    regions: str | None,
    top_k: int,
    spec: str,
    images_root: str | None,
    splits: tuple[str, ...],
    splits_too: tuple[str, ...],
    captions: int | None,
    prefix: str,
    layout: "Layout",
    into_existing: str | None,
    replace: bool,
    limit: int | None,
    rejects: str | None,
    threads: int | None,
    quiet: bool,
) -> None:
    """Embeds the pictures in SOURCE (folder, CSV, JSONL, tar, Parquet, pairs) and fills a collection.

    Pictures that are there already, unchanged, are skipped without being decoded; a killed run goes on where
    it was. Exit code 3: some were rejected.
    """
    from dclip_qdrant.cli.progress import Progress
    from dclip_qdrant.pairs.region_files import load_regions
    from dclip_qdrant.serving.collection import CollectionSpec
    from dclip_qdrant.serving.embedder import Embedder
    from dclip_qdrant.serving.ingest import ingest
    from dclip_qdrant.serving.into_existing import ingest_into
    from dclip_qdrant.serving.student import Student

    if detector and regions:
        raise UsageError("`detector`", "and `regions`", "one of them")
    if into_existing and (edge or not url):
        do = "qdrant-edge collections are made by dclip-qdrant alone"
        raise UsageError("`into_existing`", "an embedded collection", "`url`", do)
    loaded, wish = Student.load(student), CollectionSpec.load(spec)
    finder = make_detector(
        detector_arguments(detector, detector_weights or detector_weights_too, detector_settings)
    )
    boxes = load_regions(regions) if regions else None
    rejects = rejects or f"{collection}-rejects.jsonl"
    bar = Progress(quiet=quiet)
    shared: dict[str, Any] = {
        "spec": wish,
        "images_root": images_root,
        "prefix": prefix,
        "splits": (*splits, *splits_too),
        "captions": captions,
        "replace": replace,
        "limit": limit,
        "rejects": rejects,
        "progress": lambda report: bar(report.seen, report.line()),
    }
    with opened_store(collection, url, edge, api_key) as store:
        row: dict[str, Any] = {"collection": collection}
        if into_existing:
            embedder = Embedder(loaded, detector=finder, regions=boxes, top_k=top_k, threads=threads)
            report, guest = ingest_into(
                source, embedder, cast("Qdrant", store), field=into_existing, **shared
            )
            row["without_picture"] = guest.without_picture
            left = f"{guest.without_picture:,} of {guest.points:,} points have no picture in {source}"
        else:
            report = ingest(
                source,
                loaded,
                store,
                detector=finder,
                regions=boxes,
                top_k=top_k,
                threads=threads,
                layout=layout,
                **shared,
            )
            left = None
        bar.done()
        front.say(report.line())
        if left:
            front.say(left)
        click.echo(json.dumps(row | report.row() | {"points": store.count()}))
    if report.seen == 0:
        raise UsageError(source, "no pictures here", "files ending in .jpg, .png, ...")
    raise_rejected(report, source, rejects)


@command(
    "ingest-on-ray",
    example=(
        "dclip-qdrant ingest-on-ray s3://shop/pictures --student s3://shop/student "
        "--collection pictures --url http://qdrant:6333"
    ),
)
@click.argument("source")
@student_option
@store_options
@detector_options
@regions_option
@top_k_option
@spec_option
@images_option
@splits_option
@captions_option
@prefix_option
@replace_option
@rejects_option
@click.option(
    "--actors", type=click.IntRange(1), help="Embedders.  [default: one for every four CPUs, or one a GPU]"
)
@submit_option
def ingest_on_ray_command(
    source: str,
    student: str,
    collection: str,
    url: str | None,
    edge: str | None,
    api_key: str | None,
    detector: str | None,
    detector_weights: str | None,
    detector_weights_too: str | None,
    detector_settings: tuple[str, ...],
    regions: str | None,
    top_k: int,
    spec: str,
    images_root: str | None,
    splits: tuple[str, ...],
    splits_too: tuple[str, ...],
    captions: int | None,
    prefix: str,
    replace: bool,
    rejects: str | None,
    actors: int | None,
) -> None:
    """`ingest` for a cluster: a pool of embedders on Ray Data and a Datasink into Qdrant.

    Every worker must be able to read SOURCE and the student. What is there already, unchanged, is not
    decoded. An embedded collection is written by one task. Exit code 3: some pictures were rejected.
    """
    from dclip_qdrant.cli.options import where
    from dclip_qdrant.jobs.cluster import absolute, absolute_or_none, connect
    from dclip_qdrant.jobs.ingest import IngestRequest, ingest
    from dclip_qdrant.serving.collection import CollectionSpec

    place = where(url, edge)
    store = {
        "collection": collection,
        "url": place["url"],
        "edge": absolute_or_none(place["edge"], "edge"),
        "api_key": api_key,
    }
    request = IngestRequest(
        source=absolute(source, "source"),
        student=absolute(student, "student"),
        store=store,
        detector=detector_arguments(
            detector,
            absolute_or_none(detector_weights or detector_weights_too, "detector_weights"),
            detector_settings,
        ),
        regions=absolute_or_none(regions, "regions"),
        top_k=top_k,
        images_root=absolute_or_none(images_root, "images_root"),
        prefix=prefix,
        replace=replace,
        rejects=absolute_or_none(rejects, "rejects"),
        actors=actors,
        spec=CollectionSpec.load(spec),
        splits=(*splits, *splits_too),
        captions=captions,
    )
    connect()
    report = ingest(request)
    click.echo(json.dumps({"collection": collection} | report.row()))
    raise_rejected(report, source, rejects)


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
@click.option("--image", metavar="FILE", help="Search with a picture, a path or a URI.")
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
@click.option("--explain", is_flag=True, help="Show each hit's rank in each stage.")
@click.option("--format", "form", type=click.Choice(["table", "json", "jsonl", "paths"]), default="table")
def search_command(
    text: str | None,
    image: str | None,
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
    explain: bool,
    form: str,
) -> None:
    """Finds pictures by TEXT or --image."""
    from dclip_qdrant.pictures.images import as_rgb
    from dclip_qdrant.serving.search import Fusion, parse_filter, search
    from dclip_qdrant.serving.student import Student

    conditions = [parse_filter(condition) for condition in where]
    picture = as_rgb(image) if image else None
    loaded = Student.load(student)
    with opened_store(collection, url, edge, api_key) as store:
        hits = search(
            store,
            loaded,
            text=text,
            image=picture,
            mode=mode,
            where=conditions,
            limit=limit,
            candidates=candidates,
            fusion=Fusion(dense=weights[0], bm25=weights[1], regions=weights[2]) if weights else None,
            diversity=diversity,
            explain=explain,
        )
    PRINTERS[form](hits)
    if not hits:
        front.say("nothing found" + (" with these filters" if where else ""))


def _print_table(hits: "list[Hit]") -> None:
    for rank, hit in enumerate(hits, 1):
        caption = (hit.payload.get("caption") or "").split("\n")[0]
        line = f"{rank:>3}  {hit.score:.4f}  {hit.payload.get('key')}  {caption[:70]}"
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
        with opened_store(target, url, edge, api_key) as store:
            filler = store.metadata().get(META, {}).get("student", "something else than dclip-qdrant")
            facts = {"collection": target, **store.describe(), "filled_by": filler}
    if form == "json":
        click.echo(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        click.echo(f"{name:<16} {shown}")


COMMANDS = (ingest_command, ingest_on_ray_command, search_command, inspect_command)
