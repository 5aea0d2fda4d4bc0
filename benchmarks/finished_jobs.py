"""What jobs of `distill` left behind: where the students of each recipe are. Imported by the scripts beside
it."""

import json
import re
import sys
from pathlib import Path
from typing import Any

LABEL = re.compile(r"student (?P<recipe>.+) seed (?P<seed>\d+)")


def table_of(run: Path) -> dict[str, Any]:
    """The table.json of a job; ends the script with one line where there is none."""
    path = run / "table.json"
    if not path.exists():
        sys.exit(f"{run}: no table.json; name the --out of a finished job of distill")
    return json.loads(path.read_text())


def stages_of(run: Path) -> dict[str, dict[int, Path]]:
    """{recipe: {seed: folder}} of a job's students."""
    out: dict[str, dict[int, Path]] = {}
    for label, folder in table_of(run)["runs"].items():
        match = LABEL.fullmatch(label)
        if match:
            out.setdefault(match["recipe"], {})[int(match["seed"])] = Path(folder)
    return out
