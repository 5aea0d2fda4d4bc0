"""The student folder: the door between training, which writes it, and serving, which reads it."""

import hashlib
from pathlib import Path

from dclip_qdrant.tables.storage import FolderKind

MANIFEST = "manifest.json"  # written last: a folder without it is not a student
MANIFEST_VERSION = 1
IDENTITY = (  # what decides which vector an input gets
    "image.onnx",
    "text.onnx",
    "tokenizer.json",
    "preprocessor_config.json",
    "open_clip_model.safetensors",
    "open_clip_config.json",
)
MERGES = "bpe_merges.txt.gz"  # of open_clip's tokenizer, where the text tower has fewer tokens than CLIP's
RUN_FILE = "run.txt"  # the run that a student was exported from
STUDENT_FOLDER = FolderKind(
    "a student",
    MANIFEST,
    "fingerprint",
    (*IDENTITY, RUN_FILE, MERGES, "tokenizer_config.json", "recipe.toml", "metrics.json", "README.md"),
)


def file_hash(file: Path) -> str:
    """sha256 of a file, hex; read in pieces, since weights may be gigabytes."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fingerprint_of(folder: Path) -> str:
    """sha256 over the files of `IDENTITY`: weights, tokenizer, preprocessing."""
    digest = hashlib.sha256()
    for name in IDENTITY:
        digest.update(f"{name}:{file_hash(folder / name)}\n".encode())
    return digest.hexdigest()
