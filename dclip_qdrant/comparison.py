"""Runs beside each other: recipes at the same budget, a row for each over its seeds, differences paired over pictures."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from dclip_qdrant import metrics
from dclip_qdrant.recipe import Recipe

OWN = ("region_share", "span_share", "views", "crop_scale", "flip", "phases")  # of [train]: what a recipe is, not what it costs


def same_budget(recipe: Recipe, main: Recipe) -> Recipe:
    """`recipe` with the main one's detector, trainable set, learning rates and interpolation, and with as many epochs as make the same number of student
    forward passes over pictures and crops (rounded up: a rival never gets less). Without its turn for an index, which changes nothing at full length."""
    raw, other = recipe.as_dict(), main.as_dict()
    for part in ("student", "keep"):
        raw[part] = other[part]
    del raw["index"]
    raw["regions"] |= {k: other["regions"][k] for k in ("detector", "options")}
    epochs = math.ceil(main.train.epochs * (1 + main.train.region_share) / (1 + recipe.train.region_share) - 1e-9)
    own = recipe.train.model_dump(mode="json")
    raw["train"] = other["train"] | {k: own[k] for k in OWN} | {"epochs": epochs}
    if recipe.train.phases:
        ends = [round(e * epochs / recipe.train.epochs) for e in np.cumsum([p.epochs for p in recipe.train.phases])]
        raw["train"]["phases"] = [
            {"towers": p.towers, "epochs": n} for p, n in zip(recipe.train.phases, np.diff([0, *ends]).tolist(), strict=True) if n
        ]
    return Recipe(**raw)


def recipe_rows(recipe: Recipe, runs: list[Any], *, both: bool) -> list[dict[str, Any]]:
    """A recipe's row over its seeds; with `both`, the weights as trained and those after WiSE-FT stand apart."""
    name, out = recipe.name, []
    if both and len(recipe.keep.wise_ft) > 1:
        out.append(row(name, [figures(r, "_at_1") for r in runs]))
        name += "+wise_ft"
    return [*out, row(name, [figures(r) for r in runs], [r.stage.manifest()["metrics"]["alpha"] for r in runs])]


def figures(run: Any, suffix: str = "") -> dict[str, Any]:
    """A run's figures on the test split; with "_at_1" those of the trained weights before WiSE-FT."""
    m = run.stage.manifest()["metrics"]
    return m["test" + suffix] | {k: m.get(k + suffix, m.get(k)) for k in ("zero_shot", "retention")}


def row(name: str, seeds: list[dict[str, Any]], alphas: list[float] | None = None) -> dict[str, Any]:
    """Means over seeds, the standard deviation beside them."""

    def over(get: Callable[[dict[str, Any]], float | None]) -> tuple[float | None, float | None]:
        values = [get(s) for s in seeds]
        if any(v is None for v in values):
            return None, None
        return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None

    out: dict[str, Any] = {"name": name, "seeds": len(seeds), "n_images": seeds[0]["n_images"], "n_texts": seeds[0]["n_texts"]}
    spread: dict[str, Any] = {}
    for way in ("t2i", "i2t"):
        out[way], spread[way] = {}, {}
        for key in seeds[0][way]:
            out[way][key], spread[way][key] = over(lambda s, w=way, k=key: s[w][k])
    for key in ("mrr", "map", "mean_r@1", "zero_shot", "retention"):
        out[key], spread[key] = over(lambda s, k=key: s.get(k))
    if len(seeds) > 1:
        out["spread"] = spread
    else:
        out["ci"] = seeds[0].get("ci")
    if alphas:
        out["alphas"] = alphas
    return out


def scores(runs: list[Any], name: str = "test") -> np.ndarray:
    """Mean R@1 of each picture [N], averaged over the runs (seeds); "test_at_1" are the weights as trained, which are "test" where alpha came out as 1."""
    from dclip_qdrant.training.runs import load_ranks

    each = []
    for r in runs:
        there = (r.stage.path / f"ranks-{name}.npz").exists()
        each.append(metrics.mean_r1(load_ranks(r.stage.path, name if there else "test")))
    return np.mean(each, axis=0)


def differences(main: Recipe, runs: list[Any], start: Any) -> list[dict[str, Any]]:
    """The main recipe against the base and each other recipe, paired over pictures; seeds are averaged picture by picture."""
    of = lambda recipe: [r for r in runs if r.recipe == recipe]
    mine = scores(of(main.as_dict()))
    rivals = [("base", scores([start]))]
    for recipe in {json.dumps(r.recipe): r.recipe for r in runs if r.recipe != main.as_dict()}.values():
        rivals.append((recipe["name"], scores(of(recipe), "test_at_1")))
        if len(recipe["keep"]["wise_ft"]) > 1:
            rivals.append((recipe["name"] + "+wise_ft", scores(of(recipe))))
    return [{"of": main.name, "than": name} | metrics.paired_difference(theirs, mine) for name, theirs in rivals]
