"""Training data: pairs."""

import json
import os
from typing import Any

import click

from dclip_qdrant import front
from dclip_qdrant.errors import PartialError


def _fractions(_: Any, __: Any, value: str) -> tuple[float, float, float]:
    try:
        a, b, c = (float(v) for v in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r}: expected three numbers, e.g. 0.8,0.1,0.1") from None
    return a, b, c


def _mapping(_: Any, __: Any, values: tuple[str, ...]) -> dict[str, str]:
    if any("=" not in v for v in values):
        raise click.BadParameter("expected THEIRS=OURS, e.g. dev=val")
    return dict(v.split("=", 1) for v in values)


@click.command()
@click.argument("source")
@click.option("-o", "--out", required=True, help="Folder for the pairs.")
@click.option("--images", "images_root", help="Where the pictures are, when not beside the captions file.")
@click.option(
    "--fractions",
    default="0.8,0.1,0.1",
    show_default=True,
    callback=_fractions,
    help="Train, val, test; for sources without splits of their own.",
)
@click.option("--split-map", multiple=True, callback=_mapping, metavar="THEIRS=OURS", help="Rename a split, e.g. --split-map val=test.")
@click.option("--seed", default=0, show_default=True, help="Of the split.")
@click.option(
    "--embed/--reference",
    default=None,
    help="Put pictures into the Parquet files or refer to them. Default: refer, except for tars and Parquet.",
)
@click.option(
    "--on-leak",
    type=click.Choice(["refuse", "drop-train"]),
    default="refuse",
    show_default=True,
    help="When a test or val picture stands in train too.",
)
@click.option("--overwrite", is_flag=True, help="Replace pairs that are there.")
@click.option("--quiet", is_flag=True)
def pairs(source, out, images_root, fractions, split_map, seed, embed, on_leak, overwrite, quiet):
    """Reads pictures with captions from SOURCE and writes pairs.

    SOURCE is a folder with a captions file (CSV, TSV, JSONL, Flickr captions.txt or .token, COCO captions JSON, a Karpathy split JSON), such a file itself,
    webdataset tars, or Parquet. Unreadable rows go to OUT/rejects.jsonl (exit code 3).
    """
    from dclip_qdrant.pairs.build import build
    from dclip_qdrant.progress import Progress

    bar = Progress(quiet=quiet)
    m = build(source, out, images_root=images_root, fractions=fractions, split_map=split_map, seed=seed, embed=embed, on_leak=on_leak, overwrite=overwrite,
              threads=max(4, os.cpu_count() or 4), progress=lambda n: bar(n, f"{n:,} pictures"))  # fmt: skip
    bar.done()
    splits = ", ".join(f"{k} {v:,}" for k, v in m["splits"].items())
    front.say(
        f"{out}: {sum(m['splits'].values()):,} pictures with {m['captions']:,} captions ({splits})"
        + (f", {m['copies']:,} of them copies" if m["copies"] else "")
    )
    click.echo(json.dumps(m))
    if m["rejects"]:
        raise PartialError(source, f"{m['rejects']:,} rows rejected", do=f"reasons are in {out}/rejects.jsonl")


@click.command()
@click.argument("source")
@click.option("-o", "--out", required=True, help="Folder for pictures, captions.jsonl and rejects.jsonl.")
@click.option("--limit", type=int, help="At most so many addresses, in the list's order.")
@click.option("--threads", default=16, show_default=True)
@click.option("--host-seconds", default=0.2, show_default=True, help="Between two requests to one host.")
@click.option("--timeout", default=10.0, show_default=True, help="Seconds.")
@click.option("--max-mb", default=20, show_default=True, help="Larger pictures are rejected.")
@click.option("--allow-private", is_flag=True, help="Also addresses of private networks; only for lists of your own.")
@click.option("--quiet", is_flag=True)
def fetch(source, out, limit, threads, host_seconds, timeout, max_mb, allow_private, quiet):
    """Fetches pictures by a list of URLs (Conceptual Captions' TSV: caption, URL; or JSONL with url and caption) for `pairs` to read.

    One request at a time to a host. Run it again to go on; what failed is in OUT/rejects.jsonl (exit code 3). Mind the pictures' licences.
    """
    from dclip_qdrant.pairs.fetch import Manners
    from dclip_qdrant.pairs.fetch import fetch as run
    from dclip_qdrant.progress import Progress

    bar = Progress(quiet=quiet)
    manners = Manners(limit=limit, threads=threads, host_seconds=host_seconds, timeout=timeout, max_bytes=max_mb << 20, private=allow_private)
    counts = run(source, out, manners, progress=lambda n: bar(n, f"{n:,} addresses"))
    bar.done()
    click.echo(json.dumps(counts))
    if counts["rejected"]:
        raise PartialError(source, f"{counts['rejected']:,} addresses rejected", do=f"reasons are in {out}/rejects.jsonl")


def _source(_: Any, __: Any, values: tuple[str, ...]) -> list[tuple[str, int | None]]:
    out = []
    for v in values:
        path, eq, count = v.rpartition("=")
        if eq and not count.isdigit():
            raise click.BadParameter(f"{v!r}: expected PAIRS or PAIRS=COUNT")
        out.append((path, int(count)) if eq else (v, None))
    return out


@click.command()
@click.argument("sources", nargs=-1, required=True, callback=_source, metavar="PAIRS[=COUNT]...")
@click.option("-o", "--out", required=True, help="Folder for the curated pairs.")
@click.option("--mix", type=click.Choice(["dclip"]), help="DCLIP's counts for three sources: 45,000 of COCO, 13,500 of Flickr30k, 9,000 of Conceptual Captions.")
@click.option("--near", default=3, show_default=True, help="Bits by which near-duplicates may differ; 0 keeps them.")
@click.option("--student", help="A student folder that judges how well captions fit, e.g. the base that distill.py exports.")
@click.option("--min-score", type=float, help="Captions below this cosine leave.")
@click.option("--drop-worst", default=0.0, show_default=True, help="This part of each source's captions leaves, the worst first.")
@click.option("--seed", default=0, show_default=True, help="Of the choice.")
@click.option("--overwrite", is_flag=True)
def curate(sources, out, mix, near, student, min_score, drop_worst, seed, overwrite):
    """Mixes pairs: near-duplicates out, captions that don't fit out, so many train pictures of each source. Val and test stay whole.

    What leaves is listed in OUT/rejects.jsonl with its reason.
    """
    from dclip_qdrant.errors import UsageError
    from dclip_qdrant.pairs.curate import DCLIP_MIX
    from dclip_qdrant.pairs.curate import curate as run
    from dclip_qdrant.student import Student

    if mix:
        if len(sources) != len(DCLIP_MIX) or any(n is not None for _, n in sources):
            raise UsageError("--mix", f"{len(sources)} sources", "three, without counts: COCO, Flickr30k, Conceptual Captions")
        sources = [(path, n) for (path, _), n in zip(sources, DCLIP_MIX, strict=True)]
    judge = Student.load(student) if student else None
    m = run(sources, out, near=near, scorer=judge, min_score=min_score, drop_worst=drop_worst, seed=seed, overwrite=overwrite, say=front.say)
    front.say(f"{out}: " + ", ".join(f"{k} {v:,}" for k, v in m["splits"].items()) + "".join(f"; {v:,} {k}" for k, v in m["left_out"].items()))
    click.echo(json.dumps(m))


COMMANDS = (pairs, fetch, curate)
