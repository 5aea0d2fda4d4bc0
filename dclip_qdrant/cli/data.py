"""Data for training: pairs made, fetched, mixed."""

import json
import os

import click

from dclip_qdrant.cli import front
from dclip_qdrant.cli.commands import command
from dclip_qdrant.cli.options import images_option, quiet_option
from dclip_qdrant.errors import PartialError, UsageError

Sources = list[tuple[str, int | None]]


def _fractions(_: click.Context, __: click.Parameter, value: str) -> tuple[float, float, float]:
    try:
        train, val, test = (float(v) for v in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r}: expected three numbers, e.g. 0.8,0.1,0.1") from None
    return train, val, test


def _split_map(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    if any("=" not in value for value in values):
        raise click.BadParameter("expected THEIRS=OURS, e.g. dev=val")
    return dict(value.split("=", 1) for value in values)


def _sources(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> Sources:
    sources: Sources = []
    for value in values:
        path, equals, count = value.rpartition("=")
        if equals and not count.isdigit():
            raise click.BadParameter(f"{value!r}: expected PAIRS or PAIRS=COUNT")
        sources.append((path, int(count)) if equals else (value, None))
    return sources


@command("pairs", example="dclip-qdrant pairs /data/shop -o /data/pairs --split-map dev=val")
@click.argument("source")
@click.option("-o", "--out", required=True, metavar="DIR", help="Folder for the pairs, or its URI.")
@images_option
@click.option(
    "--fractions",
    default="0.8,0.1,0.1",
    callback=_fractions,
    help="Train, val, test; for sources without splits of their own.",
)
@click.option(
    "--split-map",
    multiple=True,
    callback=_split_map,
    metavar="THEIRS=OURS",
    help="Rename a split; repeatable.",
)
@click.option("--seed", default=0, help="Of the split.")
@click.option(
    "--pictures-only",
    is_flag=True,
    help="Without captions, for `distill --pictures`: what a teacher says of them is learned from.",
)
@click.option(
    "--embed/--reference",
    default=None,
    help=(
        "Put pictures into the Parquet files, or refer to them.  [default: refer, except for "
        "tars and Parquet]"
    ),
)
@click.option(
    "--on-leak",
    type=click.Choice(["refuse", "drop-train"]),
    default="refuse",
    help="When a test or val picture stands in train too.",
)
@click.option("--overwrite", is_flag=True, help="Replace pairs that are there.")
@quiet_option
def pairs_command(
    source: str,
    out: str,
    images_root: str | None,
    pictures_only: bool,
    fractions: tuple[float, float, float],
    split_map: dict[str, str],
    seed: int,
    embed: bool | None,
    on_leak: str,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Reads pictures with captions from SOURCE and writes pairs.

    SOURCE is a folder with a captions file (CSV, TSV, JSONL, Flickr captions.txt or .token, COCO captions
    JSON, a Karpathy split JSON, a JSON list of rows), such a file itself, webdataset tars, Parquet, or
    pictures with text files beside them; local or a URI. A bad line, member or shard costs itself alone: it
    goes to OUT/rejects.jsonl by name (exit code 3).
    """
    from dclip_qdrant.cli.progress import Progress
    from dclip_qdrant.pairs.build import build

    bar = Progress(quiet=quiet)
    manifest = build(
        source,
        out,
        images_root=images_root,
        captions=not pictures_only,
        fractions=fractions,
        split_map=split_map,
        seed=seed,
        embed=embed,
        on_leak=on_leak,
        overwrite=overwrite,
        threads=max(4, os.cpu_count() or 4),
        progress=lambda count: bar(count, f"{count:,} pictures"),
    )
    bar.done()
    splits = ", ".join(f"{name} {count:,}" for name, count in manifest["splits"].items())
    pictures = sum(manifest["splits"].values())
    copies = f", {manifest['copies']:,} of them copies" if manifest["copies"] else ""
    front.say(f"{out}: {pictures:,} pictures with {manifest['captions']:,} captions ({splits}){copies}")
    click.echo(json.dumps(manifest))
    if manifest["rejects"]:
        do = f"reasons are in {out}/rejects.jsonl"
        raise PartialError(source, f"{manifest['rejects']:,} rows rejected", do=do)


@command("fetch", example="dclip-qdrant fetch Train_GCC-training.tsv -o /data/cc3m --limit 10000")
@click.argument("source")
@click.option(
    "-o", "--out", required=True, metavar="DIR", help="Folder for pictures, captions.jsonl and rejects.jsonl."
)
@click.option("--limit", type=click.IntRange(1), help="At most so many addresses, in the list's order.")
@click.option("--threads", type=click.IntRange(1), default=16, help="Requests under way at once.")
@click.option("--host-seconds", default=0.2, help="Between two requests to one host.")
@click.option(
    "--timeout", default=10.0, help="Seconds without a byte; a whole picture may take three times as long."
)
@click.option("--max-mb", default=20, help="Larger pictures are rejected.")
@click.option(
    "--allow-private", is_flag=True, help="Also addresses of private networks; only for lists of your own."
)
@quiet_option
def fetch_command(
    source: str,
    out: str,
    limit: int | None,
    threads: int,
    host_seconds: float,
    timeout: float,
    max_mb: int,
    allow_private: bool,
    quiet: bool,
) -> None:
    """Fetches pictures by a list of captions and addresses for `pairs` to read.

    The list is TSV, CSV, JSONL or Parquet; columns by their header, or by where the addresses stand
    (Conceptual Captions, Conceptual 12M). One request at a time to a host; a picture with several captions is
    fetched once. Run it again to go on; what failed is in OUT/rejects.jsonl (exit code 3). Mind the pictures'
    licences.
    """
    from dclip_qdrant.cli.progress import Progress
    from dclip_qdrant.pairs.fetch import Manners, fetch

    bar = Progress(quiet=quiet)
    manners = Manners(
        limit=limit,
        threads=threads,
        host_seconds=host_seconds,
        timeout=timeout,
        max_bytes=max_mb << 20,
        private=allow_private,
    )
    report = fetch(source, out, manners, progress=lambda count: bar(count, f"{count:,} addresses"))
    bar.done()
    click.echo(json.dumps(report.row()))
    if report.rejected:
        do = f"reasons are in {out}/rejects.jsonl"
        raise PartialError(source, f"{report.rejected:,} addresses rejected", do=do)


@command(
    "curate",
    example=(
        "dclip-qdrant curate /data/coco=45000 /data/shop -o /data/mixed --student "
        "/data/run/base --drop-worst 0.05"
    ),
)
@click.argument("sources", nargs=-1, required=True, callback=_sources, metavar="PAIRS[=COUNT]...")
@click.option("-o", "--out", required=True, metavar="DIR", help="Folder for the curated pairs.")
@click.option(
    "--mix",
    type=click.Choice(["dclip"]),
    help=(
        "DCLIP's counts for three sources: 45,000 of COCO, 13,500 of Flickr30k, 9,000 of Conceptual Captions."
    ),
)
@click.option("--near", default=3, help="Bits by which near-duplicates may differ; 0 keeps them.")
@click.option(
    "--student",
    metavar="DIR",
    help="A student that judges how well captions fit, e.g. the base that distill exports.",
)
@click.option("--min-score", type=float, help="Captions below this cosine leave.")
@click.option(
    "--drop-worst", default=0.0, help="This part of each source's captions leaves, the worst first."
)
@click.option("--seed", default=0, help="Of the choice.")
@click.option("--overwrite", is_flag=True, help="Replace pairs that are there.")
def curate_command(
    sources: Sources,
    out: str,
    mix: str | None,
    near: int,
    student: str | None,
    min_score: float | None,
    drop_worst: float,
    seed: int,
    overwrite: bool,
) -> None:
    """Mixes pairs: near-duplicates out, captions that don't fit out, so many train pictures of each source.
    Val and test stay whole.

    What leaves is listed in OUT/rejects.jsonl with its reason.
    """
    from dclip_qdrant.pairs.curate import DCLIP_MIX, curate
    from dclip_qdrant.serving.student import Student

    if mix:
        if len(sources) != len(DCLIP_MIX) or any(count is not None for _, count in sources):
            expected = "three, without counts: COCO, Flickr30k, Conceptual Captions"
            raise UsageError("`mix`", f"{len(sources)} sources", expected)
        sources = [(path, count) for (path, _), count in zip(sources, DCLIP_MIX, strict=True)]
    manifest = curate(
        sources,
        out,
        near=near,
        scorer=Student.load(student) if student else None,
        min_score=min_score,
        drop_worst=drop_worst,
        seed=seed,
        overwrite=overwrite,
    )
    splits = ", ".join(f"{name} {count:,}" for name, count in manifest["splits"].items())
    left_out = "".join(f"; {count:,} {reason}" for reason, count in manifest["left_out"].items())
    front.say(f"{out}: {splits}{left_out}")
    click.echo(json.dumps(manifest))


COMMANDS = (pairs_command, fetch_command, curate_command)
