"""Students and recipes: measure, list."""

import json
from pathlib import Path
from typing import Any

import click

from dclip_qdrant import front
from dclip_qdrant.errors import UsageError


@click.command()
@click.option("--student", required=True, help="A student folder.")
@click.option("--pairs", "pairs_path", required=True, help="Pairs to measure retrieval on.")
@click.option("--split", help="Default: test, else val.")
@click.option("--labelled", help="Labelled pictures for zero-shot accuracy (folder per class, or Parquet).")
@click.option("--base", help="The base as a student folder, for retention. Default: the one that distill left beside the student.")
@click.option("--bootstrap", default=1000, show_default=True, help="Resamples for the intervals; 0 leaves them out.")
@click.option(
    "--through", metavar="edge|URL", help="Also measure what an index leaves of it: qdrant-edge in a temporary folder, or a server."
)
@click.option("--index", "settings", help="Index settings, KIND[@DIM][+rescore[N]]: float32, float16, int8, turbo4, turbo2, binary.")
@click.option("--beside", metavar="DIR", help="Another student for the index table and the plot, e.g. one trained without [index].")
@click.option("--queries", default=1000, show_default=True, help="Captions to query the index with.")
@click.option("--plot", "plot_file", metavar="FILE", help="Recall over bytes a vector, as .svg or .png.")
@click.option("--api-key", envvar="QDRANT_API_KEY", help="The server's key; better in QDRANT_API_KEY.")
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
def evaluate(student, pairs_path, split, labelled, base, bootstrap, through, settings, beside, queries, plot_file, api_key, form):
    """Measures a student: recall both ways, MRR, mAP, zero-shot accuracy, retention, size, speed; with --through, recall over bytes in an index."""
    from dclip_qdrant import evaluation
    from dclip_qdrant.pairs import Pairs
    from dclip_qdrant.student import Student

    for flag, given in (("--index", settings), ("--beside", beside), ("--plot", plot_file)):
        if given and not through:
            raise UsageError(flag, "without --through", "--through edge, or --through http://HOST:6333")
    loaded, pairs = Student.load(student), Pairs.open(pairs_path)
    if through:
        from dclip_qdrant import index_recall

        wanted = index_recall.parse(settings or index_recall.DEFAULT, loaded.dim)
    reference = Student.load(base) if base else evaluation.find_base(loaded) if labelled else None
    result = evaluation.evaluate(loaded, pairs, split=split, labelled=labelled, base=reference, bootstrap=bootstrap)
    if through:
        students = {loaded.model_name: loaded} | ({(b := Student.load(beside)).model_name: b} if beside else {})
        series = {name: _through_index(s, pairs, result["split"], wanted, through, api_key, queries) for name, s in students.items()}
        result["index"] = series[loaded.model_name]
        if beside:
            result["index_beside"] = {"student": list(series)[-1], "rows": list(series.values())[-1]}
    click.echo(json.dumps(result, indent=1) if form == "json" else evaluation.describe(result))
    if through and form == "table":
        click.echo("\n" + index_recall.table({name.removeprefix("dclip/"): rows for name, rows in series.items()}))
    if plot_file:
        index_recall.plot(series, plot_file)
        front.say(f"plot: {plot_file}")


def _through_index(student, pairs, split, settings, through, api_key, queries):
    """Rows of `index_recall.measure` for one student."""
    import tempfile

    from dclip_qdrant import evaluation, index_recall
    from dclip_qdrant.stores import place

    image, text, owner, _ = evaluation.embed(student, pairs, split)
    with tempfile.TemporaryDirectory(prefix="dclip-index-") as folder:
        where = place(edge=folder) if through == "edge" else place(url=through, api_key=api_key)
        try:
            return index_recall.measure(image, text, owner, settings, where, queries=queries, say=front.say)
        finally:
            where.close()


class _Recipes(click.Group):
    """`recipes NAME` is `recipes show NAME`."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["show", *args])


@click.group(cls=_Recipes, invoke_without_command=True)
@click.pass_context
def recipes(ctx):
    """What can be trained: `recipes list`, `recipes show NAME`."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_recipes)


@recipes.command("list")
def list_recipes():
    """Every recipe, with what it is for."""
    from dclip_qdrant.recipe import Recipe, recipe_names

    for n in recipe_names():
        click.echo(f"{n:<18} {Recipe.load(n).about}")


@recipes.command("show")
@click.argument("name")
@click.option("--toml", is_flag=True, help="The file alone, to copy from.")
def show_recipe(name, toml):
    """What a recipe is for, when to pick it, what it cost and gained in our tables, and its file."""
    from dclip_qdrant import recipe

    found = recipe.Recipe.load(name)
    file = (Path(name) if name.endswith(".toml") else recipe.HERE / f"{name}.toml").read_text()
    if not toml:
        click.echo(recipe.describe(found, name) + "\n")
    click.echo(file, nl=False)


COMMANDS = (evaluate, recipes)
