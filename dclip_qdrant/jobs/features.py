"""The features stage: what the frozen base sees in every view and region of every picture, and in every
caption; where the student's trunks are frozen, their features too.

Each model gets its own pixels: its own resolution, resize mode, mean and std."""

import hashlib
import io
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from upath import UPath

from dclip_qdrant.jobs.cluster import actor_threads, gpus, map_pairs
from dclip_qdrant.pairs import Pairs, load_image
from dclip_qdrant.pairs.region_files import load_regions
from dclip_qdrant.pictures.preprocess import Preprocess
from dclip_qdrant.pictures.regions import Regions
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.tables import contracts
from dclip_qdrant.tables.stages import Stage, parts, write_part
from dclip_qdrant.training.data import apply_view, view_box
from dclip_qdrant.training.evaluate import batched, encode_texts
from dclip_qdrant.training.models import two_tower
from dclip_qdrant.training.models.bottom import FORWARD

logger = logging.getLogger(__name__)

# bytes of an actor beside its models, benchmarks/features.py: torch, a block of pictures and its pixels
MEMORY = 1_500_000_000
BATCH = 32  # pictures a block; each has several views and regions

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 as parts of width and height
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class FeatureRequest:
    """Whose features, of what. `student`: the model whose frozen trunks are cached too (`student_image`,
    `student_text`: which of them), or None."""

    root: str
    pairs: Pairs
    recipe: Recipe
    base: str
    base_fingerprint: str
    student: str | None = None
    student_fingerprint: str = ""
    student_image: bool = True
    student_text: bool = False
    regions: Stage | None = None
    seed: int = 0
    pictures: bool = False  # with the pictures that are inside the pairs: a streamed run decodes them

    @property
    def stage(self) -> Stage:
        recipe, several = self.recipe, self.recipe.train.views > 1
        inputs = {
            "contract": contracts.FEATURES.version,
            "pairs": self.pairs.fingerprint,
            "base": self.base_fingerprint,
            "student": self.student_fingerprint if self.student else None,
            "trunks": [self.student_image, self.student_text] if self.student else None,
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
        if self.pictures:
            inputs["pictures"] = True
        return Stage(self.root, "features", inputs)

    def memory(self) -> int:
        """Bytes of an actor, which Ray sets aside."""
        names = {self.base} | ({self.student} if self.student else set())
        models = [two_tower.load(name, weights=False) for name in names]
        return MEMORY + sum(p.numel() * p.element_size() for model in models for p in model.parameters())

    def decoding(self) -> dict[str, Any]:
        """What `Decode` is made with, beside its threads."""
        own = None
        if self.student is not None and self.student_image:
            own = two_tower.load(self.student).preprocess
        base = two_tower.load(self.base).preprocess
        regions = str(self.regions.path) if self.regions else None
        return {"preparer": Preparer.of(base, own, self.recipe, self.seed), "regions": regions}

    def arguments(self) -> dict[str, Any]:
        """What `Featurise` is made with, beside where it writes and its threads."""
        return {
            "base": self.base,
            "student": self.student,
            "student_image": self.student_image,
            "student_text": self.student_text,
            "recipe": self.recipe.as_dict(),
            "regions": str(self.regions.path) if self.regions else None,
            "seed": self.seed,
            "pictures": self.pictures,
        }


@dataclass
class Pixels:
    """Pictures as each model's input [S, S, 3] uint8; `student` is empty where its trunk isn't cached."""

    base: list[np.ndarray]
    student: list[np.ndarray]


@dataclass
class PreparedPicture:
    """Pixels of one picture's views and region crops, and what each of them shows."""

    views: Pixels
    view_boxes: list[Box]
    flips: list[bool]
    crops: Pixels
    crop_boxes: list[Box]


@dataclass(frozen=True)
class Preparer:
    """Pairs rows -> what models read of their pictures. Plain values and settings: it travels to CPU tasks.

    `views`, `crops`: the base's preprocessing of each, then the student's, or None where its trunk isn't
    cached.
    """

    recipe: Recipe
    seed: int
    views: tuple[Preprocess, Preprocess | None]
    crops: tuple[Preprocess, Preprocess | None]

    @classmethod
    def of(cls, base: Preprocess, student: Preprocess | None, recipe: Recipe, seed: int) -> "Preparer":
        """With crops squashed, and as the recipe's teacher wants them."""
        squash = replace(base, resize_mode="squash")
        if recipe.teacher and not recipe.teacher.normalise_crops:  # as released: ToTensor alone, bilinear
            squash = replace(squash, interpolation="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        of_student = None if student is None else replace(student, resize_mode="squash")
        return cls(recipe, seed, (base, student), (squash, of_student))

    def __call__(self, row: dict[str, Any], regions: Regions | None) -> PreparedPicture:
        train, settings = self.recipe.train, self.recipe.regions
        image = load_image(row)
        rng = np.random.default_rng([self.seed, _key_number(row["key"])])
        boxes, flips = [WHOLE], [False]
        for _ in range(train.views - 1 if row["split"] == "train" else 0):
            boxes.append(view_box(rng, train.crop_scale))
            flips.append(train.flip and bool(rng.random() < 0.5))
        views = [apply_view(image, np.array(box), flip) for box, flip in zip(boxes, flips, strict=True)]
        crops, crop_boxes = [], []
        if regions is not None:
            width, height = image.size
            for left, top, right, bottom in regions.top(settings.top_k).cuts(
                width, height, context=settings.context
            ):
                crops.append(image.crop((left, top, right, bottom)))
                crop_boxes.append((left / width, top / height, right / width, bottom / height))
        return PreparedPicture(
            views=_pixels(views, self.views),
            view_boxes=boxes,
            flips=flips,
            crops=_pixels(crops, self.crops),
            crop_boxes=crop_boxes,
        )


def _pixels(pictures: list[Image.Image], preprocess: tuple[Preprocess, Preprocess | None]) -> Pixels:
    of_base, of_student = preprocess
    base = [of_base.pixels(picture) for picture in pictures]
    if of_student is None:
        return Pixels(base, [])
    if replace(of_student, mean=of_base.mean, std=of_base.std) == of_base:
        return Pixels(base, base)  # mean and std come later
    return Pixels(base, [of_student.pixels(picture) for picture in pictures])


class Decode:
    """The CPU half, where models have GPUs: pictures in, pixels out, so that no GPU waits for a JPEG."""

    def __init__(self, preparer: Preparer, regions: str | None, threads: int) -> None:
        self.prepare, self.pool = preparer, ThreadPoolExecutor(max(2, threads))
        self.regions = load_regions(regions) if regions else None

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        return table.append_column("prepared", pa.array(self.pool.map(self._packed, rows), pa.binary()))

    def _packed(self, row: dict[str, Any]) -> bytes:
        picture = self.prepare(row, _regions_of(self.regions, row))
        packed = io.BytesIO()
        np.savez(
            packed,
            base_views=picture.views.base,
            student_views=picture.views.student,
            base_crops=picture.crops.base,
            student_crops=picture.crops.student,
            view_boxes=picture.view_boxes,
            flips=picture.flips,
            crop_boxes=picture.crop_boxes,
        )
        return packed.getvalue()


def unpacked(data: bytes) -> PreparedPicture:
    """What `Decode` made of a picture."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return PreparedPicture(
            views=Pixels(list(arrays["base_views"]), list(arrays["student_views"])),
            view_boxes=[(x0, y0, x1, y1) for x0, y0, x1, y1 in arrays["view_boxes"].tolist()],
            flips=arrays["flips"].tolist(),
            crops=Pixels(list(arrays["base_crops"]), list(arrays["student_crops"])),
            crop_boxes=[(x0, y0, x1, y1) for x0, y0, x1, y1 in arrays["crop_boxes"].tolist()],
        )


def _regions_of(regions: Any, row: dict[str, Any]) -> Regions | None:
    """A picture's boxes, where any were looked for."""
    return regions[row["key"]] if regions is not None and row["key"] in regions else None


class Featurise:
    """Actor: pictures in (or what `Decode` made of them), rows of the features contract written."""

    def __init__(
        self,
        base: str,
        student: str | None,
        student_image: bool,
        student_text: bool,
        recipe: dict[str, Any],
        regions: str | None,
        seed: int,
        pictures: bool,
        out: str,
        threads: int,
    ) -> None:
        self.pool = actor_threads(threads)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.recipe = Recipe(**recipe)
        self.out = UPath(out)
        self.pictures = pictures
        self.base = two_tower.load(base).to(self.device)
        own = None
        if student is not None:
            own = self.base if student == base else two_tower.load(student).to(self.device)
        self.image_student = own if student_image else None
        self.one_trunk = self.image_student is not None and _same_trunk(self.base, self.image_student)
        self.text_student = own if student_text else None
        self.regions = load_regions(regions) if regions else None
        of_student = self.image_student.preprocess if self.image_student else None
        self.prepare = Preparer.of(self.base.preprocess, of_student, self.recipe, seed)
        teacher = self.recipe.teacher
        self.with_whole = regions is not None and (teacher is None or teacher.include_global)

    def __call__(self, table: pa.Table) -> pa.Table:
        if "prepared" in table.column_names:
            prepared = [unpacked(data) for data in table["prepared"].to_pylist()]
            rows = table.drop_columns(["prepared"]).to_pylist()
        else:
            rows = table.to_pylist()
            prepared = list(
                self.pool.map(lambda row: self.prepare(row, _regions_of(self.regions, row)), rows)
            )
        write_part(self.out, contracts.FEATURES, self._rows(rows, prepared))
        return pa.table({"done": [len(rows)]})

    def _rows(self, rows: list[dict[str, Any]], prepared: list[PreparedPicture]) -> list[dict[str, Any]]:
        view_vectors, view_trunks = self._encode([p.views for p in prepared], self.prepare.views)
        crop_vectors, crop_trunks = self._encode([p.crops for p in prepared], self.prepare.crops)
        captions = [caption for row in rows for caption in row["captions"]]
        text_vectors, text_trunks = self._encode_texts(captions)
        out: list[dict[str, Any]] = []
        view = crop = text = 0  # where the picture's own begin
        for row, picture in zip(rows, prepared, strict=True):
            own = slice(crop, crop + len(picture.crops.base))
            said = slice(text, text + len(row["captions"]))
            regions, boxes = list(crop_vectors[own]), list(picture.crop_boxes)
            trunks = list(crop_trunks[own])
            if self.with_whole:
                regions, boxes = [view_vectors[view], *regions], [WHOLE, *boxes]
                trunks = [view_trunks[view], *trunks] if self.image_student is not None else []
            plain = {
                "captions": row["captions"],
                "regions": regions,
                "region_boxes": boxes,
                "region_trunk": trunks,
                "texts": list(text_vectors[said]),
                "text_trunk": list(text_trunks[said]),
                "picture": row["image"] if self.pictures else None,
            }
            nothing = {name: [] for name in plain} | {"picture": None}
            for number in range(len(picture.view_boxes)):
                facts = {
                    "key": row["key"],
                    "view": number,
                    "crop": picture.view_boxes[number],
                    "flip": picture.flips[number],
                    "split": row["split"],
                    "uri": row["uri"],
                    "image": view_vectors[view],
                    "trunk": view_trunks[view] if self.image_student is not None else [],
                }
                out.append(facts | (plain if number == 0 else nothing))
                view += 1
            crop, text = own.stop, said.stop
        return out

    def _encode_texts(self, captions: list[str]) -> tuple[np.ndarray, list[np.ndarray]]:
        """The base's vectors of captions, and the student's features below its projection where they are
        cached."""
        if self.text_student is self.base and captions:  # one pass gives both
            trunks = encode_texts(self.base, captions, self.device, trunk=True)
            return batched(self.base.text_head, trunks, self.device), list(trunks)
        vectors = encode_texts(self.base, captions, self.device)
        if self.text_student is None:
            return vectors, []
        return vectors, list(encode_texts(self.text_student, captions, self.device, trunk=True))

    @torch.no_grad()
    def _encode(
        self, pictures: list[Pixels], preprocess: tuple[Preprocess, Preprocess | None]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The base's features of each, and the student's trunk features where they are cached."""
        base = [pixels for p in pictures for pixels in p.base]
        student = [pixels for p in pictures for pixels in p.student]
        vectors: list[np.ndarray] = []
        trunks: list[np.ndarray] = []
        if self.one_trunk and preprocess[0] == preprocess[1]:  # one pass gives both
            for x in self._batches(base, preprocess[0]):
                features = self.base.trunk(x)
                trunks += list(features.float().cpu().numpy())
                vectors += list(self.base.head(features).float().cpu().numpy())
            return vectors, trunks
        for x in self._batches(base, preprocess[0]):
            vectors += list(self.base.encode_image(x).float().cpu().numpy())
        if self.image_student is not None and preprocess[1] is not None:
            for x in self._batches(student, preprocess[1]):
                trunks += list(self.image_student.trunk(x).float().cpu().numpy())
        return vectors, trunks

    def _batches(self, pixels: list[np.ndarray], preprocess: Preprocess) -> Iterator[Tensor]:
        """[B, 3, S, S] on the device."""
        size = FORWARD[self.device]
        for start in range(0, len(pixels), size):
            batch = torch.from_numpy(np.stack(pixels[start : start + size])).to(self.device)
            yield self.base.normalised(batch, preprocess)


def _same_trunk(base: two_tower.TwoTower, student: two_tower.TwoTower) -> bool:
    """Whether both see the same below their projections: a student whose text tower alone was cut."""
    if student is base:
        return True
    return base.has_trunk and student.has_trunk and base.trunk_mark() == student.trunk_mark()


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
    map_pairs(
        request.pairs,
        Featurise,
        request.arguments(),
        decode=(Decode, request.decoding()) if gpus() else None,
        name="features",
        out=stage.path,
        contract=contracts.FEATURES,
        actors=actors,
        batch=BATCH,
        memory=request.memory(),
    )
    rows = sum(table.num_rows for table in parts(stage.path, contracts.FEATURES, ["key"]))
    stage.finish(rows=rows)
    logger.info("features: %s views", f"{rows:,}")
    return stage
