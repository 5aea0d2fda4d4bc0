"""A trained model -> a student folder, which is read back and compared with the towers before it takes its
place."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from upath import UPath

from dclip_qdrant.errors import ParityError
from dclip_qdrant.serving.student import Student
from dclip_qdrant.tables import storage
from dclip_qdrant.tables.student_folder import STUDENT_FOLDER
from dclip_qdrant.training.export import write_student
from dclip_qdrant.training.models.two_tower import TwoTower

TOLERANCE = 1e-4  # torch and onnxruntime order their sums differently; seen: 2e-7 on small towers
PARITY_TEXTS = (
    "a photo of a cat",
    "two dogs run across a wet field while a child in a red coat watches them from the fence",
    "",
    "it's John's 2nd car, isn't it?",
    "caf\u00e9 \u201cna\u00efve\u201d &amp; more",
    "\u6771\u4eac\u30bf\u30ef\u30fc at night",
    "word " * 120,
)


def export(
    model: TwoTower,
    out: str | Path | UPath,
    *,
    name: str,
    metrics: dict[str, Any],
    recipe: dict[str, Any],
    card: str = "",
) -> UPath:
    """Writes the student folder; an existing student there is replaced only once the new one is whole and
    agrees with torch.

    Raises:
        ParityError: tokens, pixels or embeddings of the folder differ from the towers'.
        UsageError: something else than a student lies in `out`.
        MissingExtra: onnx or onnxscript is not installed.
    """
    target = storage.as_path(out)
    storage.check_free(target, STUDENT_FOLDER, overwrite=True)
    with tempfile.TemporaryDirectory(prefix="dclip-student-") as work:
        write_student(model, Path(work), name=name, metrics=metrics, recipe=recipe, card=card)
        check_parity(model, Student.load(work))
        with storage.new_folder(target, STUDENT_FOLDER, overwrite=True) as folder:
            storage.copy_folder(work, folder)
    return target


def check_parity(model: TwoTower, student: Student, *, tolerance: float = TOLERANCE) -> float:
    """The largest difference between the towers and the folder, over two batch sizes and many text lengths.

    Raises:
        ParityError: tokens differ, pixels differ, or embeddings differ by more than `tolerance`.
    """
    tokens = model.tokenizer(list(PARITY_TEXTS), context_length=model.context_length)
    _check_tokens(tokens.tolist(), student)
    size = model.preprocess.size
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in ((size, size), (2 * size + 3, size + 5), (size // 2, size))
    ]
    with torch.no_grad():
        pixels = model.preprocess.normalise(np.stack([model.preprocess.pixels(p) for p in pictures]))
        images = F.normalize(model.encode_image(torch.from_numpy(pixels)), dim=-1).numpy()
        texts = F.normalize(model.model.encode_text(tokens), dim=-1).numpy()
    worst = 0.0
    for count in (1, len(pictures)):
        difference = np.abs(student.embed_images(pictures[:count]) - images[:count])
        worst = max(worst, float(difference.max()))
    for count in (1, len(PARITY_TEXTS)):
        difference = np.abs(student.embed_texts(list(PARITY_TEXTS[:count])) - texts[:count])
        worst = max(worst, float(difference.max()))
    if not worst <= tolerance:
        raise ParityError(
            "export", f"embeddings differ from torch by {worst:.2e}", f"at most {tolerance:.0e}"
        )
    return worst


def _check_tokens(wanted: list[list[int]], student: Student) -> None:
    """Raises ParityError unless the student's tokens are the model's, up to padding with zeros."""
    for text, want, got in zip(PARITY_TEXTS, wanted, student.tokens(list(PARITY_TEXTS)), strict=True):
        padding = want[len(got) :]
        if got + (padding if not any(padding) else []) != want:
            raise ParityError("export", f"tokens of {text[:40]!r} are {got[:12]}", f"{want[:12]}")
