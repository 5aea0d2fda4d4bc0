"""A live collection: tune its search, change its student, go back."""

import json

import click

from dclip_qdrant import front
from dclip_qdrant.cli.options import place_options, raise_rejected, store_options, the_place
from dclip_qdrant.errors import UsageError


@click.command()
@click.option("--pairs", "golden", required=True, help="A pairs folder whose captions aren't all indexed, or JSONL with {text, key}.")
@click.option("--split", help="Of the pairs.  [default: val, else test]")
@click.option("--student", required=True, help="The student folder that filled the collection.")
@store_options
@click.option("--prefix", default="", help="What `ingest --prefix` put before the keys.")
@click.option("--limit", type=int, help="At most so many queries.")
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option("--quiet", is_flag=True)
def tune(golden, split, student, collection, url, edge, api_key, prefix, limit, form, quiet):
    """Finds hybrid search's weights on your own captions and stores them in the collection; `search --mode hybrid` then uses them.

    Weights are chosen on one half of the pictures and measured on the other. Captions that stand in the collection word for word are left out.
    """
    from dclip_qdrant.golden import load
    from dclip_qdrant.progress import Progress
    from dclip_qdrant.student import Student
    from dclip_qdrant.tune import describe
    from dclip_qdrant.tune import tune as find

    with the_place(url, edge, api_key) as where:
        store = where.open(collection)
        store.describe()
        queries = load(golden, store, split=split, prefix=prefix, limit=limit)
        bar = Progress(quiet=quiet)
        result = find(store, Student.load(student), queries, say=lambda n: bar(n, f"{n:,} of {len(queries):,} queries"))
        bar.done()
    click.echo(json.dumps(result, indent=1) if form == "json" else describe(result))


@click.command()
@click.option("--from", "old", required=True, help="The collection (or alias) that serves now.")
@click.option("--student", required=True, help="The new student folder.")
@click.option("--to", help="The new collection.  [default: FROM-<8 hex of the student>]")
@click.option(
    "--source", help="Where the pictures are now; needed for pictures inside tars or Parquet. Default: where they were ingested from."
)
@click.option("--images", "images_root", help="Where the pictures are, when not beside the file that names them.")
@click.option("--prefix", default="", help="What `ingest --prefix` put before the keys of SOURCE.")
@click.option("--spec", default="default", show_default=True, help="What the new collection is.")
@click.option("--golden", help="Pairs, or JSONL with {text, key}: both collections are measured on it, as `promote` asks.")
@click.option("--split", help="Of the golden pairs.")
@click.option("--old-student", help="The student folder that filled FROM; needed with --golden.")
@click.option(
    "--mode", type=click.Choice(["dense", "regions", "hybrid"]), default="dense", show_default=True, help="How golden queries are asked."
)
@click.option("--rejects", help="Where rejected pictures are listed.  [default: TO-rejects.jsonl]")
@place_options
@click.option("--threads", type=int, help="Threads for decoding.")
@click.option("--quiet", is_flag=True)
def reindex(
    old, student, to, source, images_root, prefix, spec, golden, split, old_student, mode, rejects, url, edge, api_key, threads, quiet
):
    """Builds a new collection beside the old one with another student; the old one keeps serving. Kill it and run it again: it goes on.

    Payload is carried over whole. Then `promote` moves an alias to it. Exit code 3: some pictures were rejected.
    """
    from dclip_qdrant import change
    from dclip_qdrant.collection import CollectionSpec
    from dclip_qdrant.golden import load
    from dclip_qdrant.progress import Progress
    from dclip_qdrant.student import Student

    if golden and not old_student:
        raise UsageError("--golden", "without --old-student", "the student folder that filled " + old)
    new_student = Student.load(student)
    with the_place(url, edge, api_key) as where:
        old = where.aliases().get(old, old)
        to = to or change.version_name(old, new_student)
        rejects = rejects or f"{to}-rejects.jsonl"
        bar = Progress(quiet=quiet)
        store, report = change.reindex(where, old, new_student, to=to, source=source, images_root=images_root, prefix=prefix, spec=CollectionSpec.load(spec), threads=threads,
                                       rejects=rejects, progress=lambda r: bar(r.seen, r.line()))  # fmt: skip
        bar.done()
        front.say(f"{to}: {report.line()}")
        out = {"collection": to, "from": old} | report.row() | {"points": store.count()}
        if golden:
            before = where.open(old)
            g = change.compare(
                before, Student.load(old_student), store, new_student, load(golden, store, split=split, prefix=prefix), mode=mode
            )
            front.say(f"golden, {g['queries']:,} queries: R@10 {g['before']['r@10'] * 100:.1f} -> {g['after']['r@10'] * 100:.1f}, "
                      f"mean of R@1, 5, 10 {g['difference'] * 100:+.1f} points, 95% [{g['ci'][0] * 100:+.1f}, {g['ci'][1] * 100:+.1f}]")  # fmt: skip
            out["golden"] = g
        click.echo(json.dumps(out))
    raise_rejected(report, old, rejects)


@click.command()
@click.option("--alias", required=True, help="The name that apps query.")
@click.option("--to", required=True, help="The collection it shall mean.")
@click.option(
    "--tolerance", default=0.0, show_default=True, help="Golden score that may be lost; 0.01 is one point of the mean of R@1, 5, 10."
)
@click.option("--missing", default=0, show_default=True, help="Points that the new collection may lack.")
@click.option("--force", is_flag=True, help="Without the gate.")
@place_options
def promote(alias, to, tolerance, missing, force, url, edge, api_key):
    """Moves the alias to a collection in one call, if nothing is missing there and the golden queries are answered no worse. Exit code 3: below the gate."""
    from dclip_qdrant import change

    with the_place(url, edge, api_key) as where:
        done = change.promote(where, alias, to, tolerance=tolerance, missing=missing, force=force)
    front.say(f"{alias} is {to} now" + (f" (before: {done['before']})" if done["before"] else ""))
    click.echo(json.dumps(done))


@click.command()
@click.option("--alias", required=True, help="The name that apps query.")
@place_options
def rollback(alias, url, edge, api_key):
    """Moves the alias back to what it was before the last promotion."""
    from dclip_qdrant import change

    with the_place(url, edge, api_key) as where:
        done = change.rollback(where, alias)
    front.say(f"{alias} is {done['collection']} again")
    click.echo(json.dumps(done))


@click.command()
@place_options
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
def collections(url, edge, api_key, form):
    """Lists collections: their student, their points, the aliases that mean them."""
    from dclip_qdrant.change import versions

    with the_place(url, edge, api_key) as where:
        rows = versions(where)
    if form == "json":
        click.echo(json.dumps(rows, indent=1))
        return
    for r in rows:
        count = f"{r['points']:,}" if r["points"] is not None else "in use"
        click.echo(
            f"{r['collection']:<32} {count:>10}  {r['student'] or '-':<28} {'<- ' + ', '.join(r['aliases']) if r['aliases'] else ''}".rstrip()
        )
    if not rows:
        front.say("no collections here")


@click.command()
@click.option("--edge", required=True, help="Folder of embedded collections.")
@click.option("--collection", required=True, envvar="COLLECTION_NAME", help="The collection to copy.")
@click.option("--url", envvar="QDRANT_URL", required=True, help="The Qdrant server.")
@click.option("--to", help="Its name there.  [default: the same]")
@click.option("--api-key", envvar="QDRANT_API_KEY", help="The server's key; better in QDRANT_API_KEY.")
@click.option("--quiet", is_flag=True)
def push(edge, collection, url, to, api_key, quiet):
    """Copies an embedded collection to a Qdrant server, vectors and all; run again, it copies what is missing."""
    from dclip_qdrant import change
    from dclip_qdrant.progress import Progress
    from dclip_qdrant.stores import place

    here, there = place(edge=edge), place(url=url, api_key=api_key)
    bar = Progress(quiet=quiet)
    try:
        done, new = change.push(here, there, collection, to=to, progress=lambda d, n: bar(d, f"{d:,} points, {n:,} new"))
    finally:
        here.close()
        there.close()
    bar.done()
    front.say(f"{url}/{to or collection}: {done:,} points, {new:,} new")
    click.echo(json.dumps({"collection": to or collection, "points": done, "new": new}))


COMMANDS = (tune, reindex, promote, rollback, collections, push)
