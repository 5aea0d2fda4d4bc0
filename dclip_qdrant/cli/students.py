"""Students and recipes: measure, list."""

import json
from pathlib import Path

import click


@click.command()
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


@click.command()
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


COMMANDS = (evaluate, recipes)
