"""The features stage: what the frozen base sees in every view and region of every picture, and in every
caption; where the student's trunk is frozen, its features too."""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from upath import UPath

from dclip_qdrant.jobs.cluster import actor_threads, map_pairs
from dclip_qdrant.pairs import Pairs, load_image
from dclip_qdrant.pairs.region_files import load_regions
from dclip_qdrant.pictures.preprocess import Preprocess
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.tables import contracts
from dclip_qdrant.tables.stages import Stage, parts, write_part
from dclip_qdrant.training.data import apply_view, view_box
from dclip_qdrant.training.evaluate import encode_texts
from dclip_qdrant.training.models import two_tower

logger = logging.getLogger(__name__)

BATCH = 32  # pictures a block; each has several views and regions
FORWARD = 64  # pictures a forward pass

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 as parts of width and height
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class FeatureRequest:
    """Whose features, of what. `student`: the model whose frozen trunk is cached too, or None."""

    root: str
    pairs: Pairs
    recipe: Recipe
    base: str
    base_fingerprint: str
    student: str | None = None
    student_fingerprint: str = ""
    regions: Stage | None = None
    seed: int = 0

    @property
    def stage(self) -> Stage:
        recipe, several = self.recipe, self.recipe.train.views > 1
        inputs = {
            "contract": contracts.FEATURES.version,
            "pairs": self.pairs.fingerprint,
            "base": self.base_fingerprint,
            "student": self.student_fingerprint if self.student else None,
            "regions": self.regions.path.name if self.regions else None,
            "top_k": recipe.regions.top_k if self.regions else None,
            "context": recipe.regions.context if self.regions else None,
            "views": recipe.train.views,
            "crop_scale": recipe.train.crop_scale if several else None,
            "flip": recipe.train.flip if several else None,
            "global": recipe.teacher.include_global if recipe.teacher else None,
            "normalise": recipe.teacher.normalise_crops if recipe.teacher else None,
            "seed": self.seed,
        }
        return Stage(self.root, "features", inputs)


@dataclass
class PreparedPicture:
    """Pixels of one picture's views and region crops, and what each of them shows."""

    views: list[np.ndarray]
    view_boxes: list[Box]
    flips: list[bool]
    crops: list[np.ndarray]
    crop_boxes: list[Box]


class Featurise:
    """Actor: pictures in, rows of the features contract written."""

    def __init__(
        self,
        base: str,
        student: str | None,
        recipe: dict[str, Any],
        regions: str | None,
        seed: int,
        out: str,
        threads: int,
    ) -> None:
        self.pool = actor_threads(threads)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.recipe = Recipe(**recipe)
        self.out = UPath(out)
        self.seed = seed
        self.base = two_tower.load(base).to(self.device)
        self.student = None
        if student is not None:
            self.student = self.base if student == base else two_tower.load(student).to(self.device)
        self.regions = load_regions(regions) if regions else None
        self.crop_preprocess = replace(self.base.preprocess, resize_mode="squash")
        teacher = self.recipe.teacher
        if teacher and not teacher.normalise_crops:  # as released: ToTensor alone, bilinear squash
            self.crop_preprocess = replace(
                self.crop_preprocess, interpolation="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
            )
        self.with_whole = regions is not None and (teacher is None or teacher.include_global)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        prepared = list(self.pool.map(self._prepare, rows))
        views = np.stack([view for p in prepared for view in p.views])
        view_vectors, view_trunks = self._encode(views, self.base.preprocess)
        crops = [crop for p in prepared for crop in p.crops]
        crop_vectors: Any = []
        crop_trunks: Any = []
        if crops:
            crop_vectors, crop_trunks = self._encode(np.stack(crops), self.crop_preprocess)
        captions = [caption for row in rows for caption in row["captions"]]
        text_vectors = encode_texts(self.base, captions, self.device)
        out: list[dict[str, Any]] = []
        view = crop = text = 0  # where the picture's own begin
        for row, picture in zip(rows, prepared, strict=True):
            own = slice(crop, crop + len(picture.crops))
            regions, boxes = list(crop_vectors[own]), list(picture.crop_boxes)
            trunks = list(crop_trunks[own]) if view_trunks is not None and crops else []
            if self.with_whole:
                regions, boxes = [view_vectors[view], *regions], [WHOLE, *boxes]
                trunks = [view_trunks[view], *trunks] if view_trunks is not None else []
            plain = {
                "captions": row["captions"],
                "regions": regions,
                "region_boxes": boxes,
                "region_trunk": trunks,
                "texts": list(text_vectors[text : text + len(row["captions"])]),
            }
            nothing = {name: [] for name in plain}
            for number in range(len(picture.views)):
                facts = {
                    "key": row["key"],
                    "view": number,
                    "crop": picture.view_boxes[number],
                    "flip": picture.flips[number],
                    "split": row["split"],
                    "image": view_vectors[view],
                    "trunk": view_trunks[view] if view_trunks is not None else [],
                }
                out.append(facts | (plain if number == 0 else nothing))
                view += 1
            crop, text = own.stop, text + len(row["captions"])
        write_part(self.out, contracts.FEATURES, out)
        return pa.table({"done": [len(rows)]})

    def _prepare(self, row: dict[str, Any]) -> PreparedPicture:
        train, settings = self.recipe.train, self.recipe.regions
        image = load_image(row)
        rng = np.random.default_rng([self.seed, _key_number(row["key"])])
        boxes, flips = [WHOLE], [False]
        for _ in range(train.views - 1 if row["split"] == "train" else 0):
            boxes.append(view_box(rng, train.crop_scale))
            flips.append(train.flip and bool(rng.random() < 0.5))
        views = [
            self.base.preprocess.pixels(apply_view(image, np.array(box), flip))
            for box, flip in zip(boxes, flips, strict=True)
        ]
        picture = PreparedPicture(views, boxes, flips, [], [])
        if self.regions is not None and row["key"] in self.regions:
            regions = self.regions[row["key"]].top(settings.top_k)
            width, height = image.size
            for left, top, right, bottom in regions.cuts(width, height, context=settings.context):
                picture.crops.append(self.crop_preprocess.pixels(image.crop((left, top, right, bottom))))
                picture.crop_boxes.append((left / width, top / height, right / width, bottom / height))
        return picture

    def _tensor(self, pixels: np.ndarray, preprocess: Preprocess) -> Tensor:
        return torch.from_numpy(preprocess.normalise(pixels)).to(self.device)

    def _encode(self, pixels: np.ndarray, preprocess: Preprocess) -> tuple[np.ndarray, np.ndarray | None]:
        """The base's features and, where a frozen trunk is cached, the student's trunk features."""
        vectors: list[np.ndarray] = []
        trunks: list[np.ndarray] = []
        with torch.no_grad():
            for batch in _batches(pixels):
                x = self._tensor(batch, preprocess)
                if self.student is self.base:
                    features = self.base.trunk(x)
                    trunks.append(features.float().cpu().numpy())
                    vectors.append(self.base.head(features).float().cpu().numpy())
                    continue
                vectors.append(self.base.encode_image(x).float().cpu().numpy())
                if self.student is not None:
                    own = self.student.trunk(self._tensor(batch, self.student.preprocess))
                    trunks.append(own.float().cpu().numpy())
        return np.concatenate(vectors), np.concatenate(trunks) if trunks else None


def _batches(pixels: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(pixels), FORWARD):
        yield pixels[start : start + FORWARD]


def _key_number(key: str) -> int:
    """What a picture's random views follow from, beside the seed."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])


def extract_features(request: FeatureRequest, *, actors: int | None, from_scratch: bool = False) -> Stage:
    """The features stage; resumes."""
    stage = request.stage
    if from_scratch:
        stage.clear()
    if stage.done:
        logger.info("features: reused %s", stage.path.name)
        return stage
    arguments = {
        "base": request.base,
        "student": request.student,
        "recipe": request.recipe.as_dict(),
        "regions": str(request.regions.path) if request.regions else None,
        "seed": request.seed,
    }
    map_pairs(
        request.pairs,
        Featurise,
        arguments,
        name="features",
        out=stage.path,
        contract=contracts.FEATURES,
        actors=actors,
        batch=BATCH,
    )
    rows = sum(table.num_rows for table in parts(stage.path, contracts.FEATURES, ["key"]))
    stage.finish(rows=rows)
    logger.info("features: %s views", f"{rows:,}")
    return stage
