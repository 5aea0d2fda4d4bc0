"""Writes `schemas/*.json` from the code: `python -m dclip_qdrant.schemas_json FOLDER` (make schemas)."""

import json
import sys
from pathlib import Path
from typing import Any

from dclip_qdrant import contracts, evaluation
from dclip_qdrant.recipe import Recipe


def generated() -> dict[str, Any]:
    """File name -> content."""
    student = {
        "about": "manifest.json of a student folder; written last",
        "version": 1,
        "keys": {
            "version": "of this format", "name": "the student's name", "fingerprint": "sha256 over weights, tokenizer and preprocessing", "dim": "vector width",
            "image_size": "pixels a side", "context_length": "tokens", "preprocess": "open_clip's preprocess_cfg", "text": "cleaning and padding of the tokenizer",
            "base": "the model it started from", "parameters": "image and text tower", "files": "sha256 of every file",
        },
    }  # fmt: skip
    out = {f"{c.name}.json": c.describe() for c in contracts.ALL}
    return out | {
        "recipe.schema.json": Recipe.model_json_schema(),
        "student.schema.json": student,
        "evaluation.json": {"about": "dclip-qdrant evaluate --format json", "keys": evaluation.KEYS, "with --through": evaluation.THROUGH},
    }


def text(content: Any) -> str:
    return json.dumps(content, indent=1) + "\n"


if __name__ == "__main__":
    for name, content in generated().items():
        (Path(sys.argv[1]) / name).write_text(text(content))
