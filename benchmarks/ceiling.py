"""How far a student could come: what a teacher and the student's start find on the test pictures, what they
find together, and what of it linear maps on the student's resting trunks reach.

    python benchmarks/ceiling.py RUN --pairs PAIRS

RUN: the --out of a job of the recipe `joint` on these pairs. Works on its cached features; seconds.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from upath import UPath

from dclip_qdrant import metrics
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.training import fitted_start, joint_target
from dclip_qdrant.training.data import TEXT_COLUMNS, Cache, load_cache
from dclip_qdrant.training.joint_target import Member


def of_split(pairs: Pairs, split: str, features: UPath) -> tuple[Cache, np.ndarray]:
    """The cached features of a split, and each caption's picture."""
    table = pairs.table(["key", "captions"], (split,))
    counts = [len(captions) for captions in table["captions"].to_pylist()]
    cache = load_cache(table["key"].to_pylist(), counts, features, need=TEXT_COLUMNS)
    return cache, np.repeat(np.arange(len(counts)), counts)


def line(name: str, image: np.ndarray, text: np.ndarray, owner: np.ndarray) -> None:
    ranks = metrics.ranks(metrics.normalise(image), metrics.normalise(text), owner)
    figures = metrics.retrieval(ranks, bootstrap=0)
    t2i, i2t = figures["t2i"]["r@1"] * 100, figures["i2t"]["r@1"] * 100
    print(f"| {name} | {t2i:.1f} | {i2t:.1f} | {figures['mean_r@1'] * 100:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--pairs", required=True, help="the pairs of that job")
    args = parser.parse_args()
    stages = json.loads((args.run / "table.json").read_text())["runs"]
    folder = next(
        Path(f) for label, f in stages.items() if label.startswith(("student joint", "student light"))
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    recipe = Recipe(**manifest["recipe"])
    features = [folder.parent / manifest["inputs"]["features"]]
    features += [folder.parent / other for other in manifest["inputs"]["others"]]
    pairs = Pairs.open(args.pairs)
    train = [of_split(pairs, "train", UPath(f))[0] for f in features]
    test = [of_split(pairs, "test", UPath(f)) for f in features]
    owner = test[0][1]
    print("| | t2i R@1 | i2t R@1 | mean |\n|---|---|---|---|")
    for name, (cache, _) in zip(("teacher", *recipe.ensemble.models), test, strict=True):
        line(name, cache.image[:, 0], cache.texts, owner)
    members = [Member(c.image, c.texts) for c in train]
    held_out = [Member(c.image, c.texts) for c, _ in test]
    for weight in recipe.ensemble.weights:
        weights = joint_target.weights_of(len(members), weight)
        image = joint_target.side_by_side([m.image[:, 0] for m in held_out], weights)
        line(
            f"together, weight {weight:g}",
            image,
            joint_target.side_by_side([m.text for m in held_out], weights),
            owner,
        )
    weight = recipe.ensemble.weights[len(recipe.ensemble.weights) // 2]
    own = 1 + recipe.ensemble.models.index("student")
    width = members[own].image.shape[-1]
    weights = joint_target.weights_of(len(members), weight)
    joint = joint_target.learn(members, weights, members[own], width)
    image, text = joint([m.image for m in held_out]), joint([m.text for m in held_out])
    line(f"together, weight {weight:g}, at the student's width", image[:, 0], text, owner)
    trunk, text_trunk = train[own].trunk, train[own].text_trunk
    if trunk.shape[-1] == 0 or text_trunk.shape[-1] == 0:
        return
    wanted = joint([m.image for m in members])
    fit_image = fitted_start.ridge(
        trunk.reshape(-1, trunk.shape[-1]), wanted.reshape(-1, width), offset=False
    )
    fit_text = fitted_start.ridge(text_trunk, joint([m.text for m in members]), offset=False)
    fitted = test[own][0].trunk[:, 0].astype(np.float32) @ fit_image.weights
    line("linear map of the student's image trunk, the joint captions", fitted, text, owner)
    said = test[own][0].text_trunk.astype(np.float32) @ fit_text.weights
    line("linear maps of both trunks: where the student starts", fitted, said, owner)


if __name__ == "__main__":
    main()
