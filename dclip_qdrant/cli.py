"""`dclip-qdrant`: parses, calls one function, prints. Data goes to stdout, everything else to stderr."""

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import click

from dclip_qdrant import __version__, front
from dclip_qdrant.errors import PartialError, UsageError

FORMATS = click.Choice(["table", "json", "jsonl", "paths"])


class _Group(click.Group):
    """Says "did you mean" for a command that isn't there."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            from dclip_qdrant.lookup import did_you_mean

            ctx.fail(f"no command {args[0]!r}: {did_you_mean(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


def _config(path: str | None) -> dict[str, Any]:
    """`dclip.toml`: top-level keys for every command, a [command] table for one. Below environment and flags."""
    file = Path(path or "dclip.toml")
    if not file.is_file():
        if path:
            raise UsageError("--config", f"no file {path}")
        return {}
    try:
        raw = tomllib.loads(file.read_text())
    except tomllib.TOMLDecodeError as e:
        raise UsageError(file, f"not TOML: {e}") from e
    everywhere = {k.replace("-", "_"): v for k, v in raw.items() if not isinstance(v, dict)}
    return {name: everywhere | {k.replace("-", "_"): v for k, v in raw.get(name, {}).items()} for name in main.commands}


def _version(ctx: click.Context, _: Any, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        click.echo(f"dclip-qdrant {__version__}")
        for package in (
            "qdrant-client",
            "qdrant-edge-py",
            "onnxruntime",
            "numpy",
            "pyarrow",
            "torch",
            "open_clip_torch",
            "ray",
            "ultralytics",
        ):
            try:
                click.echo(f"  {package} {version(package)}")
            except PackageNotFoundError:
                click.echo(f"  {package} -")
        ctx.exit()


@click.group(cls=_Group, context_settings={"auto_envvar_prefix": "DCLIP", "help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Show the versions of this and of what it stands on.",
)
@click.option("--config", help="A TOML file with defaults; ./dclip.toml is read by itself.")
@click.pass_context
def main(ctx: click.Context, config: str | None) -> None:
    """A team's own light CLIP for Qdrant: pairs in, a distilled student out, pictures in, hits out.

    Values come from flags, else the environment (QDRANT_URL, QDRANT_API_KEY, DCLIP_<COMMAND>_<OPTION>), else dclip.toml.
    Exit codes: 0 ok, 1 failure, 2 usage, 3 some rows rejected or below a gate, 4 wrong student for the collection, 130 interrupted.
    """
    ctx.default_map = _config(config)


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


@main.command()
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


def _store_options(command: Any) -> Any:
    for option in reversed((
        click.option("--collection", required=True, envvar="COLLECTION_NAME", help="The collection's name."),
        click.option("--url", envvar="QDRANT_URL", help="A Qdrant server. Default: an embedded collection (see --edge)."),
        click.option("--edge", help="Folder of embedded collections (qdrant-edge).  [default: ./dclip-edge]"),
        click.option("--api-key", envvar="QDRANT_API_KEY", help="The server's key; better in QDRANT_API_KEY than on the command line."),
    )):  # fmt: skip
        command = option(command)
    return command


def _open_store(collection: str, url: str | None, edge: str | None, api_key: str | None) -> Any:
    from dclip_qdrant.stores import open_store

    return open_store(collection, url=None if edge else url, edge=edge or (None if url else "dclip-edge"), api_key=api_key)


def _pair(values: tuple[str, ...], flag: str) -> dict[str, Any]:
    out = {}
    for v in values:
        key, eq, value = v.partition("=")
        if not eq:
            raise UsageError(flag, repr(v), "key=value")
        try:
            out[key] = json.loads(value)
        except json.JSONDecodeError:
            out[key] = value
    return out


@main.command()
@click.argument("source")
@click.option("--student", required=True, help="A student folder.")
@_store_options
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
    store = _open_store(collection, url, edge, api_key)
    rejects = rejects or f"{collection}-rejects.jsonl"
    bar = Progress(quiet=quiet)
    try:
        report = fill(source, Embedder(loaded, detector=found, regions=boxes, top_k=top_k, threads=threads), store, spec=wish, images_root=images_root, prefix=prefix,
                      splits=splits, replace=replace, limit=limit, rejects=rejects, progress=lambda r: bar(r.seen, r.line()))  # fmt: skip
        bar.done()
        front.say(report.line())
        click.echo(
            json.dumps(
                {
                    "collection": collection,
                    "seen": report.seen,
                    "embedded": report.embedded,
                    "unchanged": report.unchanged,
                    "rejected": report.rejected,
                    "points": store.count(),
                }
            )
        )
    finally:
        store.close()
    if report.seen == 0:
        raise UsageError(source, "no pictures here", "files ending in .jpg, .png, ...")
    if report.rejected:
        for reason in report.reasons:
            front.say(f"  rejected: {reason}")
        raise PartialError(source, f"{report.rejected:,} pictures rejected", do=f"reasons are in {rejects}")


def _detector(name: str | None, weights: str | None, options: tuple[str, ...]) -> Any:
    if not name:
        if weights:
            raise UsageError("--weights", "without a detector", "--detector yolo")
        return None
    from dclip_qdrant.detectors import build

    return build(name, _pair(options, "--detector-set") | ({"weights": weights} if weights else {}))


def _regions(path: str | None) -> Any:
    if not path:
        return None
    from upath import UPath

    from dclip_qdrant.contracts import REGIONS
    from dclip_qdrant.regions import Regions
    from dclip_qdrant.stages import parts

    if not UPath(path).is_dir():
        raise UsageError("--regions", f"no folder {path}", "a regions folder")
    return {r["key"]: Regions.of_row(r) for t in parts(UPath(path), REGIONS, ["key", "boxes", "scores", "labels"]) for r in t.to_pylist()}


@main.command()
@click.argument("text", required=False)
@click.option("--image", "image_path", type=click.Path(), help="Search with a picture.")
@click.option("--student", required=True, help="A student folder.")
@_store_options
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
@click.option("--weights", default="1,1", show_default=True, help="Of dense and BM25 in hybrid.")
@click.option("--format", "form", type=FORMATS, default="table", show_default=True)
def search(text, image_path, student, collection, url, edge, api_key, mode, filters, limit, candidates, weights, form):
    """Finds pictures by TEXT or --image."""
    from dclip_qdrant import images
    from dclip_qdrant.search import parse_filter
    from dclip_qdrant.search import search as find
    from dclip_qdrant.student import Student

    try:
        dense, words = (float(w) for w in weights.split(","))
    except ValueError:
        raise UsageError("--weights", repr(weights), "two numbers, e.g. 1,0.5") from None
    where = tuple(parse_filter(f) for f in filters)
    picture = images.open_rgb(images.read(image_path), image_path) if image_path else None
    loaded = Student.load(student)
    store = _open_store(collection, url, edge, api_key)
    try:
        hits = find(
            store, loaded, text=text, image=picture, mode=mode, where=where, limit=limit, candidates=candidates, weights=(dense, words)
        )
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
            caption = (h.payload.get("caption") or "").split("\n")[0]
            click.echo(f"{rank:>3}  {h.score:.4f}  {h.payload.get('key')}  {caption[:70]}{region}")
    if not hits:
        front.say("nothing found" + (" with these filters" if filters else ""))


@main.command()
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
        store = _open_store(what, url, edge, api_key)
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


@main.command()
@click.option("--student", required=True, help="A student folder.")
@click.option("--pairs", "pairs_path", required=True, help="Pairs to measure retrieval on.")
@click.option("--split", help="Default: test, else val.")
@click.option("--labelled", help="Labelled pictures for zero-shot accuracy (folder per class, or Parquet).")
@click.option("--base", help="The base as a student folder, for retention. Default: the one that distill left beside the student.")
@click.option("--bootstrap", default=1000, show_default=True, help="Resamples for the intervals; 0 leaves them out.")
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
def evaluate(student, pairs_path, split, labelled, base, bootstrap, form):
    """Measures a student: recall both ways, MRR, mAP, zero-shot accuracy, retention, size, speed."""
    from dclip_qdrant import evaluation
    from dclip_qdrant.pairs import Pairs
    from dclip_qdrant.student import Student

    loaded = Student.load(student)
    reference = Student.load(base) if base else evaluation.find_base(loaded) if labelled else None
    result = evaluation.evaluate(loaded, Pairs.open(pairs_path), split=split, labelled=labelled, base=reference, bootstrap=bootstrap)
    click.echo(json.dumps(result, indent=1) if form == "json" else evaluation.describe(result))


@main.command()
@click.argument("name", required=False)
def recipes(name):
    """Lists the recipes, or shows one."""
    from dclip_qdrant.recipe import HERE, Recipe, recipe_names

    if name:
        Recipe.load(name)
        click.echo((HERE / f"{name}.toml").read_text() if not name.endswith(".toml") else Path(name).read_text(), nl=False)
        return
    for n in recipe_names():
        click.echo(f"{n:<20} {Recipe.load(n).about}")


def program() -> None:
    """The console script."""
    front.run(main)


if __name__ == "__main__":
    program()
