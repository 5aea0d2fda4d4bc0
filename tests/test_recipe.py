"""Recipes: every file loads, wrong keys and values get one clear line, settings reach everywhere."""

import json

import pytest

from dclip_qdrant.errors import RecipeError
from dclip_qdrant.recipe import HERE, Recipe, recipe_names
from dclip_qdrant.training.objectives import build


def test_there_are_recipes():
    assert {"dclip", "dclip_as_released", "sft", "tiny", "demo"} <= set(recipe_names())
    assert len(recipe_names()) == len(list(HERE.glob("*.toml")))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_says_what_it_is_for_and_builds_its_parts(name):
    recipe = Recipe.load(name)
    assert len(recipe.about) > 20
    for o in (*recipe.objectives, *recipe.index.objectives):
        build(o.name, student_dim=512, teacher_dim=512, **o.options)
    assert Recipe(**recipe.as_dict()) == recipe


def test_the_default_teacher_cannot_copy_its_caption():
    t = Recipe.load("dclip").teacher
    assert (t.caption, t.mask_padding, t.normalise_crops, t.include_global) == ("other", True, True, True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "name = 'x'\nobjectives = [{name = 'info_nce'}]\n[train]\nepoch = 3",
            r"unknown key 'train.epoch' -> did you mean 'epochs'",
        ),
        ("name = 'x'\nobjectives = [{name = 'info_nce'}]\n[student]\ntrian = 'full'", "did you mean 'train'"),
        (
            "name = 'x'\nobjectives = [{name = 'info_nce'}]\n[student]\ntrain = 'all'",
            "student.train = \"all\"; expected input should be 'frozen'",
        ),
        (
            "name = 'x'\nobjectives = [{name = 'info_nce'}]\n[train]\nlr = -1",
            "train.lr = -1; expected input should be greater than 0",
        ),
        ("name = 'x'\nobjectives = []", "objectives"),
        ("objectives = [{name = 'info_nce'}]", "no 'name'"),
        ("name = ", "not TOML"),
    ],
)
def test_wrong_recipes_get_one_clear_line(text, says, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=says) as e:
        Recipe.load(file)
    assert "\n" not in str(e.value)
    assert str(file) in str(e.value)
    assert e.value.kind == "usage"


def test_unknown_recipe_is_named():
    with pytest.raises(RecipeError, match="did you mean 'dclip'"):
        Recipe.load("dclpi")


def test_settings():
    r = Recipe.load(
        "dclip",
        [
            "train.lr=1e-4",
            "student.text=full",
            "objectives.1.weight=7",
            'regions.options.weights="/x y.pt"',
            "keep.wise_ft=[0.5, 1.0]",
        ],
    )
    assert (
        r.train.lr,
        r.student.text,
        r.objectives[1].weight,
        r.regions.options["weights"],
        r.keep.wise_ft,
    ) == (
        1e-4,
        "full",
        7.0,
        "/x y.pt",
        (0.5, 1.0),
    )
    assert r.with_settings("train.epochs=2").train.epochs == 2
    for setting, says in (
        ("train.lr", "key=value"),
        ("train.nope=1", "unknown key"),
        ("objectives.9.weight=1", "to reach into"),
        ("name.x=1", "to reach into"),
    ):
        with pytest.raises(RecipeError, match=says):
            Recipe.load("dclip", [setting])


def test_rivals_get_the_same_trainable_set_and_budget():
    from dclip_qdrant.jobs.comparison import same_budget

    main = Recipe.load("demo")
    rival = same_budget(Recipe.load("sft"), main)
    assert rival.student == main.student
    assert rival.objectives == Recipe.load("sft").objectives
    # every crop is a forward pass too: 7 epochs with half as many crops beside the pictures are 10.5 epochs
    # without; the rival gets the larger half
    main = main.model_copy(update={"train": main.train.model_copy(update={"epochs": 7, "region_share": 0.5})})
    rival = same_budget(Recipe.load("sft"), main)
    assert (rival.train.epochs, rival.train.region_share) == (11, 0.0)
    assert rival.train.model_copy(update={"epochs": 0, "region_share": 0}) == main.train.model_copy(
        update={"epochs": 0, "region_share": 0}
    )


def test_rivals_turn_hubs_down_where_the_main_recipe_does_and_start_in_their_own_way():
    from dclip_qdrant.jobs.comparison import same_budget

    joint, sft = Recipe.load("joint", ['student.start="fitted"', "train.batch_size=64"]), Recipe.load("sft")
    rival = same_budget(sft, joint)
    assert rival.hubness == joint.hubness
    assert (rival.student.start, rival.ensemble.joint, rival.train.mixup) == ("as_is", False, 0.0)
    assert (rival.student.last_n, rival.student.text) == (joint.student.last_n, "full")
    assert (rival.train.views, rival.train.flip) == (joint.train.views, True)
    # WiSE-FT with all its alphas: between the base and a fitted start it says nothing
    assert rival.keep == sft.keep
    keep = Recipe.load("joint").keep
    assert same_budget(sft, Recipe.load("joint")).keep.wise_ft == keep.wise_ft
    # to average with the plainly fine-tuned student is a way to distil: its weights are already the rival's
    assert keep.averages
    assert not same_budget(sft, Recipe.load("joint")).keep.averages
    # InfoNCE in batches of 64 would be a rival made weak
    assert (rival.train.batch_size, rival.train.epochs) == (sft.train.batch_size, joint.train.epochs)
    hubs = Recipe.load("sft", ["hubness.strengths=[5.0]"])
    assert same_budget(hubs, sft).hubness == hubs.hubness


def test_averaging_needs_the_fine_tuned_student():
    with pytest.raises(RecipeError, match='keep.fine_tuned needs "fine_tuned" in ensemble.models'):
        Recipe.load("sft", ["keep.fine_tuned=[0.5]"])
    recipe = Recipe.load("joint", ["keep.wise_ft=[0.5, 1.0]", "hubness.strengths=[0, 5, 20]"])
    assert recipe.sweep_points == 2 * 2 * 3


def test_a_recipe_says_whether_it_beat_plain_fine_tuning(tmp_path, monkeypatch):
    from dclip_qdrant import recipe

    def row(name, suite, than, difference, low, high):
        differences = [
            {"than": "base", "difference": 0.5, "ci": [0.4, 0.6]},
            {"than": than, "difference": difference, "ci": [low, high]},
        ]
        return {"recipe": name, "suite": suite, "differences": differences}

    rows = [
        row("a", "demo", "sft+wise_ft", -0.02, -0.03, -0.01),
        row("a", "photos", "sft+wise_ft", 0.021, 0.01, 0.032),
        row("b", "photos", "sft", 0.001, -0.01, 0.012),
        row("c", "photos", "sft+wise_ft", -0.01, -0.02, -0.001),
    ]
    (tmp_path / "figures.json").write_text(json.dumps(rows))
    monkeypatch.setattr(recipe, "HERE", tmp_path)
    says = recipe.against_plain_fine_tuning
    assert says("a") == "ahead of sft+wise_ft: +2.1 [+1.0, +3.2] (photos)"
    assert says("b") == "no gain over sft: +0.1 [-1.0, +1.2] (photos)"
    assert says("c") == "behind sft+wise_ft: -1.0 [-2.0, -0.1] (photos)"
    assert says("never") == ""


def test_a_model_folder_is_made_absolute_and_a_models_name_is_left_alone(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="the train extra is not installed")
    from dclip_qdrant.jobs import cluster

    (tmp_path / "models" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert cluster.absolute_model("models/base", "base") == str(tmp_path / "models" / "base")
    assert cluster.absolute_model("./gone", "base") == str(tmp_path / "gone")
    assert cluster.absolute_model("ViT-B-32/openai", "base") == "ViT-B-32/openai"
