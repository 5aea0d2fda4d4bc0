"""Regions that were found before: a regions stage, or any folder of Parquet parts in the regions contract."""

from pathlib import Path

from upath import UPath

from dclip_qdrant.errors import UsageError
from dclip_qdrant.pictures.regions import Regions
from dclip_qdrant.tables import storage
from dclip_qdrant.tables.contracts import REGIONS
from dclip_qdrant.tables.stages import parts


def load_regions(folder: str | Path | UPath) -> dict[str, Regions]:
    """Regions by the picture's key.

    Raises:
        UsageError: no such folder. SchemaError: parts of another contract. InputError: a broken part.
    """
    path = storage.as_path(folder)
    if not path.is_dir():
        raise UsageError("`regions`", f"no folder {folder}", "a regions folder")
    regions: dict[str, Regions] = {}
    for table in parts(path, REGIONS, ["key", "boxes", "scores", "labels"]):
        regions.update((row["key"], Regions.of_row(row)) for row in table.to_pylist())
    return regions
