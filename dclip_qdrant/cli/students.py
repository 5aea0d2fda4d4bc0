"""Students and recipes: measure, list."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dclip_qdrant.cli import front
from dclip_qdrant.cli.commands import Group, RenamedOption, command
from dclip_qdrant.cli.options import student_option, table_or_json
from dclip_qdrant.errors import UsageError

if TYPE_CHECKING:
    from dclip_qdrant.pairs import Pairs
    from dclip_qdrant.serving.index_recall import Setting
    from dclip_qdrant.serving.student import Student


@command(
    "evaluate",
    example=(
        "dclip-qdrant evaluate --student /data/run/student --pairs /data/pairs --labelled "
        "/data/labelled --through edge"
    ),
)
@student_option
@click.option("--pairs", required=True, metavar="DIR", help="Pairs to measure retrieval on.")
@click.option("--split", metavar="NAME", help="Of the pairs.  [default: test, else val]")
@click.option(
    "--labelled",
    metavar="DIR|FILE",
    help="Labelled pictures for zero-shot accuracy (a folder per class, or Parquet).",
)
@click.option(
    "--base-student",
    cls=RenamedOption,
    former=["--base"],
    metavar="DIR",
    help=(
        "The base as a student folder, for retention.  [default: the one that distill left "
        "beside the student]"
    ),
)
@click.option(
    "--bootstrap",
    type=click.IntRange(0),
    default=1000,
    help="Resamples for the intervals; 0 leaves them out.",
)
@click.option(
    "--through",
    metavar="edge|URL",
    help="Also measure what an index leaves of it: qdrant-edge in a temporary folder, or a server.",
)
@click.option(
    "--settings",
    cls=RenamedOption,
    former=["--index"],
    metavar="SETTING,SETTING",
    help="Of --through: KIND[@DIM][+rescore[N]][+efN], KIND float32, float16, int8, turbo4, turbo2, binary.",
)
@click.option(
    "--beside",
    metavar="DIR",
    help="Another student for the index table and the plot, e.g. one trained without [index].",
)
@click.option("--queries", type=click.IntRange(1), default=1000, help="Captions to query the index with.")
@click.option("--plot", "plot_file", metavar="FILE", help="Recall over bytes a vector, as .svg or .png.")
@click.option("--api-key", envvar="QDRANT_API_KEY", show_envvar=True, metavar="KEY", help="The server's key.")
@table_or_json
def evaluate_command(
    student: str,
    pairs: str,
    split: str | None,
    labelled: str | None,
    base_student: str | None,
    bootstrap: int,
    through: str | None,
    settings: str | None,
    beside: str | None,
    queries: int,
    plot_file: str | None,
    api_key: str | None,
    form: str,
) -> None:
    """Measures a student: recall both ways, MRR, mAP, zero-shot accuracy, retention, size, speed; with
    --through, recall over bytes in an index."""
    from dclip_qdrant.pairs import Pairs
    from dclip_qdrant.serving import index_recall
    from dclip_qdrant.serving.evaluation import describe, evaluate, find_base
    from dclip_qdrant.serving.student import Student

    for parameter, given in (("settings", settings), ("beside", beside), ("plot_file", plot_file)):
        if given and not through:
            expected = "`through` edge, or `through` http://HOST:6333"
            raise UsageError(f"`{parameter}`", "without `through`", expected)
    loaded, opened = Student.load(student), Pairs.open(pairs)
    wanted = index_recall.parse(settings or index_recall.DEFAULT, loaded.dim) if through else []
    reference = Student.load(base_student) if base_student else find_base(loaded) if labelled else None
    result = evaluate(loaded, opened, split=split, labelled=labelled, base=reference, bootstrap=bootstrap)
    series: dict[str, list[dict[str, Any]]] = {}
    if through:
        students = [loaded, Student.load(beside)] if beside else [loaded]
        for each in students:
            series[each.model_name] = _through_index(
                each, opened, result["split"], wanted, through, api_key, queries
            )
        result["index"] = series[loaded.model_name]
        if beside:
            other = students[-1].model_name
            result["index_beside"] = {"student": other, "rows": series[other]}
    click.echo(json.dumps(result, indent=1) if form == "json" else describe(result))
    if through and form == "table":
        shown = {name.removeprefix("dclip/"): rows for name, rows in series.items()}
        click.echo("\n" + index_recall.table(shown))
    if plot_file:
        index_recall.plot(series, plot_file)
        front.say(f"plot: {plot_file}")


def _through_index(
    student: "Student",
    pairs: "Pairs",
    split: str,
    settings: "list[Setting]",
    through: str,
    api_key: str | None,
    queries: int,
) -> list[dict[str, Any]]:
    """Rows of `index_recall.measure` for one student."""
    import tempfile

    from dclip_qdrant.cli.options import opened_place
    from dclip_qdrant.serving import evaluation, index_recall

    image, text, owner, _ = evaluation.embed(student, pairs, split)
    with tempfile.TemporaryDirectory(prefix="dclip-index-") as folder:
        url, edge = (None, folder) if through == "edge" else (through, None)
        with opened_place(url, edge, api_key) as place:
            return index_recall.measure(image, text, owner, settings, place, queries=queries)


class _Recipes(Group):
    """`recipes NAME` is `recipes show NAME`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["show", *args])


@click.group("recipes", cls=_Recipes, invoke_without_command=True)
@click.pass_context
def recipes_group(ctx: click.Context) -> None:
    """What can be trained: `recipes list`, `recipes show NAME`."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_recipes_command, form="table")


@command("list", example="dclip-qdrant recipes list")
@table_or_json
def list_recipes_command(form: str) -> None:
    """Every recipe, with what it is for, and whether it beat plain fine-tuning (`sft`) in our tables: the
    difference in points of mean R@1 with its 95% interval."""
    from dclip_qdrant.recipe import Recipe, against_plain_fine_tuning, recipe_names

    rows = [
        {"name": name, "about": Recipe.load(name).about, "measured": against_plain_fine_tuning(name)}
        for name in recipe_names()
    ]
    if form == "json":
        click.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        click.echo(f"{row['name']:<18} {row['about']}")
        if row["measured"]:
            click.echo(f"{'':<18} {row['measured']}")


@command("show", example="dclip-qdrant recipes show best --toml > mine.toml")
@click.argument("recipe", metavar="NAME|FILE")
@click.option("--toml", is_flag=True, help="The file alone, to copy from.")
def show_recipe_command(recipe: str, toml: bool) -> None:
    """What a recipe is for, when to pick it, what it cost and gained in our tables, and its file."""
    from dclip_qdrant.recipe import HERE, Recipe, describe

    loaded = Recipe.load(recipe)
    file = Path(recipe) if recipe.endswith(".toml") else HERE / f"{recipe}.toml"
    if not toml:
        click.echo(describe(loaded, recipe) + "\n")
    click.echo(file.read_text(), nl=False)


recipes_group.add_command(list_recipes_command)
recipes_group.add_command(show_recipe_command)

COMMANDS = (evaluate_command,)
