"""Runs beside each other: recipes at the same budget, a row for each over its seeds, differences paired over
pictures."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from upath import UPath

from dclip_qdrant import metrics
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.training.figures import Figures, RunFigures, load_ranks
from dclip_qdrant.training.run import Run

# of [train]: what a recipe is, not what it costs
OWN_SETTINGS = (
    "region_share",
    "span_share",
    "picture_share",
    "views",
    "crop_scale",
    "flip",
    "mixup",
    "phases",
)
AFTER_WISE_FT = "+wise_ft"


@dataclass(frozen=True)
class Row:
    """A recipe's figures over its seeds: means, and the standard deviations beside them.

    `mean` and `spread` have the shape of an evaluation, with `zero_shot` and `retention` beside it; `spread`
    is None for one seed, which has bootstrap intervals `ci` instead.
    """

    name: str
    seeds: int
    n_images: int
    n_texts: int
    mean: dict[str, Any]
    spread: dict[str, Any] | None = None
    ci: dict[str, Any] | None = None
    alphas: list[float] | None = None
    seconds: float | None = None
    epochs: int | None = None
    passes: float | None = None  # over the pictures, crops counted

    def as_dict(self) -> dict[str, Any]:
        """The figures at the top, as `table.json` has them."""
        facts = {k: v for k, v in asdict(self).items() if k != "mean" and v is not None}
        return facts | self.mean


@dataclass(frozen=True)
class Difference:
    """`of` minus `than`: mean R@1 of both directions, paired over pictures, with its 95% interval over
    pictures and, where there are several, seeds.

    n: the pictures. needed: how many it would take for an interval that leaves 0 out, if the difference
    stays what it is and seeds made none (None: there is no difference). seeds: of `of`.
    """

    of: str
    than: str
    difference: float
    ci: list[float]
    n: int = 0
    needed: int | None = None
    seeds: int = 1

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def verdict(self) -> str:
        if self.ci[0] > 0:
            return "better"
        return "worse" if self.ci[1] < 0 else "inside the noise"

    def line(self) -> str:
        low, high = self.ci
        return (
            f"{self.of} minus {self.than}, mean R@1 over both directions and all seeds: "
            f"{self.difference * 100:+.1f} points, 95% [{low * 100:+.1f}, {high * 100:+.1f}]"
        )


def same_budget(recipe: Recipe, main: Recipe) -> Recipe:
    """`recipe` with the main one's detector, trainable set, learning rates and interpolation, and with as
    many epochs as make the same number of student forward passes over pictures and crops (rounded up: a rival
    never gets less). Where the main one turns hubs down, all do, so that what distillation adds is seen by
    itself. Without the turn for an index, which changes nothing at full length."""
    raw, other = recipe.as_dict(), main.as_dict()
    shared = {"student", "keep", "hubness"}
    if not main.hubness.on:
        shared.remove("hubness")
    if main.student.start == "fitted":  # elsewhere than at the base, so that WiSE-FT says nothing there
        shared.remove("keep")
    raw |= {part: other[part] for part in shared}
    # ways to distil, not what may learn or be kept
    raw["student"]["start"] = recipe.student.start
    raw["keep"]["fine_tuned"] = recipe.keep.fine_tuned
    del raw["index"]
    raw["regions"] |= {k: other["regions"][k] for k in ("detector", "options")}
    share = passes(main) / passes(recipe)
    epochs = math.ceil(main.train.epochs * share - 1e-9)
    own = recipe.train.model_dump(mode="json")
    settings = set(OWN_SETTINGS)
    if main.ensemble.joint:  # a fair rival: the same views, and a batch that is large enough to contrast
        settings = settings - {"views", "crop_scale", "flip"} | {"batch_size"}
    raw["train"] = other["train"] | {k: own[k] for k in settings} | {"epochs": epochs}
    if recipe.train.phases:
        ends = np.cumsum([p.epochs for p in recipe.train.phases])
        ends = [round(end * epochs / recipe.train.epochs) for end in ends]
        lengths = np.diff([0, *ends]).tolist()
        raw["train"]["phases"] = [
            {"towers": phase.towers, "epochs": length}
            for phase, length in zip(recipe.train.phases, lengths, strict=True)
            if length
        ]
    return Recipe(**raw)


def passes(recipe: Recipe) -> float:
    """Student forward passes for each captioned picture in an epoch: itself, crops, pictures without
    captions."""
    return 1 + recipe.train.region_share + recipe.train.picture_share


def base_row(base: Run) -> Row:
    """The row of a model that was measured as it is."""
    return row(base.label, [RunFigures.of_stage(base.stage).chosen])


def recipe_rows(recipe: Recipe, runs: list[Run], *, both: bool) -> list[Row]:
    """A recipe's row over its seeds; with `both`, the weights as trained and those after WiSE-FT stand
    apart."""
    figures = [RunFigures.of_stage(run.stage) for run in runs]
    name, rows = recipe.name, []
    if both and len(recipe.keep.wise_ft) > 1:
        rows.append(row(name, [f.as_trained or f.chosen for f in figures]))
        name += AFTER_WISE_FT
    return [*rows, row(name, [f.chosen for f in figures], [f.alpha for f in figures])]


def row(name: str, seeds: list[Figures], alphas: list[float] | None = None) -> Row:
    """Means over seeds, the standard deviation beside them."""

    def over(get: Callable[[Figures], float | None]) -> tuple[float | None, float | None]:
        values = [v for v in map(get, seeds) if v is not None]
        if len(values) < len(seeds):
            return None, None
        return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None

    mean: dict[str, Any] = {"t2i": {}, "i2t": {}}
    spread: dict[str, Any] = {"t2i": {}, "i2t": {}}
    for way in ("t2i", "i2t"):
        for key in seeds[0].test[way]:
            mean[way][key], spread[way][key] = over(lambda f, way=way, key=key: f.test[way][key])
    for key in ("mrr", "map", "mean_r@1"):
        mean[key], spread[key] = over(lambda f, key=key: f.test[key])
    mean["zero_shot"], spread["zero_shot"] = over(lambda f: f.zero_shot)
    mean["retention"], spread["retention"] = over(lambda f: f.retention)
    several = len(seeds) > 1
    first = seeds[0].test
    return Row(
        name=name,
        seeds=len(seeds),
        n_images=first["n_images"],
        n_texts=first["n_texts"],
        mean=mean,
        spread=spread if several else None,
        ci=None if several else first.get("ci"),
        alphas=alphas,
    )


def scores(runs: list[Run], name: str = "chosen") -> np.ndarray:
    """Mean R@1 of each run (seed) and picture [S, N]; `as_trained` are the weights before WiSE-FT, which are
    the chosen ones where alpha came out as 1."""
    return scores_of_stages([run.stage.path for run in runs], name)


def scores_of_stages(folders: Sequence[UPath], name: str = "chosen") -> np.ndarray:
    """`scores` by the folders of the runs' stages."""
    each = []
    for folder in folders:
        there = (folder / f"ranks-{name}.npz").exists()
        each.append(metrics.mean_r1(load_ranks(folder, name if there else "chosen")))
    return np.array(each)


def difference(of: str, own: np.ndarray, than: str, other: np.ndarray) -> Difference:
    """own [S, N] minus other [S', N], scores of the same pictures by seed."""
    paired = metrics.paired_difference(other, own)
    needed = metrics.pictures_needed(own.mean(0) - other.mean(0))
    return Difference(of, than, paired["difference"], paired["ci"], own.shape[1], needed, len(own))


def differences(
    main: Recipe, runs: dict[str, list[Run]], recipes: list[Recipe], base: Run
) -> list[Difference]:
    """The main recipe against the base and each other recipe."""
    rivals = [("base", scores([base]))]
    for recipe in recipes:
        if recipe.name == main.name:
            continue
        rivals.append((recipe.name, scores(runs[recipe.name], "as_trained")))
        if len(recipe.keep.wise_ft) > 1:
            rivals.append((recipe.name + AFTER_WISE_FT, scores(runs[recipe.name])))
    own = scores(runs[main.name])
    return [difference(main.name, own, name, other) for name, other in rivals]


def markdown_table(rows: list[Row]) -> str:
    """Rows as a Markdown table: means over seeds with the spread beside them where there are several."""
    head = "| | t2i R@1 | R@5 | R@10 | i2t R@1 | R@5 | R@10 | MRR | mAP | zero-shot | retention | seeds |"
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for r in rows:
        spread = r.spread or {"t2i": {}, "i2t": {}}
        cells = [
            _cell(r.mean[way][f"r@{k}"], spread[way].get(f"r@{k}"))
            for way in ("t2i", "i2t")
            for k in metrics.KS
        ]
        cells += [_cell(r.mean[key], spread.get(key)) for key in ("mrr", "map", "zero_shot")]
        cells.append(_cell(r.mean["retention"], spread.get("retention"), scale=1, digits=3))
        lines.append("| " + " | ".join([r.name, *cells, str(r.seeds)]) + " |")
    return "\n".join(lines)


def _cell(value: float | None, spread: float | None, *, scale: float = 100, digits: int = 1) -> str:
    if value is None:
        return "-"
    text = f"{value * scale:.{digits}f}"
    return text if spread is None else f"{text} ± {spread * scale:.{digits}f}"
