"""A run of the `joint` recipe from cached features to chosen weights, in this process."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from model_folders import LIGHT, model_folder
from upath import UPath

from dclip_qdrant import metrics
from dclip_qdrant.jobs.features import Featurise
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.training import joint_target
from dclip_qdrant.training.data import TEXT_COLUMNS, Pictures, load_cache
from dclip_qdrant.training.distributed import Comm
from dclip_qdrant.training.models import two_tower
from dclip_qdrant.training.models.bottom import Bottom
from dclip_qdrant.training.run import Run
from dclip_qdrant.training.worker import Worker

SETTINGS = (
    "train.epochs=2",
    "train.batch_size=8",
    "train.views=2",
    "student.last_n=2",
    'student.start="fitted"',
    'ensemble.models=["student"]',
    "ensemble.weights=[0.35, 0.5, 0.7, 1.0, 1.4]",
    "keep.wise_ft=[0.5, 1.0]",
    "keep.fine_tuned=[0.0]",
    "hubness.strengths=[0.0]",
)


@pytest.fixture(scope="module")
def run(tiny_base, pairs_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint")
    light = model_folder(folder / "light", LIGHT, 5)
    recipe = Recipe.load("joint", SETTINGS)
    features = {}
    for name, base, student in (("teacher", str(tiny_base), None), ("student", light, light)):
        features[name] = folder / name
        features[name].mkdir()
        actor = Featurise(
            base=base,
            student=student,
            student_image=student is not None,
            student_text=student is not None,
            recipe=recipe.as_dict(),
            regions=None,
            seed=0,
            pictures=False,
            out=str(features[name]),
            threads=1,
        )
        for file in Pairs.open(str(pairs_folder)).files:
            actor(pq.read_table(file))
    return Run(
        kind="student",
        root=str(folder),
        inputs={},
        recipe=recipe.as_dict(),
        seed=0,
        base=str(tiny_base),
        student=light,
        pairs=str(pairs_folder),
        features=str(features["teacher"]),
        others=(str(features["student"]),),
    )


@pytest.fixture(scope="module")
def finished(run):
    lines = []
    worker = Worker(Comm(), "cpu", lines.append)
    worker.do(run)
    worker.close()
    return lines


def test_the_student_follows_one_target_of_teacher_and_start(run, finished):
    log = "\n".join(finished)
    assert "further teachers' weight" in log
    assert "image projection fitted" in log
    assert "text projection fitted" in log
    history = json.loads((run.stage.path / "manifest.json").read_text())["metrics"]["history"]
    assert {"soft_targets", "cosine.image", "cosine.text"} <= set(history[0])
    assert history[1]["loss"] < history[0]["loss"]


def test_only_what_lies_above_the_resting_part_has_changed(run, finished):
    start = two_tower.load(run.student).weights()
    end = safetensors.torch.load((run.stage.path / "weights.safetensors").read_bytes())
    changed = {k for k, v in end.items() if not torch.equal(v.float(), start[k].float())}
    assert "visual.trunk.conv_head.weight" in changed
    assert "visual.head.proj.weight" in changed
    assert "token_embedding.weight" in changed
    assert not any(k.startswith(("visual.trunk.conv_stem", "visual.trunk.blocks.3")) for k in changed)


def test_the_target_is_the_mean_of_the_teachers_cosines(run, finished):
    """Nothing is lost where the student's width (24) can hold it but for the weakest directions of 56."""
    pairs = Pairs.open(run.pairs)
    pictures = Pictures(pairs, "train")
    counts = [len(c) for c in pairs.table(["captions"], ("train",))["captions"].to_pylist()]
    cache, other = (
        load_cache(pictures.keys, counts, UPath(path), need=TEXT_COLUMNS)
        for path in (run.features, run.others[0])
    )
    np.testing.assert_array_equal(cache.crop, other.crop)  # both saw the same views
    np.testing.assert_array_equal(cache.flip, other.flip)
    cache.others = (other,)
    worker = Worker(Comm(), "cpu", lambda line: None)
    joint = worker._with_joint_target(run, Recipe(**run.recipe), cache, 24, lambda line: None)
    assert joint.teacher.shape == (len(pictures), 2, 1, 24)
    assert joint.texts.shape == (sum(counts), 24)
    assert joint.others == ()
    weight = worker._joint_weight(run, Recipe(**run.recipe), lambda line: None)
    cosines = [
        np.einsum("nd,td->nt", *(x / np.linalg.norm(x, axis=-1, keepdims=True) for x in pair))
        for pair in ((c.image[:, 1].astype(float), c.texts.astype(float)) for c in (cache, other))
    ]
    want = (cosines[0] + weight**2 * cosines[1]) / (1 + weight**2)
    got = joint.teacher[:, 1, 0].astype(float) @ joint.texts.astype(float).T
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.98


def averaging(run: Run, folder: Path, name: str, *settings: str) -> Run:
    """A run of one epoch beside a plainly fine-tuned student of other weights."""
    own = ('ensemble.models=["student", "fine_tuned"]', "train.epochs=1", *settings)
    return replace(
        run,
        recipe=Recipe.load("joint", (*SETTINGS, *own)).as_dict(),
        inputs={name: True},
        others=(*run.others, *run.others),
        fine_tuned=model_folder(folder / "fine-tuned", LIGHT, 8),
    )


def test_the_sweep_measures_the_weights_that_would_be_written(run, labelled_folder, tmp_path):
    """Strengths against hubs are tried on vectors; folded into the weights they give the same figures."""
    settings = ("keep.fine_tuned=[0.0, 0.5]", "hubness.strengths=[0.0, 20.0]")
    swept = replace(averaging(run, tmp_path, "swept", *settings), labelled=str(labelled_folder))
    worker = Worker(Comm(), "cpu", lambda line: None)
    trained = worker._train_student(swept, lambda line: None)
    points = worker._sweep(swept, trained)
    assert [(p.fine_tuned, p.alpha, p.hubness) for p in points] == [
        (share, alpha, strength) for share in (0.0, 0.5) for alpha in (0.5, 1.0) for strength in (0.0, 20.0)
    ]
    assert points[2].val != points[3].val  # the strength did something
    assert points[2].val != points[6].val  # and so did the share
    kept = worker.measures.kept_of_base(swept, trained)
    labelled, base = kept.labelled, kept.right_of_base[kept.labelled.choosing]
    for point in points:
        trained.place(point, worker.measures.telling_hubs(swept, trained))
        figures = metrics.retrieval(trained.val.ranks(trained.model), bootstrap=0)
        assert point.val == pytest.approx(metrics.mean_recall(figures), abs=1e-6)
        assert point.val_mean_r1 == pytest.approx(figures["mean_r@1"], abs=1e-6)
        right = labelled.right(trained.model)[labelled.choosing]
        assert point.zero_shot == pytest.approx(right.mean())
        assert point.retention == pytest.approx(right.mean() / max(base.mean(), 1e-9))


def test_weights_are_averaged_with_the_fine_tuned_ones_before_wise_ft(run, tmp_path):
    averaged = averaging(run, tmp_path, "averaged", "keep.fine_tuned=[0.25]")
    trained = Worker(Comm(), "cpu", lambda line: None)._train_student(averaged, lambda line: None)
    trained.mix(0.6, 0.25)
    name = "visual.head.proj.weight"
    start, end, other = (
        w[name] for w in (trained.start, trained.end, two_tower.load(averaged.fine_tuned).weights())
    )
    want = 0.4 * start + 0.6 * (0.75 * end + 0.25 * other)
    torch.testing.assert_close(trained.model.weights()[name], want)


def test_pictures_are_seen_by_the_resting_part_once(run, monkeypatch):
    """Over epochs in training, and over alphas in the sweep."""
    seen = []
    of_pixels = Bottom.of_pixels
    monkeypatch.setattr(
        Bottom,
        "of_pixels",
        lambda self, pixels, device: seen.append(len(pixels)) or of_pixels(self, pixels, device),
    )
    recipe = Recipe.load("joint", (*SETTINGS, "train.epochs=6"))
    again = replace(run, recipe=recipe.as_dict(), inputs={"seen": True})
    worker = Worker(Comm(), "cpu", lambda line: None)
    trained = worker._train_student(again, lambda line: None)
    splits = Pairs.open(run.pairs).splits()
    assert sum(seen) <= splits["train"] * 2  # two views a picture, six epochs
    seen.clear()
    worker._sweep(again, trained)
    assert sum(seen) == splits["val"]
    seen.clear()
    before = trained.history
    other = replace(again, seed=1, inputs={"seen": "another seed"})
    trained = worker._train_student(other, lambda line: None)
    assert sum(seen) < splits["train"]  # the first seed's pictures are still there
    assert trained.history[0]["loss"] != before[0]["loss"]


def test_the_weight_is_chosen_for_all_teachers_that_are_joined(run, monkeypatch):
    """`base`, the teaching model as it was, is a member of its own, though it has no features of its own."""
    members = []
    choose = joint_target.choose_weight
    monkeypatch.setattr(joint_target, "choose_weight", lambda *args: members.append(args[0]) or choose(*args))
    recipe = Recipe.load("joint", (*SETTINGS, 'ensemble.models=["base", "student"]'))
    of_three = replace(run, recipe=recipe.as_dict(), others=("base", *run.others))
    Worker(Comm(), "cpu", lambda line: None)._joint_weight(of_three, recipe, lambda line: None)
    teacher, base, student = members[0]
    np.testing.assert_array_equal(base.image, teacher.image)
    assert student.image.shape[-1] == 24
