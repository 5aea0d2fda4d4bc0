"""The one job: runs whatever stage is missing, reuses the rest, and ends with a student folder and a table
that shows what it is worth."""

import logging
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from upath import UPath

from dclip_qdrant.errors import GateError
from dclip_qdrant.jobs import cluster, train_runs
from dclip_qdrant.jobs.comparison import Difference, Row, base_row, differences, markdown_table, recipe_rows
from dclip_qdrant.jobs.conduct import Outcome, conduct, taught
from dclip_qdrant.jobs.experiment import Experiment
from dclip_qdrant.jobs.export import export
from dclip_qdrant.jobs.request import Request
from dclip_qdrant.jobs.verdict import Verdict, judge
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.serving.student import Student
from dclip_qdrant.tables import storage
from dclip_qdrant.tables.student_folder import RUN_FILE
from dclip_qdrant.training.figures import RunFigures
from dclip_qdrant.training.models import two_tower
from dclip_qdrant.training.run import Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Distilled:
    """The table's rows, the differences, and where the student is."""

    rows: list[Row]
    comparisons: list[Difference]
    student: str
    split: str
    runs: dict[str, str]  # label -> stage folder
    teacher: dict[str, Any] | None  # the manifest of its stage
    retention: float | None  # of the exported student
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        """What table.json holds."""
        return {
            "rows": [row.as_dict() for row in self.rows],
            "comparisons": [c.as_dict() for c in self.comparisons],
            "student": self.student,
            "split": self.split,
            "runs": self.runs,
            "teacher": self.teacher,
            "retention": self.retention,
            "verdict": self.verdict.as_dict(),
        }

    def text(self) -> str:
        """The table and the differences, for people."""
        lines = [markdown_table(self.rows), "", *(c.line() for c in self.comparisons)]
        if self.retention is None:
            lines.append("retention was not measured: no labelled pictures were given")
        return "\n".join([*lines, f"student: {self.student}", "", self.verdict.text()])


def distill(request: Request) -> Distilled:
    """Trains, measures and exports; writes `table.json`, `table.md` and the student under `out`.

    Raises:
        UsageError: something in the request can't be meant (said before any work).
    """
    experiment = Experiment.open(request)
    # first: whatever can't be exported is said before the first minute of work, not after the last
    _export_base(experiment)
    cluster.connect()
    experiment = taught(experiment)
    if experiment.split != "test":
        half = "half of val, the other half chooses alpha" if experiment.split == "val" else experiment.split
        logger.warning("no test split: the table is measured on %s", half)

    def in_order(runs: list[Run]) -> dict[str, str]:
        return train_runs.run_in_order(runs, workers=request.workers, storage=experiment.ray_storage())

    outcome = conduct(experiment, in_order)
    experiment.progress.begin("export")
    result = _result(experiment, outcome)
    out = storage.as_path(request.out)
    storage.write_json(out / "table.json", result.as_dict())
    storage.write_text(out / "table.md", markdown_table(result.rows) + "\n")
    return result


def check_retention(result: Distilled, recipe: Recipe, min_retention: float) -> None:
    """Raises GateError: the student keeps less than `min_retention` of the base's zero-shot accuracy."""
    if result.retention is not None and result.retention < min_retention:
        # a cut has no start that is worth going back to
        less = (
            "keep more in student.inherit" if recipe.student.inherit else "add smaller alphas to keep.wise_ft"
        )
        do = f"the student is kept in {result.student}; lower train.lr, or {less}"
        raise GateError("retention", f"{result.retention:.3f}", f"at least {min_retention:.3f}", do)


def check_gain(result: Distilled) -> None:
    """Raises GateError: the student isn't shown to be better than the base, or plain fine-tuning is."""
    verdict = result.verdict
    if verdict.is_success:
        return
    came = f"{verdict.against_base} than the base" if verdict.against_base == "worse" else "can't tell"
    if verdict.against_base == "better":
        came = "worse than plain fine-tuning"
    do = f"the student is kept in {result.student}; {verdict.next}"
    raise GateError("verdict", came, "better", do)


def _result(experiment: Experiment, outcome: Outcome) -> Distilled:
    main = experiment.request.recipe
    untrained = [run for run in (outcome.teacher_model, outcome.base) if run is not None]
    rows = [base_row(run) for run in untrained]
    for recipe in experiment.recipes:
        rows += recipe_rows(recipe, outcome.runs[recipe.name], both=recipe is not main)
    chosen = outcome.runs[main.name][0]
    student = _export(experiment, chosen, rows)
    every_run = [run for runs in outcome.runs.values() for run in runs]
    teacher = outcome.prepared.teacher
    comparisons = differences(main, outcome.runs, list(experiment.recipes), outcome.base)
    verdict = judge(main.name, comparisons, split=experiment.split)
    return Distilled(
        rows=rows,
        comparisons=comparisons,
        student=str(student),
        split=experiment.split,
        runs={run.label: str(run.stage.path) for run in every_run},
        teacher=teacher.manifest() if teacher else None,
        retention=RunFigures.of_stage(chosen.stage).chosen.retention,
        verdict=verdict,
    )


def _export_base(experiment: Experiment) -> None:
    """The model that the student starts from in the same form as the student (for before-and-after, and for
    retention on other pictures).

    Raises:
        ParityError, StudentError: towers or a tokenizer that can't be exported; the student's are the same.
    """
    request = experiment.request
    folder = storage.as_path(request.out) / "base"
    start = experiment.whole_student if experiment.reference else experiment.student
    mark = folder / RUN_FILE
    if mark.exists() and mark.read_text() == start.fingerprint and not request.from_scratch:
        return
    # what marks `out` as ours, so that a run that is killed from here on is gone on with
    storage.as_path(request.stages).mkdir(parents=True, exist_ok=True)
    card = "The model that the student started from, unchanged.\n"
    export(start, folder, name="base", metrics={}, recipe={"name": "base"}, card=card)
    storage.write_text(mark, start.fingerprint)


def _export(experiment: Experiment, chosen: Run, rows: list[Row]) -> UPath:
    """The student folder."""
    request = experiment.request
    out = storage.as_path(request.out)
    base_folder, student_folder = out / "base", out / "student"
    mark = student_folder / RUN_FILE
    if mark.exists() and mark.read_text() == chosen.stage.path.name and not request.from_scratch:
        logger.info("export: reused")
        return student_folder
    model = two_tower.load(experiment.student_name)
    weights = (chosen.stage.path / "weights.safetensors").read_bytes()
    model.load_weights(safetensors.torch.load(weights))
    base = {"folder": "../base", "fingerprint": Student.load(base_folder).fingerprint}
    export(
        model,
        student_folder,
        name=request.name or request.recipe.name,
        metrics=RunFigures.of_stage(chosen.stage).as_dict() | {"base_student": base},
        recipe=chosen.recipe,
        card=_figures_of_card(experiment, rows, chosen),
    )
    storage.write_text(mark, chosen.stage.path.name)
    logger.info("export: %s, agrees with torch", Student.load(student_folder).model_name)
    return student_folder


def _figures_of_card(experiment: Experiment, rows: list[Row], chosen: Run) -> str:
    """The card's table, with how many pictures it was measured on and how sure it is."""
    figures = RunFigures.of_stage(chosen.stage)
    test = figures.chosen.test
    lines = [
        f"On {test['n_images']:,} pictures with {test['n_texts']:,} captions of the {experiment.split} split."
    ]
    intervals = test.get("ci", {})
    for way, name in (("t2i", "text to image"), ("i2t", "image to text")):
        if way in intervals:
            low, high = intervals[way]["r@1"]
            recall = test[way]["r@1"]
            lines.append(f"R@1 {name} {recall * 100:.1f}, 95% [{low * 100:.1f}, {high * 100:.1f}].")
    if figures.chosen.retention is not None and figures.chosen.retention_ci:
        low, high = figures.chosen.retention_ci
        lines.append(
            f"Retention {figures.chosen.retention:.3f}, 95% [{low:.3f}, {high:.3f}], on {figures.n_labelled} "
            "labelled pictures that chose nothing."
        )
    return f"## Figures\n\n{markdown_table(rows)}\n\n{' '.join(lines)}\n\n"
