"""Parameters and milliseconds of models' towers, one picture and one text at a time, in torch.

    python benchmarks/towers.py MODEL [MODEL ...]   # open_clip names or folders, the first is the reference

Models take turns, so that what else the machine does meets all of them alike: quote the ratios.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from dclip_qdrant.training.models import two_tower
from dclip_qdrant.training.models.two_tower import TwoTower

ROUNDS = 30
TEXT = "two dogs run across a wet field while a child watches them"


def measure(models: list[TwoTower]) -> list[dict[str, float]]:
    """Parameters in millions, and medians in milliseconds."""
    calls: dict[tuple[int, str], Callable[[], object]] = {}
    for number, model in enumerate(models):
        size = model.preprocess.size
        picture, ids = torch.randn(1, 3, size, size), model.tokens([TEXT])
        calls[number, "ms a picture"] = lambda model=model, picture=picture: model.encode_image(picture)
        calls[number, "ms a text"] = lambda model=model, ids=ids: model.encode_text(ids)
    seconds: dict[tuple[int, str], list[float]] = {key: [] for key in calls}
    with torch.inference_mode():
        for turn in range(ROUNDS + 3):
            for key, call in calls.items():
                began = time.perf_counter()
                call()
                if turn >= 3:  # the first ones warm up
                    seconds[key].append(time.perf_counter() - began)
    rows = []
    for number, model in enumerate(models):
        parameters = dict(model.model.named_parameters())
        image = sum(p.numel() for name, p in parameters.items() if name.startswith("visual."))
        row = {"image M": image / 1e6, "text M": (sum(p.numel() for p in parameters.values()) - image) / 1e6}
        for what in ("ms a picture", "ms a text"):
            row[what] = float(np.median(seconds[number, what])) * 1e3
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    names = parser.parse_args().models
    rows = measure([two_tower.load(name) for name in names])
    print("| model | image M | text M | ms a picture | ms a text | pictures/s over the first's |")
    print("|---|---|---|---|---|---|")
    for name, row in zip(names, rows, strict=True):
        ratio = rows[0]["ms a picture"] / row["ms a picture"]
        print(f"| {name} | " + " | ".join(f"{value:.1f}" for value in row.values()) + f" | {ratio:.2f} |")


if __name__ == "__main__":
    main()
