"""The student on the query side: numpy in, numpy out, onnxruntime underneath. Loads neither torch nor ray."""

import json
import os
import tempfile
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from upath import UPath

from dclip_qdrant.errors import StudentError
from dclip_qdrant.metrics import normalise
from dclip_qdrant.pictures import images
from dclip_qdrant.pictures.preprocess import Preprocess
from dclip_qdrant.pictures.regions import CONTEXT, Regions
from dclip_qdrant.serving.tokenizer import Tokenizer
from dclip_qdrant.tables import storage
from dclip_qdrant.tables.student_folder import MANIFEST, MANIFEST_VERSION, file_hash, fingerprint_of

TOP_K = 4  # regions kept a picture, unless somebody says otherwise
REGIONS_SUFFIX = "/regions"  # behind a student's name: its late-interaction model, a vector for each region


@dataclass
class Student:
    """A loaded student folder."""

    folder: Path
    manifest: dict[str, Any]
    preprocess: Preprocess
    threads: int | None = None
    spin: bool = True
    _sessions: dict[str, Any] = field(default_factory=dict, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def load(
        cls,
        folder: str | Path | UPath,
        *,
        threads: int | None = None,
        spin: bool = True,
        verify: bool = True,
    ) -> "Student":
        """Opens a student folder and checks every file's hash.

        Args:
            folder: Local, or a URI, which is copied to a folder of this machine's cache first.
            spin: Whether onnxruntime's threads wait actively; best alone on a machine, worst beside a
                server's own threads (benchmarks/serve.py: 663 against 806 texts a second).

        Raises:
            StudentError: no manifest (half-written), a newer format, a missing or altered file.
        """
        place = storage.as_path(folder)
        local = _local_copy(place) if storage.is_uri(folder) else Path(str(place))
        manifest = _read_manifest(storage.as_path(local))
        if verify:
            _verify(local, manifest)
        return cls(local, manifest, Preprocess.of_open_clip(manifest["preprocess"]), threads, spin)

    def _session(self, tower: str) -> Any:
        """The tower's onnxruntime session, opened when it is first used: a text query needs no image
        tower."""
        with self._lock:
            if tower not in self._sessions:
                import onnxruntime as ort

                options = ort.SessionOptions()
                options.intra_op_num_threads = self.threads or os.cpu_count() or 1
                options.log_severity_level = 3
                options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self.spin else "0")
                providers = [
                    p
                    for p in ("CUDAExecutionProvider", "CPUExecutionProvider")
                    if p in ort.get_available_providers()
                ]
                self._sessions[tower] = ort.InferenceSession(
                    str(self.folder / f"{tower}.onnx"), options, providers=providers
                )
            return self._sessions[tower]

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        text = self.manifest["text"]
        return Tokenizer(
            self.folder,
            clean=text["clean"],
            context_length=self.manifest["context_length"],
            pad_id=text["pad_id"],
            pad_to_full=text["pad_to_full"],
        )

    # --- who it is

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def model_name(self) -> str:
        """The versioned name that collections and apps use: dclip/<name>@<8 hex>."""
        return f"dclip/{self.name}@{self.fingerprint[:8]}"

    @property
    def dim(self) -> int:
        return self.manifest["dim"]

    def facts(self) -> dict[str, Any]:
        """What `dclip-qdrant inspect` says of it."""
        sizes = {f.name: round(f.stat().st_size / 1e6, 1) for f in sorted(self.folder.glob("*.onnx"))}
        facts = {
            "student": self.model_name,
            "folder": str(self.folder),
            "fingerprint": self.fingerprint,
            "base": self.manifest["base"],
            "dim": self.dim,
            "image_size": self.manifest["image_size"],
            "context_length": self.manifest["context_length"],
            "parameters": self.manifest["parameters"],
            "megabytes": sizes,
        }
        figures = json.loads((self.folder / "metrics.json").read_text())
        if "chosen" in figures:
            chosen = figures["chosen"]
            facts |= {
                "mean_r@1": round(chosen["test"]["mean_r@1"], 4),
                "retention": chosen["retention"],
                "alpha": figures["alpha"],
            }
        return facts

    # --- what it does

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return self._tokenizer(list(texts))

    def token_count(self, texts: Sequence[str]) -> int:
        """Tokens of all texts, start and end included, padding not."""
        return sum(self._tokenizer.lengths(list(texts)))

    def embed_texts(self, texts: Sequence[str], *, batch: int = 64) -> np.ndarray:
        """N texts -> unit vectors [N, D] float32."""
        if isinstance(texts, str):
            raise TypeError("embed_texts takes a list of texts, not one string")
        out = [
            self._session("text").run(
                None, {"input_ids": np.array(self.tokens(texts[i : i + batch]), np.int64)}
            )[0]
            for i in range(0, len(texts), batch)
        ]
        return normalise(np.concatenate(out)) if out else np.zeros((0, self.dim), np.float32)

    def embed_images(self, pictures: Sequence[images.Picture], *, batch: int = 32) -> np.ndarray:
        """N pictures (paths, URIs, bytes, PIL images) -> unit vectors [N, D] float32.

        Raises:
            ImageError: one that can't be read.
        """
        return self.embed_pixels((self.preprocess.pixels(images.as_rgb(p)) for p in pictures), batch=batch)

    def embed_pixels(self, pixels: Iterable[np.ndarray], *, batch: int = 32) -> np.ndarray:
        """An iterable of [S, S, 3] uint8 -> unit vectors [N, D] float32."""
        out, held = [], []
        for p in pixels:
            held.append(p)
            if len(held) == batch:
                out.append(self._run(held))
                held = []
        if held:
            out.append(self._run(held))
        return normalise(np.concatenate(out)) if out else np.zeros((0, self.dim), np.float32)

    def _run(self, pixels: list[np.ndarray]) -> np.ndarray:
        return self._session("image").run(
            None, {"pixel_values": self.preprocess.normalise(np.stack(pixels))}
        )[0]

    def region_pixels(
        self, image: Image.Image, regions: Regions, *, context: float = CONTEXT
    ) -> list[np.ndarray]:
        """What `embed_regions` embeds: the whole picture, then each region's crop squashed to a square, as in
        training."""
        squash = replace(self.preprocess, resize_mode="squash")
        return [
            self.preprocess.pixels(image),
            *(squash.pixels(c) for c in regions.crops(image, context=context)),
        ]

    def embed_regions(self, image: Image.Image, regions: Regions, *, context: float = CONTEXT) -> np.ndarray:
        """One image and its R regions -> unit vectors [1 + R, D]: the whole picture first."""
        return self.embed_pixels(self.region_pixels(image, regions, context=context))


def as_student(student: Student | str | Path) -> Student:
    """A student as it is, a folder or URI as its student."""
    return student if isinstance(student, Student) else Student.load(student)


def _read_manifest(folder: UPath) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise StudentError(folder, "no such folder", "a student folder")
    if not path.is_file():
        came = f"no {MANIFEST}: not a student, or half-written"
        raise StudentError(folder, came, "a finished student folder")
    try:
        manifest = json.loads(path.read_text())
        version, files = manifest["version"], manifest["files"]
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise StudentError(path, f"not a student's manifest ({type(e).__name__}: {e})") from e
    if version != MANIFEST_VERSION:
        do = "use the dclip-qdrant that made it, or a newer one"
        raise StudentError(path, f"format {version}", f"format {MANIFEST_VERSION}", do)
    for name in files:
        if Path(name).name != name or not (folder / name).is_file():
            raise StudentError(folder, f"no {name}", "every file of the manifest")
    return manifest


def _verify(folder: Path, manifest: dict[str, Any]) -> None:
    for name, wanted in manifest["files"].items():
        if file_hash(folder / name) != wanted:
            came, expected = "altered since it was exported", f"sha256 {wanted[:12]}..."
            raise StudentError(folder / name, came, expected, "export it again")
    if fingerprint_of(folder) != manifest["fingerprint"]:
        expected = manifest["fingerprint"][:12] + "..."
        raise StudentError(folder, "its files don't make up its fingerprint", expected)


def _local_copy(folder: UPath) -> Path:
    """A student folder of a bucket on this machine's disk, copied once a fingerprint."""
    manifest = _read_manifest(folder)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dclip-qdrant"
    copy = cache / "students" / manifest["fingerprint"]
    if not (copy / MANIFEST).is_file():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=copy.parent) as work:
            storage.copy_folder(folder, Path(work) / "student")
            if not (copy / MANIFEST).is_file():
                (Path(work) / "student").rename(copy)
    return copy
