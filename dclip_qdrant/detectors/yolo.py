"""Ultralytics YOLO (8, 11, 26, ...). The only file that touches ultralytics, which is AGPL-3.0: without it,
use `grid` or your own boxes."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dclip_qdrant.detectors.pickles import check_checkpoint
from dclip_qdrant.errors import UsageError
from dclip_qdrant.lookup import missing
from dclip_qdrant.pictures.regions import Regions

TASKS = ("detect", "segment", "pose")  # those whose results have boxes


@contextmanager
def _process_kept() -> Iterator[None]:
    """Undoes what ultralytics (8.4) does to its whole process.

    Importing it swaps Image.open for one that answers a broken picture by looking for pi-heif (the door of
    `images` would then give other reasons in a process that has a detector) and sets OMP_NUM_THREADS to 1;
    its first prediction on a CPU leaves torch all cores but one: one of two.
    """
    import torch

    pillow_open, threads, omp = Image.open, torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    try:
        yield
    finally:
        Image.open = pillow_open
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if omp is None:
            os.environ.pop("OMP_NUM_THREADS", None)


class Yolo:
    """`weights`: a .pt file, or a name that ultralytics downloads (yolo11n.pt). Boxes come back in pixels of
    the given images."""

    def __init__(
        self,
        weights: str = "yolo11n.pt",
        image_size: int = 640,
        min_score: float = 0.25,
        max_boxes: int = 100,
        device: str | None = None,
    ) -> None:
        if os.sep in weights and not Path(weights).is_file():
            raise UsageError(
                "detector weights", f"no file {weights}", "a YOLO .pt file, or a name like yolo11n.pt"
            )
        os.environ.setdefault("YOLO_VERBOSE", "false")
        os.environ.setdefault("YOLO_AUTOINSTALL", "false")  # it would run pip in the user's environment
        # importing it writes settings: to a folder of our own, never over the user's
        os.environ.setdefault("YOLO_CONFIG_DIR", str(Path.home() / ".cache" / "dclip-qdrant" / "ultralytics"))
        try:
            with _process_kept():
                from ultralytics import YOLO
                from ultralytics.utils import SETTINGS
        except ModuleNotFoundError as e:
            raise missing(e.name or "ultralytics", "the yolo detector") from e
        # no usage reports from our users' machines; dict's own way, since SETTINGS' writes the settings file
        dict.__setitem__(SETTINGS, "sync", False)
        if Path(weights).is_file():
            check_checkpoint(Path(weights))
            self.fingerprint = "yolo-" + hashlib.sha256(Path(weights).read_bytes()).hexdigest()[:16]
        else:
            self.fingerprint = f"yolo-{weights}"
        self.fingerprint += f"-{image_size}-{min_score}-{max_boxes}"
        try:
            self._model = YOLO(weights)
        except Exception as e:  # a missing download, a broken file: ultralytics raises many kinds
            raise UsageError(
                "detector weights",
                f"{weights}: {str(e).splitlines()[0][:200]}",
                "a YOLO .pt file, or a name like yolo11n.pt",
            ) from e
        if self._model.task not in TASKS:
            came = f"{weights} is a model for the task {self._model.task!r}, which gives no boxes"
            raise UsageError("detector weights", came, f"a model for {', '.join(TASKS)}")
        self._options = {
            "imgsz": image_size,
            "conf": min_score,
            "max_det": max_boxes,
            "verbose": False,
            "device": device,
        }

    def __call__(self, images: list[Image.Image]) -> list[Regions]:
        with _process_kept():
            results = self._model.predict(images, **self._options) if images else []
        return [self._regions(r) for r in results]

    def _regions(self, result: Any) -> Regions:  # ultralytics.engine.results.Results
        boxes = result.boxes
        labels = tuple(str(result.names[int(c)]) for c in boxes.cls.tolist())
        return Regions(
            boxes.xyxy.cpu().numpy().astype(np.float32).reshape(-1, 4),
            boxes.conf.cpu().numpy().astype(np.float32),
            labels,
        )
