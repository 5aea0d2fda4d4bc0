"""The student on the query side: numpy in, numpy out, onnxruntime underneath. Loads neither torch nor ray."""

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dclip_qdrant.errors import StudentError
from dclip_qdrant.metrics import normalise
from dclip_qdrant.preprocess import Preprocess
from dclip_qdrant.regions import Regions
from dclip_qdrant.text import Tokenizer

MANIFEST_VERSION = 1
IDENTITY = ("image.onnx", "text.onnx", "tokenizer.json", "preprocessor_config.json", "open_clip_model.safetensors", "open_clip_config.json")


def fingerprint_of(folder: Path) -> str:
    """sha256 over the files that decide what vector an input gets: weights, tokenizer, preprocessing."""
    digest = hashlib.sha256()
    for name in IDENTITY:
        digest.update(f"{name}:{hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


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
    def load(cls, folder: str | Path, *, threads: int | None = None, spin: bool = True, verify: bool = True) -> "Student":
        """Opens a student folder and checks every file's hash. `spin`: whether onnxruntime's threads wait actively; best alone on a machine, worst
        beside a server's own threads (benchmarks/serve.py: 663 against 806 texts a second).

        Raises:
            StudentError: no manifest (half-written), a newer format, a missing or altered file.
        """
        folder = Path(folder)
        path = folder / "manifest.json"
        if not folder.is_dir():
            raise StudentError(folder, "no such folder", "a student folder")
        if not path.is_file():
            raise StudentError(folder, "no manifest.json: not a student, or half-written", "a finished student folder")
        try:
            manifest = json.loads(path.read_text())
            version, files = manifest["version"], manifest["files"]
        except (json.JSONDecodeError, KeyError, TypeError) as e:
            raise StudentError(path, f"not a student's manifest ({type(e).__name__}: {e})") from e
        if version != MANIFEST_VERSION:
            raise StudentError(path, f"format {version}", f"format {MANIFEST_VERSION}", "use the dclip-qdrant that made it, or a newer one")
        for name, wanted in files.items():
            if Path(name).name != name or not (folder / name).is_file():
                raise StudentError(folder, f"no {name}", "every file of the manifest")
            if verify and hashlib.sha256((folder / name).read_bytes()).hexdigest() != wanted:
                raise StudentError(folder / name, "altered since it was exported", f"sha256 {wanted[:12]}...", "export it again")
        if verify and fingerprint_of(folder) != manifest["fingerprint"]:
            raise StudentError(folder, "its files don't make up its fingerprint", manifest["fingerprint"][:12] + "...")
        return cls(folder, manifest, Preprocess.of_open_clip(manifest["preprocess"]), threads, spin)

    def _session(self, tower: str) -> Any:
        """The tower's onnxruntime session, opened when it is first used: a text query needs no image tower."""
        with self._lock:
            if tower not in self._sessions:
                import onnxruntime as ort

                options = ort.SessionOptions()
                options.intra_op_num_threads = self.threads or os.cpu_count() or 1
                options.log_severity_level = 3
                options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self.spin else "0")
                providers = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in ort.get_available_providers()]
                self._sessions[tower] = ort.InferenceSession(str(self.folder / f"{tower}.onnx"), options, providers=providers)
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
            self._session("text").run(None, {"input_ids": np.array(self.tokens(texts[i : i + batch]), np.int64)})[0]
            for i in range(0, len(texts), batch)
        ]
        return normalise(np.concatenate(out)) if out else np.zeros((0, self.dim), np.float32)

    def embed_images(self, images: Sequence[Image.Image], *, batch: int = 32) -> np.ndarray:
        """N upright RGB images (`images.open_rgb`) -> unit vectors [N, D] float32."""
        return self.embed_pixels((self.preprocess.pixels(im) for im in images), batch=batch)

    def embed_pixels(self, pixels: Any, *, batch: int = 32) -> np.ndarray:
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
        return self._session("image").run(None, {"pixel_values": self.preprocess.normalise(np.stack(pixels))})[0]

    def region_pixels(self, image: Image.Image, regions: Regions, *, context: float = 0.1) -> list[np.ndarray]:
        """What `embed_regions` embeds: the whole picture, then each region's crop squashed to a square, as in training."""
        squash = replace(self.preprocess, resize_mode="squash")
        return [self.preprocess.pixels(image), *(squash.pixels(c) for c in regions.crops(image, context=context))]

    def embed_regions(self, image: Image.Image, regions: Regions, *, context: float = 0.1) -> np.ndarray:
        """One image and its R regions -> unit vectors [1 + R, D]: the whole picture first."""
        return self.embed_pixels(self.region_pixels(image, regions, context=context))
