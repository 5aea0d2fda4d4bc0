"""A live collection: tune its search, change its student, go back."""

import json
from typing import Any

import click

from dclip_qdrant.cli import front
from dclip_qdrant.cli.commands import command
from dclip_qdrant.cli.options import (
    images_option,
    opened_place,
    place_options,
    prefix_option,
    quiet_option,
    raise_rejected,
    rejects_option,
    spec_option,
    store_options,
    student_option,
    table_or_json,
    threads_option,
)
from dclip_qdrant.errors import UsageError

golden_split_option = click.option(
    "--split", metavar="NAME", help="Of the golden pairs.  [default: val, else test]"
)
alias_option = click.option("--alias", required=True, metavar="NAME", help="The name that apps query.")


@command(
    "tune",
    example="dclip-qdrant tune --pairs /data/pairs --student /data/run/student --collection pictures",
)
@click.option(
    "--pairs",
    "golden",
    required=True,
    metavar="DIR|FILE",
    help="Pairs whose captions aren't all indexed, or JSONL with {text, key}.",
)
@golden_split_option
@student_option
@store_options
@prefix_option
@click.option("--limit", type=click.IntRange(1), help="At most so many queries.")
@click.option(
    "--off-topic",
    metavar="FILE",
    help="Texts that the collection has nothing for, one a line.  [default: ours, of many trades]",
)
@click.option(
    "--index",
    "index_file",
    metavar="FILE",
    help="Also find the cheapest index that keeps 0.99 of an exact search's recall; its spec goes to FILE.",
)
@table_or_json
@quiet_option
def tune_command(
    golden: str,
    split: str | None,
    student: str,
    collection: str,
    url: str | None,
    edge: str | None,
    api_key: str | None,
    prefix: str,
    limit: int | None,
    off_topic: str | None,
    index_file: str | None,
    form: str,
    quiet: bool,
) -> None:
    """Finds hybrid search's weights and from which score on something was found, on your own captions.

    Both are stored in the collection, where `search --mode hybrid` and `search --min-probability` find them.

    They are chosen on one half of the pictures and measured on the other. Captions that stand in the
    collection word for word are left out.
    """
    from dclip_qdrant.cli.progress import Progress
    from dclip_qdrant.serving import tune_index
    from dclip_qdrant.serving.collection import CollectionSpec
    from dclip_qdrant.serving.golden import load_golden
    from dclip_qdrant.serving.student import Student
    from dclip_qdrant.serving.tune import describe, tune
    from dclip_qdrant.tables import storage

    if index_file and storage.as_path(index_file).exists():
        raise UsageError("`index`", f"{index_file} is there already", "a new file")
    loaded, choice = Student.load(student), None
    with opened_place(url, edge, api_key) as place:
        store = place.open(collection)
        store.describe()  # raises where there is none
        queries = load_golden(golden, store, split=split, prefix=prefix, limit=limit)
        bar = Progress(quiet=quiet)
        result = tune(
            store,
            loaded,
            queries,
            off_topic=off_topic,
            progress=lambda done: bar(done, f"{done:,} of {len(queries):,} queries"),
        )
        bar.done()
        row, lines = result.row(), [describe(result)]
        if index_file:
            choice = tune_index.tune_index(store, loaded, queries, place)
            row, lines = row | {"index": choice.row()}, lines + tune_index.describe(choice)
            if choice.setting:
                spec = CollectionSpec.of(store.describe())
                storage.write_text(index_file, tune_index.spec_of(choice.setting, spec, choice))
    click.echo(json.dumps(row, indent=1) if form == "json" else "\n".join(lines))
    if index_file and choice and choice.setting:
        front.say(f"{index_file}: reindex (or ingest) with it as --spec")


@command(
    "reindex",
    example=(
        "dclip-qdrant reindex --from live --student /data/run2/student --golden /data/pairs "
        "--old-student /data/run/student"
    ),
)
@click.option(
    "--from", "old", required=True, metavar="NAME", help="The collection (or alias) that serves now."
)
@student_option
@click.option("--to", metavar="NAME", help="The new collection.  [default: FROM-<8 hex of the student>]")
@click.option(
    "--source",
    metavar="PATH",
    help=(
        "Where the pictures are now; needed for pictures inside tars or Parquet.  [default: "
        "where they were ingested from]"
    ),
)
@images_option
@prefix_option
@spec_option
@click.option(
    "--golden",
    metavar="DIR|FILE",
    help="Pairs, or JSONL with {text, key}: both collections are measured on it, as `promote` asks.",
)
@golden_split_option
@click.option(
    "--old-student", metavar="DIR", help="The student folder that filled FROM; needed with --golden."
)
@click.option(
    "--mode",
    type=click.Choice(["dense", "regions", "hybrid"]),
    default="dense",
    help="How golden queries are asked.",
)
@click.option(
    "--bridge",
    type=click.IntRange(100),
    metavar="N",
    help=(
        "Embed N pictures, learn from them how old vectors lie in the new student's space, fill the new "
        "collection with mapped ones, then embed the rest: it can be promoted meanwhile."
    ),
)
@rejects_option
@place_options
@threads_option
@quiet_option
def reindex_command(
    old: str,
    student: str,
    to: str | None,
    source: str | None,
    images_root: str | None,
    prefix: str,
    spec: str,
    golden: str | None,
    split: str | None,
    old_student: str | None,
    mode: str,
    bridge: int | None,
    rejects: str | None,
    url: str | None,
    edge: str | None,
    api_key: str | None,
    threads: int | None,
    quiet: bool,
) -> None:
    """Builds a new collection beside the old one with another student; the old one keeps serving. Kill it and
    run it again: it goes on.

    Payload is carried over whole. Then `promote` moves an alias to it. Exit code 3: some pictures were
    rejected.
    """
    from dclip_qdrant.cli.progress import Progress
    from dclip_qdrant.serving.change import compare
    from dclip_qdrant.serving.collection import CollectionSpec
    from dclip_qdrant.serving.golden import load_golden
    from dclip_qdrant.serving.reindex import reindex, version_name
    from dclip_qdrant.serving.student import Student

    if golden and not old_student:
        raise UsageError("`golden`", "without `old_student`", f"the student folder that filled {old}")
    new_student = Student.load(student)
    with opened_place(url, edge, api_key) as place:
        old = place.aliases().get(old, old)
        to = to or version_name(old, new_student)
        rejects = rejects or f"{to}-rejects.jsonl"
        if golden:  # what is wrong with it is said before every picture is embedded
            load_golden(golden, place.open(old), split=split, prefix=prefix)
        bar = Progress(quiet=quiet)
        store, report = reindex(
            place,
            old,
            new_student,
            to=to,
            source=source,
            images_root=images_root,
            prefix=prefix,
            spec=CollectionSpec.load(spec),
            threads=threads,
            rejects=rejects,
            bridge=bridge,
            bridged=lambda count, likeness: front.say(
                f"{to} can be searched and promoted: {count:,} points have mapped vectors (cosine "
                f"{likeness:.2f} with true ones) until they are embedded"
            ),
            progress=lambda report: bar(report.seen, report.line()),
        )
        bar.done()
        front.say(f"{to}: {report.line()}")
        answer: dict[str, Any] = {"collection": to, "from": old} | report.row() | {"points": store.count()}
        if golden and old_student:
            queries = load_golden(golden, store, split=split, prefix=prefix)
            before = place.open(old)
            g = compare(before, Student.load(old_student), store, new_student, queries, mode=mode)
            answer["golden"] = g.row()
            front.say(
                f"golden, {g.queries:,} queries: R@10 {g.before['r@10'] * 100:.1f} -> "
                f"{g.after['r@10'] * 100:.1f}, mean of R@1, 5, 10 {g.difference * 100:+.1f} points, "
                f"95% [{g.ci[0] * 100:+.1f}, {g.ci[1] * 100:+.1f}]"
            )
        click.echo(json.dumps(answer))
    raise_rejected(report, old, rejects)


@command("promote", example="dclip-qdrant promote --alias live --to pictures-1a2b3c4d")
@alias_option
@click.option("--to", required=True, metavar="NAME", help="The collection it shall mean.")
@click.option(
    "--tolerance",
    default=0.0,
    help="Golden score that may be lost; 0.01 is one point of the mean of R@1, 5, 10.",
)
@click.option("--missing", type=click.IntRange(0), default=0, help="Points that the new collection may lack.")
@click.option("--force", is_flag=True, help="Without the gate.")
@place_options
def promote_command(
    alias: str,
    to: str,
    tolerance: float,
    missing: int,
    force: bool,
    url: str | None,
    edge: str | None,
    api_key: str | None,
) -> None:
    """Moves the alias to a collection in one call, if nothing is missing there and the golden queries are
    answered no worse. Exit code 3: below the gate."""
    from dclip_qdrant.serving.change import promote

    with opened_place(url, edge, api_key) as place:
        done = promote(place, alias, to, tolerance=tolerance, missing=missing, force=force)
    front.say(f"{alias} is {to} now" + (f" (before: {done.before})" if done.before else ""))
    click.echo(json.dumps(done.row()))


@command("rollback", example="dclip-qdrant rollback --alias live")
@alias_option
@place_options
def rollback_command(alias: str, url: str | None, edge: str | None, api_key: str | None) -> None:
    """Moves the alias back to what it was before the last promotion."""
    from dclip_qdrant.serving.change import rollback

    with opened_place(url, edge, api_key) as place:
        done = rollback(place, alias)
    front.say(f"{alias} is {done.collection} again")
    click.echo(json.dumps(done.row()))


@command("collections", example="dclip-qdrant collections --url http://localhost:6333")
@place_options
@table_or_json
def collections_command(url: str | None, edge: str | None, api_key: str | None, form: str) -> None:
    """Lists collections: their student, their points, the aliases that mean them."""
    from dclip_qdrant.serving.change import versions

    with opened_place(url, edge, api_key, looking_up=True) as place:
        rows = versions(place)
    if form == "json":
        click.echo(json.dumps([row.row() for row in rows], indent=1))
        return
    for row in rows:
        count = f"{row.points:,}" if row.points is not None else "in use"
        aliases = f"<- {', '.join(row.aliases)}" if row.aliases else ""
        click.echo(f"{row.collection:<32} {count:>10}  {row.student or '-':<28} {aliases}".rstrip())
    if not rows:
        front.say("no collections here")


@command(
    "push", example="dclip-qdrant push --edge ./dclip-edge --collection pictures --url http://localhost:6333"
)
@click.option("--edge", required=True, metavar="DIR", help="Folder of embedded collections.")
@click.option(
    "--collection",
    required=True,
    envvar="COLLECTION_NAME",
    show_envvar=True,
    metavar="NAME",
    help="The collection to copy.",
)
@click.option(
    "--url", envvar="QDRANT_URL", show_envvar=True, required=True, metavar="URL", help="The Qdrant server."
)
@click.option("--to", metavar="NAME", help="Its name there.  [default: the same]")
@click.option("--api-key", envvar="QDRANT_API_KEY", show_envvar=True, metavar="KEY", help="The server's key.")
@quiet_option
def push_command(
    edge: str, collection: str, url: str, to: str | None, api_key: str | None, quiet: bool
) -> None:
    """Copies an embedded collection to a Qdrant server, vectors and all; run again, it copies what is
    missing."""
    from dclip_qdrant.cli.progress import Progress
    from dclip_qdrant.serving.change import push

    bar = Progress(quiet=quiet)
    with opened_place(None, edge, None) as here, opened_place(url, None, api_key) as there:
        done, new = push(
            here,
            there,
            collection,
            to=to,
            progress=lambda done, new: bar(done, f"{done:,} points, {new:,} new"),
        )
    bar.done()
    front.say(f"{url}/{to or collection}: {done:,} points, {new:,} new")
    click.echo(json.dumps({"collection": to or collection, "points": done, "new": new}))


COMMANDS = (
    collections_command,
    tune_command,
    reindex_command,
    promote_command,
    rollback_command,
    push_command,
)
