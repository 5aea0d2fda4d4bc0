"""Collections: fill, search, look at."""

import json
from pathlib import Path
from typing import Any

import click

from dclip_qdrant import front
from dclip_qdrant.cli.options import FORMATS, key_values, open_store, raise_rejected, store_options
from dclip_qdrant.errors import UsageError


@click.command()
@click.argument("source")
@click.option("--student", required=True, help="A student folder.")
@store_options
@click.option("--detector", help="Find regions: yolo, grid, or package.module:Class.")
@click.option("--weights", help="The detector's weights.")
@click.option("--detector-set", multiple=True, metavar="KEY=VALUE", help="The detector's options, e.g. min_score=0.4.")
@click.option("--regions", "regions_file", help="Regions that are there already: a regions folder (parts in the contract).")
@click.option("--top-k", default=4, show_default=True, help="Regions kept a picture, by confidence x area.")
@click.option(
    "--spec", default="default", show_default=True, help="What a new collection is: a name in schemas/collections or a .toml file."
)
@click.option("--images", "images_root", help="Where the pictures are, when not beside the file that names them.")
@click.option("--split", "splits", multiple=True, help="Only these splits of a source that has splits.")
@click.option("--prefix", default="", help="Put before every key, to keep sources apart.")
@click.option(
    "--payload-layout",
    "layout",
    type=click.Choice(["flat", "langchain"]),
    default="flat",
    show_default=True,
    help="langchain adds page_content and metadata.",
)
@click.option(
    "--into-existing",
    "field",
    metavar="FIELD",
    help="Add our vectors to the points of somebody's collection (--url) whose payload FIELD holds a picture's key.",
)
@click.option("--replace", is_flag=True, help="A key that another picture has is taken over.")
@click.option("--limit", type=int, help="Stop after so many pictures.")
@click.option("--rejects", help="Where rejected pictures are listed.  [default: COLLECTION-rejects.jsonl]")
@click.option("--threads", type=int, help="Threads for decoding.")
@click.option("--quiet", is_flag=True)
def ingest(
    source,
    student,
    collection,
    url,
    edge,
    api_key,
    detector,
    weights,
    detector_set,
    regions_file,
    top_k,
    spec,
    images_root,
    splits,
    prefix,
    layout,
    field,
    replace,
    limit,
    rejects,
    threads,
    quiet,
):
    """Embeds the pictures in SOURCE (folder, CSV, JSONL, tar, Parquet, pairs) and fills a collection.

    Pictures that are there already, unchanged, are skipped without being decoded; a killed run goes on where it was. Exit code 3: some were rejected.
    """
    from dclip_qdrant.collection import CollectionSpec
    from dclip_qdrant.ingest import Embedder
    from dclip_qdrant.ingest import ingest as fill
    from dclip_qdrant.progress import Progress
    from dclip_qdrant.student import Student

    if detector and regions_file:
        raise UsageError("--detector", "and --regions", "one of them")
    loaded = Student.load(student)
    wish = CollectionSpec.load(spec)
    found = _detector(detector, weights, detector_set)
    boxes = _regions(regions_file)
    if field and (edge or not url):
        raise UsageError("--into-existing", "an embedded collection", "--url", "qdrant-edge collections are made by dclip-qdrant alone")
    store = open_store(collection, url, edge, api_key)
    rejects = rejects or f"{collection}-rejects.jsonl"
    bar = Progress(quiet=quiet)
    embedder = Embedder(loaded, detector=found, regions=boxes, top_k=top_k, threads=threads, layout=layout)
    how: dict[str, Any] = {"spec": wish, "images_root": images_root, "prefix": prefix, "splits": splits, "replace": replace, "limit": limit, "rejects": rejects,
                           "progress": lambda r: bar(r.seen, r.line())}  # fmt: skip
    try:
        if field:
            from dclip_qdrant.into_existing import ingest_into

            report, guest = ingest_into(source, embedder, store, field=field, **how)
        else:
            report, guest = fill(source, embedder, store, **how), None
        bar.done()
        front.say(report.line())
        row = {"collection": collection} | report.row() | {"points": store.count()}
        if guest:
            front.say(f"{guest.alone:,} of {guest.points:,} points have no picture in {source}")
            row["without_picture"] = guest.alone
        click.echo(json.dumps(row))
    finally:
        store.close()
    if report.seen == 0:
        raise UsageError(source, "no pictures here", "files ending in .jpg, .png, ...")
    raise_rejected(report, source, rejects)


def _detector(name: str | None, weights: str | None, options: tuple[str, ...]) -> Any:
    if not name:
        if weights:
            raise UsageError("--weights", "without a detector", "--detector yolo")
        return None
    from dclip_qdrant.detectors import build

    return build(name, key_values(options, "--detector-set") | ({"weights": weights} if weights else {}))


def _regions(path: str | None) -> Any:
    if not path:
        return None
    from upath import UPath

    from dclip_qdrant.regions import load_regions

    if not UPath(path).is_dir():
        raise UsageError("--regions", f"no folder {path}", "a regions folder")
    return load_regions(UPath(path))


@click.command()
@click.argument("text", required=False)
@click.option("--image", "image_path", type=click.Path(), help="Search with a picture.")
@click.option("--student", required=True, help="A student folder.")
@store_options
@click.option(
    "--mode",
    type=click.Choice(["dense", "regions", "hybrid"]),
    default="dense",
    show_default=True,
    help="Whole pictures; their best regions; dense and BM25 over captions.",
)
@click.option(
    "--filter", "filters", multiple=True, metavar="COND", help="labels=dog|cat, labels!=car, caption~red ball, width>=640; all must hold."
)
@click.option("--limit", "-n", default=10, show_default=True)
@click.option("--candidates", default=100, show_default=True, help="What hybrid and regions choose from.")
@click.option(
    "--weights", metavar="D,B[,R]", help="Of dense, BM25 and regions in hybrid.  [default: what `tune` left in the collection, else 1,1,0]"
)
@click.option("--diversity", default=0.0, show_default=True, help="0 to 1: fewer pictures that look alike (MMR).")
@click.option("--explain", is_flag=True, help="Show each hit's rank in each stage.")
@click.option("--format", "form", type=FORMATS, default="table", show_default=True)
def search(text, image_path, student, collection, url, edge, api_key, mode, filters, limit, candidates, weights, diversity, explain, form):
    """Finds pictures by TEXT or --image."""
    from dclip_qdrant import images
    from dclip_qdrant.search import Fusion, parse_filter
    from dclip_qdrant.search import search as find
    from dclip_qdrant.student import Student

    try:
        fusion = Fusion(*(float(w) for w in weights.split(","))) if weights else None
    except (ValueError, TypeError):
        raise UsageError("--weights", repr(weights), "two or three numbers, e.g. 1,0.5 or 1,0.5,0.3") from None
    where = tuple(parse_filter(f) for f in filters)
    picture = images.open_rgb(images.read(image_path), image_path) if image_path else None
    loaded = Student.load(student)
    store = open_store(collection, url, edge, api_key)
    try:
        hits = find(store, loaded, text=text, image=picture, mode=mode, where=where, limit=limit, candidates=candidates, fusion=fusion, diversity=diversity,
                    explain=explain)  # fmt: skip
    finally:
        store.close()
    if form == "json":
        click.echo(json.dumps([h.row() for h in hits], indent=1))
    elif form == "jsonl":
        for h in hits:
            click.echo(json.dumps(h.row()))
    elif form == "paths":
        for h in hits:
            click.echo(h.payload.get("uri") or h.payload.get("key") or h.id)
    else:
        for rank, h in enumerate(hits, 1):
            region = f"  [{h.label} at {', '.join(f'{v:.0f}' for v in h.box)}]" if h.region is not None else ""
            stages = "  (" + ", ".join(f"{k} {v or '-'}" for k, v in h.ranks.items()) + ")" if h.ranks is not None else ""
            caption = (h.payload.get("caption") or "").split("\n")[0]
            click.echo(f"{rank:>3}  {h.score:.4f}  {h.payload.get('key')}  {caption[:70]}{region}{stages}")
    if not hits:
        front.say("nothing found" + (" with these filters" if filters else ""))


@click.command()
@click.argument("what")
@click.option("--url", envvar="QDRANT_URL", help="WHAT is a collection on this server.")
@click.option("--edge", help="WHAT is an embedded collection in this folder.")
@click.option("--api-key", envvar="QDRANT_API_KEY")
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
def inspect(what, url, edge, api_key, form):
    """Says what a student folder or a collection is."""
    from dclip_qdrant.collection import META

    if Path(what).is_dir() and not edge:
        from dclip_qdrant.student import Student

        s = Student.load(what)
        facts = {"student": s.model_name, "folder": str(s.folder), "fingerprint": s.fingerprint, "base": s.manifest["base"], "dim": s.dim, "image_size": s.manifest["image_size"],
                 "context_length": s.manifest["context_length"], "parameters": s.manifest["parameters"],
                 "megabytes": {f.name: round(f.stat().st_size / 1e6, 1) for f in sorted(s.folder.glob("*.onnx"))}}  # fmt: skip
        figures = json.loads((s.folder / "metrics.json").read_text())
        if "test" in figures:
            facts |= {
                "mean_r@1": round(figures["test"]["mean_r@1"], 4),
                "retention": figures.get("retention"),
                "alpha": figures.get("alpha"),
            }
    else:
        store = open_store(what, url, edge, api_key)
        try:
            facts = {
                "collection": what,
                **store.describe(),
                "filled_by": store.metadata().get(META, {}).get("student", "something else than dclip-qdrant"),
            }
        finally:
            store.close()
    if form == "json":
        click.echo(json.dumps(facts, indent=1))
    else:
        for k, v in facts.items():
            click.echo(f"{k:<16} {', '.join(f'{a} {b}' for a, b in v.items()) if isinstance(v, dict) else v}")


COMMANDS = (ingest, search, inspect)
