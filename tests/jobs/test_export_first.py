"""What can't be exported is said before the first minute of work."""

from dataclasses import replace

import pytest
from conftest import write_base

from dclip_qdrant.errors import ParityError, UsageError
from dclip_qdrant.jobs import distill as module
from dclip_qdrant.jobs.experiment import Experiment
from dclip_qdrant.jobs.request import Request
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.training.models import trial, two_tower


def test_a_base_that_can_not_be_exported_stops_before_the_cluster(
    tiny_base, pairs_folder, tmp_path, monkeypatch
):
    def refuse(*_, **__):
        raise ParityError("export", "tokens differ")

    def too_late():
        raise AssertionError("the cluster was started first")

    monkeypatch.setattr(module, "export", refuse)
    monkeypatch.setattr(module.cluster, "connect", too_late)
    request = Request(str(pairs_folder), str(tiny_base), str(tmp_path / "out"), Recipe.load("sft"))
    with pytest.raises(ParityError):
        module.distill(request)
    Experiment.open(request)  # and what was begun can be gone on with


def test_a_tower_too_large_for_a_student_may_only_teach(tiny_base, pairs_folder, tmp_path, monkeypatch):
    model = two_tower.load(str(tiny_base))
    trial.check_size(model)
    text = 4 * sum(p.numel() for n, p in model.model.named_parameters() if not n.startswith("visual."))
    monkeypatch.setattr(trial, "ONNX_BYTES", text)
    with pytest.raises(UsageError, match="its text tower has .* GiB of weights.*let it teach"):
        trial.check_size(model)
    request = Request(str(pairs_folder), str(tiny_base), str(tmp_path / "out"), Recipe.load("sft"))
    with pytest.raises(UsageError, match="less than 2 GiB in a student"):
        Experiment.open(request)


def test_a_model_joined_with_itself_is_no_teacher(tiny_base, pairs_folder, tmp_path):
    joint = Recipe.load("joint")
    request = Request(str(pairs_folder), str(tiny_base), str(tmp_path / "out"), joint)
    with pytest.raises(UsageError, match=r"both are .*`teacher_recipe`, which fine-tunes this one first"):
        Experiment.open(request)
    Experiment.open(replace(request, teach=Recipe.load("projections")))


def test_another_base_in_the_same_folder_is_exported_anew(tiny_base, pairs_folder, tmp_path, monkeypatch):
    exported = []

    def export(model, folder, **_):
        exported.append(model.name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").write_text("{}")

    monkeypatch.setattr(module, "export", export)
    other = str(write_base(new_folder(tmp_path / "other"), 3))
    for base in (str(tiny_base), str(tiny_base), other):
        request = Request(str(pairs_folder), base, str(tmp_path / "out"), Recipe.load("sft"))
        module._export_base(Experiment.open(request))
    assert exported == [str(tiny_base), other]


def new_folder(path):
    path.mkdir()
    return path
