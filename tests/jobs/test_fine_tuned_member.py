"""The student after plain fine-tuning, as one of a joint target's teachers."""

import json

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from model_folders import LIGHT, model_folder

from dclip_qdrant.errors import RecipeError
from dclip_qdrant.jobs import preparation as module
from dclip_qdrant.jobs.comparison import same_budget
from dclip_qdrant.jobs.experiment import Experiment
from dclip_qdrant.jobs.features import Featurise
from dclip_qdrant.jobs.named_runs import Prepared, student_run
from dclip_qdrant.jobs.preparation import prepare
from dclip_qdrant.jobs.request import Request
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.training.distributed import Comm
from dclip_qdrant.training.models import two_tower
from dclip_qdrant.training.worker import Worker


def test_it_is_the_rivals_run_of_the_first_seed_as_a_model(tiny_base, pairs_folder, tmp_path, monkeypatch):
    light = model_folder(tmp_path / "light", LIGHT, 5)
    settings = ["train.epochs=1", "train.batch_size=8", "student.last_n=2", "keep.wise_ft=[0.5]"]
    joint = Recipe.load("joint", [f"student.model={json.dumps(light)}", *settings])
    request = Request(
        str(pairs_folder), str(tiny_base), str(tmp_path / "out"), joint, seeds=(3, 4), reader="memory"
    )
    experiment = Experiment.open(request)
    done = []

    def features_in_this_process(request, **_):
        request.stage.path.mkdir(parents=True)
        featurise = Featurise(**request.arguments(), out=str(request.stage.path), threads=1)
        for file in experiment.pairs.files:
            featurise(pq.read_table(file))
        return request.stage

    def in_this_process(runs, **_):
        worker = Worker(Comm(), "cpu", lambda line: None)
        for run in runs:
            done.append(run)
            worker.do(run)

    monkeypatch.setattr(module, "extract_features", features_in_this_process)
    monkeypatch.setattr(module.train_runs, "run_in_order", in_this_process)
    prepared = prepare(experiment, joint)
    folder = prepared.fine_tuned
    assert folder is not None
    (run,) = done
    # the student's own features come from the same folder, and its weights are averaged in
    own = student_run(experiment, joint, 3, prepared)
    assert (own.fine_tuned, len(own.others)) == (folder, 2)
    assert own.inputs["recipe"]["keep"]["fine_tuned"] == [0.0, 0.5]
    assert "fine_tuned" not in run.inputs["recipe"]["keep"]
    assert run.fine_tuned is None
    rival = same_budget(Recipe.load("sft"), joint)
    # what `compare` with sft asks for: that row's run is done then
    assert run.stage.path == student_run(experiment, rival, 3, Prepared(prepared.features)).stage.path
    assert (run.seed, run.recipe["train"]["epochs"]) == (3, 1)
    member = two_tower.load(folder).weights()
    trained = safetensors.torch.load((run.stage.path / "weights.safetensors").read_bytes())
    start = two_tower.load(light).weights()
    assert all(torch.equal(member[name], trained[name]) for name in trained)
    assert not torch.equal(member["visual.head.proj.weight"], start["visual.head.proj.weight"])
    assert torch.equal(member["visual.trunk.conv_stem.weight"], start["visual.trunk.conv_stem.weight"])


def test_a_joint_target_needs_the_students_start_among_its_teachers():
    with pytest.raises(RecipeError, match='needs "student" in ensemble.models'):
        Recipe.load("joint", ['ensemble.models=["fine_tuned"]'])
