"""Files for pyarrow to read."""

from pathlib import Path
from typing import Any

import pyarrow as pa
from upath import UPath


def opened(path: Path | UPath) -> Any:
    """A binary file, to be used with `with`. A local one is Arrow's own: reading through a Python file, Arrow's threads may come for the interpreter when that is
    ending, and a process that did everything right ends with an abort (apache/arrow#34314; 3 of 100 runs of `dclip-qdrant pairs` on a busy machine)."""
    return pa.OSFile(str(path)) if isinstance(path, Path) else path.open("rb")
