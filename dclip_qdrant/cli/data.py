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


COMMANDS = (pairs,)
