"""Comparisons: suites are read whole, budgets are equal, the report says what is noise. The job itself is in
test_jobs.py."""

import json

import pytest

from dclip_qdrant.errors import RecipeError
from dclip_qdrant.jobs import comparison
from dclip_qdrant.jobs.compare import GroupResult, StudentSize, SuiteResult
from dclip_qdrant.jobs.comparison import Difference, Row, same_budget
from dclip_qdrant.jobs.suite import Suite, suite_names
from dclip_qdrant.jobs.suite_report import section, write_report
from dclip_qdrant.recipe import Recipe, recipe_names
from dclip_qdrant.training.figures import Figures, SweepPoint


@pytest.mark.parametrize("name", suite_names())
def test_every_suite_names_recipes_that_are_there(name):
    suite = Suite.load(name)
    for group in suite.groups:
        main = Recipe.load(group.main, group.set)
        for recipe in group.recipes:
            rival = same_budget(Recipe.load(recipe), main)
            assert (rival.student, rival.keep) == (main.student, main.keep)
            passes = lambda r: r.train.epochs * (1 + r.train.region_share)
            assert passes(main) <= passes(rival) + 1e-9 < passes(main) + 1 + rival.train.region_share
    assert name == suite.name


# suites have one base; the others need a larger model, or are made to try things out
IN_NO_SUITE = {"tiny", "demo", "dclip_index", "projections", "pictures", "soft", "joint", "light"}


def test_suites_cover_every_recipe_of_the_papers_and_rivals():
    named = {
        r
        for n in ("flickr8k", "flickr30k", "coco")
        for g in Suite.load(n).groups
        for r in (g.main, *g.recipes)
    }
    assert named >= set(recipe_names()) - IN_NO_SUITE


def test_a_wrong_suite_is_one_line(tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'flickr8k'"):
        Suite.load("flickr8")
    (tmp_path / "x.toml").write_text(
        'name = "x"\n[[groups]]\ntitle = "t"\nmain = "sft"\nrecipe = ["dclip"]\n'
    )
    with pytest.raises(RecipeError, match="unknown key 'groups.0.recipe' -> did you mean 'recipes'"):
        Suite.load(str(tmp_path / "x.toml"))


def test_a_part_of_a_suite():
    suite = Suite.load("flickr8k")
    part = suite.only(("Image side only",), ("sft", "clip_kd"))
    assert [(g.main, g.recipes) for g in part.groups] == [("dclip", ("sft", "clip_kd"))]
    assert suite.only((), ()) == suite
    with pytest.raises(RecipeError, match="`recipes`: no 'sfT'.*did you mean 'sft'"):
        suite.only((), ("sfT",))
    with pytest.raises(RecipeError, match="`groups`: no 'Image side'"):
        suite.only(("Image side",), ())


def test_phases_scale_with_the_budget():
    rival = same_budget(Recipe.load("conaclip"), Recipe.load("sft", ["train.epochs=8"]))
    assert [(p.towers, p.epochs) for p in rival.train.phases] == [("image", 2), ("text", 4), ("both", 2)]
    assert rival.train.epochs == 8


@pytest.mark.parametrize(
    ("ci", "wanted"),
    [
        ([0.1, 0.4], "better"),
        ([-0.4, -0.1], "worse"),
        ([-0.1, 0.4], "inside the noise"),
        ([0.0, 0.4], "inside the noise"),
    ],
)
def test_verdict(ci, wanted):
    assert Difference("a", "b", sum(ci) / 2, ci).verdict == wanted


def result(failures=(), mean_r1=0.12):
    recalls = {f"r@{k}": 0.1 * k for k in (1, 5, 10)}
    means = {"t2i": recalls, "i2t": recalls, "mrr": 0.2, "map": 0.2, "zero_shot": 0.3, "retention": 1.0}
    base = Row("base", 1, 10, 50, means | {"mean_r@1": 0.1})
    own = Row("sft", 1, 10, 50, means | {"mean_r@1": mean_r1}, seconds=12.0, passes=5, epochs=5)
    group = GroupResult(
        title="Image side",
        about="",
        main="sft",
        split="test",
        rows=[base, own],
        differences=[
            Difference("sft", "base", 0.02, [0.01, 0.03]),
            Difference("sft+wise_ft", "base", 0.0, [-0.01, 0.01]),
        ],
        failures=dict(failures),
        sweeps={
            "sft": [
                SweepPoint(0.5, 0.0, val_mean_r1=0.1, retention=1.0),
                SweepPoint(1.0, 0.0, val_mean_r1=0.12, retention=0.9),
            ]
        },
        size=StudentSize(2_000_000, 1_000_000, 1.0, 2.0),
    )
    return SuiteResult("mine", "A suite.", [0], [group])


def test_the_report_says_what_is_noise_what_it_cost_and_what_failed():
    text = section(
        result({"student x seed 0": "ValueError: no"}), plots=["p.png"], command="COMMAND", machine="MACHINE"
    )
    assert "- **sft**: +2.0 [+1.0, +3.0] against base (better)." in text
    assert "- **sft+wise_ft**: +0.0 [-1.0, +1.0] against base (inside the noise)." in text
    assert "sft 12 s (5 passes over the pictures)" in text
    assert "2.0 + 1.0 M parameters" in text
    assert "Failed: student x seed 0: ValueError: no." in text
    for said in ("COMMAND", "MACHINE", "](p.png)"):
        assert said in text


def test_a_section_is_replaced_and_the_rest_of_the_file_stays(tmp_path):
    path = tmp_path / "docs" / "results.md"
    path.parent.mkdir()
    path.write_text("# Results\n\nBy hand.\n")
    write_report(result(), path, command="first")
    once = path.read_text()
    path.write_text(once + "\nMore by hand.\n")
    write_report(result(), path, command="second")
    twice = path.read_text()
    assert twice.startswith("# Results\n\nBy hand.\n")
    assert twice.endswith("\nMore by hand.\n")
    assert twice.count("## Recipes compared") == 1
    assert "second" in twice
    assert "first" not in twice
    assert (tmp_path / "docs" / "mine-0.png").stat().st_size > 1000


def test_figures_for_recipes_show_replace_their_older_ones_and_no_others(tmp_path):
    from dclip_qdrant.jobs.suite_report import update_figures

    path = tmp_path / "figures.json"
    (title,) = (g.title for g in result().groups)
    old = [
        ("mine", title, "sft"),
        ("mine", title, "another"),
        ("mine", "another group", "sft"),
        ("other", title, "sft"),
    ]
    path.write_text(json.dumps([{"suite": s, "group": g, "recipe": r, "seconds": 0.0} for s, g, r in old]))
    update_figures(result(), path)
    out = json.loads(path.read_text())
    assert [
        (f["suite"], f["group"], f["recipe"]) for f in out
    ] == old  # what a part of a suite did not measure again stays
    assert [f["seconds"] for f in out] == [12.0, 0.0, 0.0, 0.0]
    assert out[0]["differences"] == [{"than": "base", "difference": 0.02, "ci": [0.01, 0.03]}]


def test_what_a_leak_was_worth_is_said(tmp_path):
    write_report(result(), tmp_path / "results.md", leaked=result(mean_r1=0.15), leak_share=0.33)
    text = (tmp_path / "results.md").read_text()
    assert "### With 33% of the test pictures in train" in text
    assert "mean R@1 12.0 clean, 15.0 leaked (+3.0)" in text


def test_a_table_gives_spreads_over_seeds_also_where_they_are_zero():
    def seed(r1, retention):
        ways = {w: {"r@1": r1, "r@5": 0.5, "r@10": 0.75} for w in ("t2i", "i2t")}
        test = ways | {"mrr": 0.25, "map": 0.125, "mean_r@1": r1, "n_images": 8, "n_texts": 8}
        return Figures(test, None, retention)

    one = comparison.row("one", [seed(0.25, 1.0)])
    two = comparison.row("two", [seed(0.125, 1.0), seed(0.375, 1.0)])
    lines = comparison.markdown_table([one, two]).splitlines()
    assert lines[2] == "| one | 25.0 | 50.0 | 75.0 | 25.0 | 50.0 | 75.0 | 25.0 | 12.5 | - | 1.000 | 1 |"
    # of 0.125 and 0.375 the sample's standard deviation is 0.25 / sqrt(2) = 0.177
    way = "25.0 ± 17.7 | 50.0 ± 0.0 | 75.0 ± 0.0"
    assert lines[3] == f"| two | {way} | {way} | 25.0 ± 0.0 | 12.5 ± 0.0 | - | 1.000 ± 0.000 | 2 |"
