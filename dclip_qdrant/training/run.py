"""What is asked of a worker: the figures of a model as it is, a teacher, or a student."""

from dataclasses import asdict, dataclass
from typing import Any

from dclip_qdrant.recipe import Recipe
from dclip_qdrant.tables.stages import Stage
from dclip_qdrant.training.data import REGION_COLUMNS, TEXT_COLUMNS
from dclip_qdrant.training.student_task import reads_regions


@dataclass(frozen=True)
class Run:
    """Plain values alone: it travels to workers as it is."""

    kind: str  # base | teacher_model | teacher | student
    root: str  # where the stage folder goes
    inputs: dict[str, Any]  # what names it
    recipe: dict[str, Any]
    seed: int
    base: str  # the teacher's model
    student: str
    pairs: str
    features: str
    teacher: str | None = None  # teacher cache
    others: tuple[str, ...] = ()  # features of the recipe's further teachers, or "base"
    fine_tuned: str | None = None  # folder of the student after plain fine-tuning, where it is averaged in
    # the model that retention is measured against; None: the student as it starts
    reference: str | None = None
    pictures: str | None = None  # pairs without captions
    picture_features: str | None = None  # of them
    labelled: str | None = None
    min_retention: float = 1.0
    split: str = "test"
    tracker: str | None = None  # a service that metrics go to (training/trackers)
    streams: bool = False  # reads its batches as a stream instead of holding the split in memory

    @property
    def stage(self) -> Stage:
        return Stage(self.root, self.kind, self.inputs)

    @property
    def label(self) -> str:
        if self.kind in ("base", "teacher_model"):
            return self.kind.replace("_", "'s ")
        return f"{self.kind} {self.recipe['name']} seed {self.seed}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def needs(run: Run) -> tuple[str, ...]:
    """The columns of the features that a run trains from, beside those of its views."""
    if run.kind == "teacher":
        return ("regions", "texts")
    return (*TEXT_COLUMNS, *REGION_COLUMNS) if reads_regions(Recipe(**run.recipe)) else TEXT_COLUMNS
