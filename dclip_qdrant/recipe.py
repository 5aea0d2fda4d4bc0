"""A recipe: everything that decides what a student becomes. TOML in `recipes/`, checked whole, unknown keys
are errors.

`Recipe.load("dclip", ["train.lr=1e-4"])` reads the file, applies the settings and checks types and ranges.
Strings name components (`lookup.py`), so that adding an objective or a detector changes nothing here.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dclip_qdrant.errors import RecipeError
from dclip_qdrant.lookup import did_you_mean
from dclip_qdrant.settings import apply_setting, checked, read_toml

HERE = Path(__file__).parent / "recipes"

Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Trainable = Literal["frozen", "proj", "attn_proj", "last_n", "full", "lora"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RegionSettings(_Part):
    detector: str = Field(default="yolo", description="a file in detectors/, or package.module:Class")
    options: dict[str, Any] = Field(
        default={}, description="keyword arguments of the detector, e.g. weights, image_size, min_score"
    )
    top_k: Positive = Field(default=4, description="boxes a picture, by confidence x area")
    context: Fraction = Field(
        default=0.1, description="each side of a crop is widened by this part of the box"
    )


class TeacherSettings(_Part):
    """The region teacher (docs/papers.md 1.1 and 6.2)."""

    fusion: Literal["bidirectional", "regions_only"] = Field(
        default="bidirectional",
        description="text and regions attend to each other, or regions alone (no caption inside)",
    )
    spans: Literal["tokens", "phrases"] = "tokens"
    caption: Literal["same", "other"] = Field(
        default="other",
        description=(
            "`same` fuses the very caption that is the target (as released: it can be copied); "
            "`other` fuses another one"
        ),
    )
    heads: Positive = 8
    mask_padding: bool = Field(
        default=True, description="false: padded rows take part in attention and pooling, as released"
    )
    normalise_crops: bool = Field(
        default=True, description="false: crops are squashed and only scaled to 0..1, as released"
    )
    include_global: bool = Field(default=True, description="the whole picture is a region token too")
    gate: float | Literal["none"] = Field(
        default=0.1,
        description=(
            "e = n(image + gate x fused), the start of a learned gate; none: the fused "
            "embedding alone, as released"
        ),
    )
    pool_temperature: float = Field(default=2.0, gt=0)
    temperature: float = Field(default=0.05, gt=0, description="of the teacher's InfoNCE")
    epochs: Positive = 10
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: Weight = 0.0
    optimizer: Literal["adam", "adamw"] = "adamw"
    batch_size: Positive = 256
    schedule: Literal["cosine", "constant"] = "cosine"


class EnsembleSettings(_Part):
    """Further teachers, whose vectors are cached: mixed into soft targets (dataset reinforcement,
    MobileCLIP), or joined with the teacher's into one target (training/joint_target.py)."""

    models: tuple[str, ...] = Field(
        default=(),
        description=(
            "open_clip names or local folders; `base` is the teaching model as it was, `student` the "
            "student's model as it was, before any cut, `fine_tuned` the student after plain fine-tuning "
            "(`sft`)"
        ),
    )
    target: Literal["each", "joint"] = Field(
        default="each",
        description=(
            "each: every teacher for itself (soft_targets reads them); joint: all of them, side by side and "
            "brought to the student's width, are the teacher of every objective; needs `student` among them"
        ),
    )
    weights: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(0.35, 0.5, 0.7, 1.0, 1.4),
        min_length=1,
        description="joint: of every further teacher, where the first has 1; chosen on validation",
    )

    @property
    def joint(self) -> bool:
        return self.target == "joint"


class InheritSettings(_Part):
    """A lighter student cut from the model that it would start as (`student.model`, else the base): evenly
    spaced layers, each inherited whole (ConaCLIP's and TinyCLIP's students), and the commonest tokens. Null
    keeps all."""

    image_layers: int | None = Field(default=None, gt=0)
    text_layers: int | None = Field(default=None, gt=0)
    vocabulary: int | None = Field(
        default=None,
        gt=514,
        description=(
            "tokens that the text tower knows, the first of CLIP's; rarer words are read in more pieces "
            "(most of a small model's parameters are its tokens')"
        ),
    )


class StudentSettings(_Part):
    model: str | None = Field(
        default=None,
        description=(
            "an open_clip name (ViT-B-32/openai), a local folder, or null: the same model as the base"
        ),
    )
    train: Trainable = Field(
        default="attn_proj", description="which image parameters learn; the output projection always does"
    )
    text: Trainable = Field(
        default="frozen", description="which text parameters learn; frozen keeps old text vectors valid"
    )
    last_n: Positive = Field(default=2, description="blocks that learn under `last_n`")
    start: Literal["as_is", "fitted"] = Field(
        default="as_is",
        description=(
            "fitted: both output projections start as the ridge regression of the joint targets on what the "
            "trunks say (training/fitted_start.py)"
        ),
    )
    inherit: InheritSettings | None = Field(
        default=None, description="start from a cut of `model`, or of the base"
    )
    lora_rank: Positive = 8
    lora_alpha: float = Field(default=16.0, gt=0)


class ObjectiveSettings(BaseModel):
    """`name` and `weight`; every other key goes to the objective itself."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str
    weight: Weight = 1.0

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class PhaseSettings(_Part):
    """A part of the schedule in which one tower rests."""

    towers: Literal["image", "text", "both"]
    epochs: Positive


class TrainSettings(_Part):
    epochs: Positive = 5
    phases: tuple[PhaseSettings, ...] = Field(
        default=(),
        description=(
            "one after another, e.g. image, text, both (ConaCLIP's staging); their epochs must "
            "sum to `epochs`"
        ),
    )
    batch_size: Positive = Field(default=256, description="global: what InfoNCE sees, over all workers")
    chunk_size: Positive = Field(
        default=64,
        description="pictures a forward pass; a larger batch is gradient-cached (same gradient, less memory)",
    )
    captions: Positive = Field(default=1, description="captions drawn for each picture in a step")
    region_share: Fraction = Field(
        default=0.0,
        description=(
            "crops drawn beside the pictures, as a part of the batch, for objectives of "
            "regions; rivals get as many more epochs"
        ),
    )
    span_share: Weight = Field(
        default=0.0,
        description=(
            "phrases drawn beside the captions, as a part of the batch's pictures, for objectives of spans"
        ),
    )
    picture_share: Weight = Field(
        default=0.0,
        description=(
            "pictures without captions drawn beside the batch, as a part of it, for objectives of pictures"
        ),
    )
    views: Positive = Field(
        default=1,
        description=(
            "stored augmentations of each picture (teacher and student see the same); 1 is the "
            "plain picture alone"
        ),
    )
    crop_scale: Fraction = Field(default=0.7, description="smallest area of an augmented view")
    flip: bool = Field(
        default=False, description="mirror half of the views; off, because captions say left and right"
    )
    mixup: Weight = Field(
        default=0.0,
        description=(
            "pictures are blended in pairs, their targets and labels alike, by shares drawn from Beta(mixup, "
            "mixup); for soft_targets of pairs and cosine of image and text; 0 is off"
        ),
    )
    lr: float = Field(default=1e-5, gt=0)
    text_lr: float | None = Field(default=None, gt=0, description="null: the same as lr")
    projection_lr: float | None = Field(
        default=None, gt=0, description="of the output projections; null: the same as their tower's"
    )
    layer_decay: float = Field(
        default=1.0, gt=0, le=1, description="learning rate factor from each layer to the one below it"
    )
    weight_decay: Weight = 0.01
    warmup: Fraction = Field(default=0.1, description="part of all steps")
    schedule: Literal["cosine", "constant"] = "cosine"
    clip_norm: float | None = Field(default=1.0, gt=0)
    checkpoint_s: float = Field(
        default=60.0, ge=0, description="seconds between checkpoints (and one at the end)"
    )


class KeepSettings(_Part):
    """What holds on to the base model's knowledge."""

    l2_sp: Weight = Field(
        default=0.0, description="pull towards the starting weights (L2-SP, Li et al. 2018)"
    )
    ema: Fraction = Field(default=0.0, description="decay of the averaged weights; 0 is off")
    wise_ft: tuple[Fraction, ...] = Field(
        default=(1.0,),
        min_length=1,
        description="alphas tried on validation (WiSE-FT, Wortsman et al. 2022); 1 is the student as trained",
    )
    fine_tuned: tuple[Fraction, ...] = Field(
        default=(0.0,),
        min_length=1,
        description=(
            "shares of the plainly fine-tuned student's weights, averaged with the trained ones (model "
            "soups, Wortsman et al. 2022) and tried on validation with every alpha; 0 is off; needs "
            "`fine_tuned` among ensemble.models"
        ),
    )

    @property
    def averages(self) -> bool:
        return any(self.fine_tuned)


class HubnessSettings(_Part):
    """Turns down hubs, the pictures and captions that are near to everything, after training and in the
    weights (training/hubness.py). The text tower's vectors change by it, a frozen one's too."""

    strengths: tuple[Weight, ...] = Field(
        default=(0.0,),
        min_length=1,
        description=(
            "how much a hub's cosines shrink; tried on validation with every alpha of keep.wise_ft, 0 is off"
        ),
    )
    share: float = Field(
        default=0.0625, gt=0, lt=0.5, description="of the components, what each side gives to it"
    )
    pictures: Positive = Field(
        default=4096, description="training pictures that tell where the power lies, at most"
    )

    @property
    def on(self) -> bool:
        return any(self.strengths)


class IndexSettings(_Part):
    """Makes a student fit for short and quantised vectors without changing what it says at full length: both
    towers are turned by one rotation, learned on the training vectors (training/rotation.py). Nothing is
    turned without objectives."""

    objectives: tuple[ObjectiveSettings, ...] = Field(
        default=(), description="what the rotation is learned from: matryoshka, quantised"
    )
    steps: Positive = 400
    batch_size: Positive = 1024
    lr: float = Field(default=3e-3, gt=0)


class Recipe(_Part):
    name: str
    about: str = Field(default="", description="what it is for, in a line or two")
    when: str = Field(default="", description="when to pick it")
    regions: RegionSettings = RegionSettings()
    teacher: TeacherSettings | None = Field(
        default=None, description="absent: no teacher, e.g. plain fine-tuning"
    )
    ensemble: EnsembleSettings = EnsembleSettings()
    student: StudentSettings = StudentSettings()
    objectives: tuple[ObjectiveSettings, ...] = Field(min_length=1)
    train: TrainSettings = TrainSettings()
    keep: KeepSettings = KeepSettings()
    hubness: HubnessSettings = HubnessSettings()
    index: IndexSettings = IndexSettings()

    @model_validator(mode="after")
    def _agrees(self) -> "Recipe":
        if self.train.phases and sum(p.epochs for p in self.train.phases) != self.train.epochs:
            raise ValueError(
                f"train.phases have {sum(p.epochs for p in self.train.phases)} epochs, "
                f"train.epochs says {self.train.epochs}"
            )
        if self.keep.averages and "fine_tuned" not in self.ensemble.models:
            raise ValueError('keep.fine_tuned needs "fine_tuned" in ensemble.models')
        if self.ensemble.joint:
            self._joint_agrees()
        elif self.student.start == "fitted":
            raise ValueError('student.start = "fitted" is fitted to joint targets: set ensemble.target')
        if self.train.mixup and not all(_bears_mixup(objective) for objective in self.objectives):
            raise ValueError(
                "train.mixup blends pictures, their targets and their captions' labels: for soft_targets of "
                "pairs (labels = 1 is InfoNCE) and cosine of image and text alone"
            )
        return self

    def _joint_agrees(self) -> None:
        if "student" not in self.ensemble.models:
            raise ValueError('a joint target needs "student" in ensemble.models')
        if self.teacher is not None or self.train.region_share or self.train.picture_share:
            raise ValueError(
                "a joint target goes with captioned pictures alone: no [teacher], train.region_share or "
                "train.picture_share"
            )
        if self.student.text == "frozen":
            raise ValueError("joint targets are another space: student.text must learn, `proj` at least")

    @property
    def sweep_points(self) -> int:
        """How many weights are measured on validation before one is chosen."""
        return len(self.keep.wise_ft) * len(self.keep.fine_tuned) * len(self.hubness.strengths)

    @classmethod
    def load(cls, name: str | Path, settings: tuple[str, ...] | list[str] = ()) -> "Recipe":
        """A recipe by name or path, with `a.b=value` settings on top (values are TOML;
        `objectives.0.weight=2` reaches into the list).

        Raises:
            RecipeError: no such recipe, not TOML, an unknown key, a value of the wrong type or out of range.
        """
        path = Path(name) if str(name).endswith(".toml") else HERE / f"{name}.toml"
        if not path.is_file():
            raise RecipeError("`recipe`", f"no {str(name)!r}", do=did_you_mean(str(name), recipe_names()))
        raw = read_toml(path)
        for setting in settings:
            apply_setting(raw, setting)
        return checked(cls, raw, path)

    def with_settings(self, *settings: str) -> "Recipe":
        """This recipe with settings on top, checked again."""
        raw = self.as_dict()
        for setting in settings:
            apply_setting(raw, setting)
        return checked(Recipe, raw, self.name)

    def as_dict(self) -> dict:
        return self.model_dump(mode="json", exclude_none=True)


def _bears_mixup(objective: ObjectiveSettings) -> bool:
    of = objective.options.get("of")
    return {"cosine": of in (None, "image", "text"), "soft_targets": of in (None, "pairs")}.get(
        objective.name, False
    )


def recipe_names() -> list[str]:
    return sorted(p.stem for p in HERE.glob("*.toml"))


def describe(recipe: Recipe, name: str) -> str:
    """A recipe for somebody who has to choose: what it is for, when to pick it, and what it gained and cost
    in our tables (`recipes/figures.json`, which `ray_jobs/compare.py --figures` makes from a suite's
    result)."""
    lines = [f"{name}: {recipe.about}"]
    if recipe.when:
        lines.append(f"Pick it: {recipe.when}")
    for f in _measured(recipe.name):
        kept = f", retention {f['retention']:.3f}" if f["retention"] is not None else ""
        against = "; ".join(f"{_points(d)} against {d['than']}" for d in f["differences"])
        lines.append(
            f"Measured ({f['suite']}, {f['group']}, {f['seeds']} seeds): mean R@1 "
            f"{f['mean_r@1'] * 100:.1f}{kept}; {against}; {f['seconds']:.0f} s to train"
        )
    return "\n".join(lines)


def against_plain_fine_tuning(name: str) -> str:
    """Whether a recipe beats plain fine-tuning of the same student at the same budget, by our tables: on
    photos where there are any, else on the demo's scenes. Empty where it wasn't held against it, or is it."""
    measured = sorted(_measured(name), key=lambda f: f["suite"] == "demo") if name not in PLAIN else []
    for f in measured:
        rivals = {d["than"]: d for d in f["differences"] if d["than"] in PLAIN}
        rival = next((rivals[name] for name in PLAIN if name in rivals), None)
        if rival is None:
            continue
        low, high = rival["ci"]
        standing = "ahead of" if low > 0 else "behind" if high < 0 else "no gain over"
        return f"{standing} {rival['than']}: {_points(rival)} ({f['suite']})"
    return ""


PLAIN = ("sft+wise_ft", "sft")  # of the two the stronger one first


def _measured(name: str) -> list[dict[str, Any]]:
    figures = json.loads((HERE / "figures.json").read_text()) if (HERE / "figures.json").is_file() else []
    return [f for f in figures if f["recipe"] == name]


def _points(difference: dict[str, Any]) -> str:
    low, high = difference["ci"]
    return f"{difference['difference'] * 100:+.1f} [{low * 100:+.1f}, {high * 100:+.1f}]"
