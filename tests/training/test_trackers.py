"""Metrics: plain JSON lines always, and whatever service is named beside them."""

import json

import pytest
from upath import UPath

from dclip_qdrant.errors import MissingExtra, RecipeError
from dclip_qdrant.training import trackers
from dclip_qdrant.training.trackers import Report

ROWS = [
    {"loss": 2.0, "epoch": 1, "seconds": 0.5},
    {"loss": 1.5, "val_mean_r@1": 0.25, "epoch": 2, "seconds": 0.5},
]


MADE = []


class Keeps:
    def __init__(self, run, folder, settings):
        self.run, self.folder, self.settings, self.said, self.closed = run, folder, settings, [], False
        MADE.append(self)

    def __call__(self, epoch, values):
        self.said.append((epoch, values))

    def close(self):
        self.closed = True


class Fails(Keeps):
    def __call__(self, epoch, values):
        raise ConnectionError("nobody there")


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def report(folder, tracker):
    told = Report("student tiny seed 0", UPath(folder), {"name": "tiny"}, tracker)
    told(ROWS[:1])
    told(ROWS)
    told.close()


def test_each_epoch_is_a_line_and_a_call(tmp_path):
    report(tmp_path, f"{__name__}:Keeps")
    assert lines(tmp_path) == [{"run": "student tiny seed 0", **row} for row in ROWS]
    kept = MADE[-1]
    assert (kept.run, kept.settings, kept.closed) == ("student tiny seed 0", {"name": "tiny"}, True)
    assert kept.said == [
        (1, {"loss": 2.0, "seconds": 0.5}),
        (2, {"loss": 1.5, "val_mean_r@1": 0.25, "seconds": 0.5}),
    ]


def test_a_tracker_that_fails_is_named_once_and_sinks_no_run(tmp_path, caplog):
    report(tmp_path, f"{__name__}:Fails")
    assert len(lines(tmp_path)) == 2
    assert [r.message for r in caplog.records] == [
        "student tiny seed 0: no more metrics to the tracker: nobody there"
    ]


def test_a_tracker_that_cannot_be_made_is_refused_before_any_work():
    with pytest.raises(RecipeError, match=r"no 'tensorbord' here.*did you mean 'tensorboard'"):
        trackers.check("tensorbord")
    trackers.check(None)


def test_tensorboard_reads_what_was_told(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0), (2, 1.5)]


def test_mlflow_keeps_what_was_told(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    report(tmp_path, "mlflow")
    (run,) = mlflow.MlflowClient().search_runs(["0"])
    assert run.info.run_name == "student tiny seed 0"
    assert run.info.status == "FINISHED"
    assert run.data.metrics["val_mean_r_at_1"] == 0.25


def test_wandb_writes_a_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    report(tmp_path, "wandb")
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_an_absent_package_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "dclip_qdrant.training.trackers.wandb", raising=False)
    with pytest.raises(MissingExtra, match="wandb"):
        trackers.check("wandb")
