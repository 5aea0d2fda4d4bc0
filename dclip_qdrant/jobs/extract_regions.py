"""The regions stage: a pool of detectors over every picture of the pairs; boxes with labels, and pictures of
them to look at."""

import logging
import os
from typing import Any

import pyarrow as pa
from upath import UPath

from dclip_qdrant.detectors import build
from dclip_qdrant.jobs.cluster import actor_threads, map_pairs
from dclip_qdrant.pairs import Pairs, load_image
from dclip_qdrant.pairs.region_files import load_regions
from dclip_qdrant.pictures.drawing import draw
from dclip_qdrant.pictures.images import content_hash, read
from dclip_qdrant.pictures.regions import Regions
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.tables import contracts
from dclip_qdrant.tables.stages import Stage, parts, write_part

logger = logging.getLogger(__name__)

BATCH = 32  # pictures a prediction
COLUMNS = ["key", "uri", "image"]
MEMORY = 2_000_000_000  # bytes of an actor: torch, a detector, and a block of pictures


class Detect:
    """Actor: pictures in, rows of the regions contract written."""

    def __init__(self, detector: str, options: dict[str, Any], out: str, threads: int) -> None:
        self.pool = actor_threads(threads)
        self.detector = build(detector, options)
        self.out = UPath(out)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        pictures = list(self.pool.map(load_image, rows))
        write_part(
            self.out,
            contracts.REGIONS,
            [
                {"key": row["key"], "width": picture.width, "height": picture.height, **regions.row()}
                for row, picture, regions in zip(rows, pictures, self.detector(pictures), strict=True)
            ],
        )
        return pa.table({"done": [len(rows)]})


def regions_stage(root: str, pairs: Pairs, recipe: Recipe) -> Stage:
    settings = recipe.regions
    options = {name: _content_of(value) for name, value in settings.options.items()}
    inputs = {"pairs": pairs.fingerprint, "detector": settings.detector, "options": options}
    return Stage(root, "regions", inputs)


def _content_of(value: Any) -> Any:
    """A file's hash in its place, so that new weights under an old name are new inputs."""
    return content_hash(read(value)) if isinstance(value, str) and os.path.isfile(value) else value


def extract_regions(
    root: str, pairs: Pairs, recipe: Recipe, *, actors: int | None, from_scratch: bool = False
) -> Stage:
    """Boxes of every picture; resumes."""
    stage, settings = regions_stage(root, pairs, recipe), recipe.regions
    if from_scratch:
        stage.clear()
    if stage.done:
        logger.info("regions: reused %s", stage.path.name)
        return stage
    build(settings.detector, settings.options)  # what is wrong is said here, before a pool starts
    logger.info("regions: %s over %s pictures", settings.detector, f"{sum(pairs.splits().values()):,}")
    map_pairs(
        pairs,
        Detect,
        {"detector": settings.detector, "options": settings.options},
        name="regions",
        out=stage.path,
        contract=contracts.REGIONS,
        actors=actors,
        batch=BATCH,
        memory=MEMORY,
        columns=COLUMNS,
    )
    counts: list[int] = []
    for table in parts(stage.path, contracts.REGIONS, ["labels"]):
        counts += [len(labels) for labels in table["labels"].to_pylist()]
    without = sum(count == 0 for count in counts)
    stage.finish(pictures=len(counts), boxes=sum(counts), without=without)
    logger.info(
        "regions: %s boxes, %.1f a picture, %s pictures without any (that is fine)",
        f"{sum(counts):,}",
        sum(counts) / max(1, len(counts)),
        f"{without:,}",
    )
    return stage


def write_preview(stage: UPath, pairs: Pairs, count: int) -> UPath:
    """Draws the first `count` pictures of the pairs into <stage>/preview; the folder."""
    regions = load_regions(stage)
    folder = stage / "preview"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = 0
    for rows in pairs.rows(COLUMNS):
        for row in rows[: count - drawn]:
            with (folder / f"{drawn:04d}.jpg").open("wb") as f:
                draw(load_image(row), regions.get(row["key"], Regions())).save(f, "JPEG", quality=90)
            drawn += 1
        if drawn == count:
            break
    return folder
