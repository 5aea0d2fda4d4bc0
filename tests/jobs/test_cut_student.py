"""A student that is cut from --student's model, beside a teacher that is another one."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from model_folders import LIGHT, model_folder

from dclip_qdrant.jobs import distill
from dclip_qdrant.jobs.experiment import Experiment
from dclip_qdrant.jobs.features import Featurise
from dclip_qdrant.jobs.request import Request
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.recipe import InheritSettings, Recipe
from dclip_qdrant.training.models import inherit, two_tower


@pytest.mark.parametrize("asked_first", ["trunks_at_rest", "shape", "facts"])
def test_the_cut_is_there_for_whoever_asks_first(asked_first, tiny_base, pairs_folder, tmp_path):
    model = model_folder(tmp_path / "light", LIGHT, 5)
    inherit = "student.inherit={vocabulary=1000}"
    recipe = Recipe.load("light", [f"student.model={json.dumps(model)}", inherit, "student.last_n=2"])
    request = Request(str(pairs_folder), str(tiny_base), str(tmp_path / "out"), recipe, reader="memory")
    experiment = Experiment.open(request)
    asked = getattr(experiment, asked_first)
    if callable(asked):
        asked()
    cut = two_tower.load(experiment.student_name)
    assert cut.config["text_cfg"]["vocab_size"] == 1000


def test_a_cut_of_the_text_tower_shares_one_pass_over_the_pictures(pairs_folder, tmp_path):
    model = model_folder(tmp_path / "light", LIGHT, 5)
    inherit.write(two_tower.load(model), str(tmp_path / "cut"), InheritSettings(vocabulary=1000))
    other = model_folder(tmp_path / "other", LIGHT, 6)
    pictures = pq.read_table(Pairs.open(str(pairs_folder)).files[0]).slice(0, 4)

    def trunks(student: str) -> tuple[bool, list[list[float]]]:
        recipe = Recipe.load("joint").model_copy(update={"teacher": None})
        arguments = {"recipe": recipe.as_dict(), "regions": None, "seed": 0, "pictures": False, "threads": 1}
        out = tmp_path / f"of-{Path(student).name}"
        out.mkdir()
        featurise = Featurise(model, student, True, False, out=str(out), **arguments)
        featurise(pictures)
        (part,) = out.glob("*.parquet")
        return featurise.one_trunk, pq.read_table(part)["trunk"].to_pylist()

    (one, own), (shared, cut), (another, different) = map(trunks, (model, str(tmp_path / "cut"), other))
    assert (one, shared, another) == (True, True, False)
    assert cut == own
    assert different != own


def test_what_a_cut_is_held_against_is_the_whole_model_not_the_teacher(
    tiny_base, pairs_folder, tmp_path, monkeypatch
):
    model = model_folder(tmp_path / "light", LIGHT, 5)
    cut = "student.inherit={vocabulary=1000}"
    recipe = Recipe.load("light", [f"student.model={json.dumps(model)}", cut, "student.last_n=2"])
    out = tmp_path / "out"
    request = Request(str(pairs_folder), str(tiny_base), str(out), recipe, reader="memory")
    exported = []

    def export(model, folder, **_):
        exported.append(model.fingerprint)
        folder.mkdir(parents=True)

    monkeypatch.setattr(distill, "export", export)
    distill._export_base(Experiment.open(request))
    assert exported == [two_tower.load(model).fingerprint]
