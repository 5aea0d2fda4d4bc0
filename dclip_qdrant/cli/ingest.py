"""Collections filled: in this process, or on Ray."""

import json
from typing import TYPE_CHECKING, Any, cast

import click

from dclip_qdrant.cli import front
from dclip_qdrant.cli.commands import RenamedOption, command
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
    threads_option,
)
from dclip_qdrant.cli.submit import submit_option
from dclip_qdrant.errors import UsageError

if TYPE_CHECKING:
    from dclip_qdrant.serving.embedder import Layout
    from dclip_qdrant.serving.stores.qdrant import Qdrant

regions_option = click.option(
    "--regions",
    metavar="DIR",
    help="Regions that are there already: a stage of extract-regions, or parts in the contract.",
)
top_k_option = click.option(
    "--top-k", type=click.IntRange(1), default=4, help="Regions kept a picture, by confidence x area."
)
splits_option = click.option(
    "--splits",
    cls=RenamedOption,
    former=["--split"],
    multiple=True,
    callback=name_list,
    metavar="NAME,NAME",
    help="Only these splits of a source that has splits.",
)


def _captions(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """How many captions are indexed; None for all."""
    words: dict[str, int | None] = {"all": None, "first": 1, "none": 0}
    if value is None or value in words:
        return words[value or "all"]
    if not value.isdigit() or int(value) < 1:
        raise click.BadParameter(f"{value!r}: expected a number above 0, first, all or none")
    return int(value)


captions_option = click.option(
    "--captions",
    callback=_captions,
    metavar="N|first|all|none",
    help=(
        "Index the first N captions of each picture: the others stay for tune and --golden.  [default: all]"
    ),
)
max_megapixels_option = click.option(
    "--max-megapixels",
    "max_pixels",
    type=click.IntRange(1),
    callback=lambda _, __, count: count * 1_000_000 if count else None,
    help="Of a picture; larger ones are rejected. Each takes 3 MB of memory and more.  [default: 89]",
)
read_as_option = click.option(
    "--as",
    "read_as",
    type=click.Choice(["folder", "csv", "jsonl", "json", "token", "tar", "parquet"]),
    help="What SOURCE is read as.  [default: what is found in it]",
)
prune_option = click.option(
    "--prune", is_flag=True, help="Delete points whose picture is gone from the source's folder."
)
verify_option = click.option(
    "--verify", is_flag=True, help="Read every file, also one whose size and time are those that are stored."
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
@read_as_option
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
@prune_option
@verify_option
@max_megapixels_option
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
    detector_settings: tuple[str, ...],
    regions: str | None,
    top_k: int,
    spec: str,
    images_root: str | None,
    read_as: str | None,
    splits: tuple[str, ...],
    captions: int | None,
    prefix: str,
    layout: "Layout",
    into_existing: str | None,
    replace: bool,
    limit: int | None,
    prune: bool,
    verify: bool,
    max_pixels: int | None,
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
    if into_existing and prune:
        raise UsageError("`prune`", "with `into_existing`", "one of them", "the points are somebody else's")
    if into_existing and (edge or not url):
        do = "qdrant-edge collections are made by dclip-qdrant alone"
        raise UsageError("`into_existing`", "an embedded collection", "`url`", do)
    loaded, wish = Student.load(student), CollectionSpec.load(spec)
    finder = make_detector(detector_arguments(detector, detector_weights, detector_settings))
    boxes = load_regions(regions) if regions else None
    rejects = rejects or f"{collection}-rejects.jsonl"
    bar = Progress(quiet=quiet)
    shared: dict[str, Any] = {
        "spec": wish,
        "images_root": images_root,
        "read_as": read_as,
        "prefix": prefix,
        "splits": splits,
        "captions": captions,
        "replace": replace,
        "limit": limit,
        "rejects": rejects,
        "progress": lambda report: bar(report.seen, report.line()),
    }
    with opened_store(collection, url, edge, api_key) as store:
        row: dict[str, Any] = {"collection": collection}
        if into_existing:
            embedder = Embedder(
                loaded,
                detector=finder,
                regions=boxes,
                top_k=top_k,
                threads=threads,
                max_pixels=max_pixels,
                verify=verify,
            )
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
                prune=prune,
                max_pixels=max_pixels,
                verify=verify,
                **shared,
            )
            left = None
        bar.done()
        front.say(report.line().replace("`prune`", "--prune"))
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
@read_as_option
@splits_option
@captions_option
@prefix_option
@replace_option
@prune_option
@verify_option
@max_megapixels_option
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
    detector_settings: tuple[str, ...],
    regions: str | None,
    top_k: int,
    spec: str,
    images_root: str | None,
    read_as: str | None,
    splits: tuple[str, ...],
    captions: int | None,
    prefix: str,
    replace: bool,
    prune: bool,
    verify: bool,
    max_pixels: int | None,
    rejects: str | None,
    actors: int | None,
) -> None:
    """`ingest` for a cluster: a pool of embedders on Ray Data and a Datasink into Qdrant.

    Every worker must be able to read SOURCE and the student. What is there already, unchanged, is not
    decoded. An embedded collection is written by one task. Exit code 3: some pictures were rejected.
    """
    from dclip_qdrant.cli.options import patience, where
    from dclip_qdrant.jobs.cluster import absolute, absolute_or_none, absolute_weights, connect
    from dclip_qdrant.jobs.ingest import IngestRequest, ingest
    from dclip_qdrant.serving.collection import CollectionSpec

    place = where(url, edge)
    store = {
        "collection": collection,
        "url": place["url"],
        "edge": absolute_or_none(place["edge"], "edge"),
        "api_key": api_key,
        "patience": patience(),
    }
    request = IngestRequest(
        source=absolute(source, "source"),
        student=absolute(student, "student"),
        store=store,
        detector=detector_arguments(
            detector,
            absolute_weights(detector_weights, "detector_weights"),
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
        splits=splits,
        captions=captions,
        read_as=read_as,
        prune=prune,
        verify=verify,
        max_pixels=max_pixels,
    )
    connect()
    report = ingest(request)
    front.say(report.line().replace("`prune`", "--prune"))
    click.echo(json.dumps({"collection": collection} | report.row()))
    raise_rejected(report, source, rejects)


COMMANDS = (ingest_command, ingest_on_ray_command)
