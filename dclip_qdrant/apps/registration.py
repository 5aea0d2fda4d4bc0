"""A student as fastembed models, so that qdrant-client embeds `models.Document` and `models.Image` with it.

What we use of fastembed (tests/apps/test_registration.py pins it): the three `EMBEDDINGS_REGISTRY` lists,
`_list_supported_models` of their members, the base classes' `embed`, `query_embed`, `embed_text`,
`embed_image`, and `DenseModelDescription`. Everything else is our own `Student`: an app's vectors are the
command line's by construction.
"""

import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dclip_qdrant.detectors import Detector, build
from dclip_qdrant.errors import UsageError
from dclip_qdrant.lookup import need
from dclip_qdrant.metrics import shorten
from dclip_qdrant.pictures.images import as_rgb
from dclip_qdrant.serving.student import REGIONS_SUFFIX, TOP_K, Student

ENV = "DCLIP_STUDENTS"  # folders, separated like PATH: what child processes and autoregister read
IN_WORKERS = "dclip_qdrant.apps.in_workers"  # importing it registers


@dataclass(frozen=True)
class _Entry:
    """A registered name."""

    folder: str
    fingerprint: str
    dim: int
    detector: Detector | str | None = None


_names: dict[str, _Entry] = {}  # lower case, as fastembed compares them
_spelled: dict[str, str] = {}  # lower case -> as it was given, without those of regions
_loaded: dict[tuple[str, int | None], Student] = {}
_detectors: dict[str, Detector] = {}
_made: list[type] = []
_lock = threading.RLock()


def register(
    folder: str | Path, *, alias: bool = True, replace: bool = False, detector: Detector | str | None = None
) -> str:
    """Makes a student known to fastembed and qdrant-client in this process and in the workers that it starts;
    its versioned name.

    It answers to `dclip/<name>@<8 hex>` and, with `alias`, to `dclip/<name>`, in `TextEmbedding`,
    `ImageEmbedding` and `LateInteractionMultimodalEmbedding`. qdrant-client asks dense models first, so
    region vectors through it have a name of their own: the same with "/regions" behind it; a text is then [1,
    D], a picture [1 + R, D] with the whole picture first.

    Args:
        folder: A student folder.
        alias: False leaves `dclip/<name>` to another student of that name.
        replace: Takes the alias over from another student. Clients that used it keep the old model until they
            are made anew.
        detector: What finds regions for "/regions": a name or an instance of `dclip_qdrant.detectors`.
            Default: a grid.

    Raises:
        StudentError: an incomplete or altered folder. UsageError: the alias belongs to another student.
            MissingExtra: no fastembed.
    """
    need("fastembed", "registration")
    student = Student.load(folder)
    entry = _Entry(str(Path(folder).resolve()), student.fingerprint, student.dim, detector)
    with _lock:
        names = [student.model_name] + ([f"dclip/{student.name}"] if alias else [])
        for name in names:
            known = _names.get(name.lower())
            if known is not None and known.fingerprint != entry.fingerprint and not replace:
                raise UsageError(
                    f"register({str(folder)!r})",
                    f"{name} is {known.folder} already",
                    "one student a name",
                    "alias=False, or replace=True",
                )
        for name in names:
            for spelling in (name, name + REGIONS_SUFFIX):
                _names[spelling.lower()] = entry
            _spelled[name.lower()] = name
        _enter_registries()
        _tell_children(entry.folder)
    return student.model_name


def registered() -> dict[str, str]:
    """Every name and its folder."""
    return {name: _names[low].folder for low, name in _spelled.items()}


def fingerprint_of(name: str) -> str | None:
    """Of the student behind a name in this process."""
    entry = _names.get(name.lower())
    return entry.fingerprint if entry else None


def _student(name: str, threads: int | None) -> tuple[Student, _Entry]:
    """One loaded student a folder and thread count, shared by its three models."""
    with _lock:
        entry = _names[name.lower()]
        key = (entry.folder, threads)
        if key not in _loaded:
            _loaded[key] = Student.load(entry.folder, threads=threads)
        return _loaded[key], entry


def _tell_children(folder: str) -> None:
    """`upload_points(parallel=2)` embeds in processes that know nothing of ours: the fork server imports us,
    and the environment says which students."""
    known = [f for f in os.environ.get(ENV, "").split(os.pathsep) if f]
    if folder not in known:
        os.environ[ENV] = os.pathsep.join([*known, folder])
    if "forkserver" in multiprocessing.get_all_start_methods():
        from multiprocessing import forkserver

        before = list(getattr(forkserver._forkserver, "_preload_modules", ["__main__"]))
        if IN_WORKERS not in before:
            multiprocessing.set_forkserver_preload([*before, IN_WORKERS])


def register_environment() -> None:
    """Registers what DCLIP_STUDENTS names; a folder that can't be loaded is warned of, never raised into the
    app that runs here."""
    for folder in [f for f in os.environ.get(ENV, "").split(os.pathsep) if f]:
        try:
            register(folder)
        except Exception as e:
            import warnings

            warnings.warn(f"dclip-qdrant: {folder} was not registered: {e}", RuntimeWarning, stacklevel=2)


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, str | Path | Image.Image):
        yield value
    else:
        yield from value


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    held: list[Any] = []
    for item in items:
        held.append(item)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held


def _enter_registries() -> None:
    from fastembed import ImageEmbedding, LateInteractionMultimodalEmbedding, TextEmbedding

    text, image, regions = _classes()
    for where, cls in (
        (TextEmbedding, text),
        (ImageEmbedding, image),
        (LateInteractionMultimodalEmbedding, regions),
    ):
        if cls not in where.EMBEDDINGS_REGISTRY:
            where.EMBEDDINGS_REGISTRY.append(cls)


def _classes() -> list[type]:
    """The three model classes; made on first use, because fastembed takes a second to import."""
    if _made:
        return _made
    from fastembed.common.model_description import DenseModelDescription, ModelSource
    from fastembed.image.image_embedding_base import ImageEmbeddingBase
    from fastembed.late_interaction_multimodal.late_interaction_multimodal_embedding_base import (
        LateInteractionMultimodalEmbeddingBase,
    )
    from fastembed.text.text_embedding_base import TextEmbeddingBase

    def listed(suffixes: tuple[str, ...]) -> list[Any]:
        return [
            DenseModelDescription(
                model=name + suffix,
                sources=ModelSource(hf="dclip-qdrant/local-only"),
                model_file="manifest.json",
                description="a student registered by dclip-qdrant",
                license="",
                size_in_GB=0.0,
                dim=_names[low].dim,
            )
            for low, name in _spelled.items()
            for suffix in suffixes
        ]

    class Ours:
        """What the three share: a student behind a name."""

        suffixes: tuple[str, ...] = ("",)
        model_name: str
        threads: int | None

        def __init__(
            self, model_name: str, cache_dir: str | None = None, threads: int | None = None, **kwargs: Any
        ) -> None:
            # models.Document(..., options={"dim": 128}): for collections of short vectors
            self.dim = kwargs.pop("dim", None)
            if self.dim is not None and not (
                isinstance(self.dim, int) and 1 <= self.dim <= self.get_embedding_size(model_name)
            ):
                raise UsageError(
                    f"{model_name}: dim", repr(self.dim), f"1 to {self.get_embedding_size(model_name)}"
                )
            # beside a fastembed class, which takes these
            super().__init__(model_name, cache_dir, threads, **kwargs)  # pyright: ignore[reportCallIssue]
            if not kwargs.get("lazy_load"):
                _student(model_name, threads)

        @classmethod
        def _list_supported_models(cls) -> list[Any]:
            return listed(cls.suffixes)

        @classmethod
        def get_embedding_size(cls, model_name: str) -> int:
            return _names[model_name.lower()].dim

        @property
        def embedding_size(self) -> int:
            return self.dim or self.get_embedding_size(self.model_name)

        @property
        def student(self) -> Student:
            return _student(self.model_name, self.threads)[0]

        def token_count(self, texts: str | Iterable[str], **_: Any) -> int:
            """Tokens without padding."""
            return self.student.token_count(list(_items(texts)))

    class DclipText(Ours, TextEmbeddingBase):
        def embed(
            self, documents: str | Iterable[str], batch_size: int = 256, parallel: int | None = None, **_: Any
        ) -> Iterator[np.ndarray]:
            for batch in _batches(_items(documents), batch_size):
                yield from shorten(self.student.embed_texts(batch), self.dim)

    class DclipImage(Ours, ImageEmbeddingBase):
        def embed(
            self, images: Any, batch_size: int = 16, parallel: int | None = None, **_: Any
        ) -> Iterator[np.ndarray]:
            for batch in _batches(_items(images), batch_size):
                yield from shorten(self.student.embed_images([as_rgb(v) for v in batch]), self.dim)

    class DclipRegions(Ours, LateInteractionMultimodalEmbeddingBase):
        suffixes = ("", REGIONS_SUFFIX)

        def embed_text(
            self, documents: str | Iterable[str], batch_size: int = 256, parallel: int | None = None, **_: Any
        ) -> Iterator[np.ndarray]:
            for batch in _batches(_items(documents), batch_size):
                yield from shorten(self.student.embed_texts(batch)[:, None], self.dim)

        def embed_image(
            self, images: Any, batch_size: int = 16, parallel: int | None = None, **_: Any
        ) -> Iterator[np.ndarray]:
            student, entry = _student(self.model_name, self.threads)
            detector = _detector(entry.detector)
            for batch in _batches(_items(images), batch_size):
                pictures = [as_rgb(v) for v in batch]
                for picture, regions in zip(pictures, detector(pictures), strict=True):
                    yield shorten(student.embed_regions(picture, regions.top(TOP_K)), self.dim)

    _made.extend((DclipText, DclipImage, DclipRegions))
    return _made


def _detector(wanted: Detector | str | None) -> Detector:
    """An instance as it is; a name as its detector, made once."""
    if wanted is not None and not isinstance(wanted, str):
        return wanted
    name = wanted or "grid"
    if name not in _detectors:
        _detectors[name] = build(name)
    return _detectors[name]
